//! Attaches the programs to interfaces, and notices when an interface goes away.

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, PoisonError};

use aya::Ebpf;
use aya::programs::tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use aya::util::KernelVersion;
use proxy_common::abi;
use proxy_common::reason::Reason;

use crate::kernel::host::{self, InterfaceKind};
use crate::kernel::loader::{self, LoadError};
use crate::kernel::netlink::LinkMonitor;

/// How programs are attached to an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Links (Linux 6.6): the kernel detaches them when the process ends, however it ends.
    Tcx,
    /// Filters of the qdisc clsact: a process that is killed leaves them behind. The qdisc, which others may be
    /// using by then, is left in any case.
    Clsact,
}

impl Hook {
    /// Links where there are any.
    pub fn of_this_kernel() -> Self {
        // A kernel that does not tell its version is an odd one; what is older works everywhere.
        let version = KernelVersion::current().ok();
        if version >= Some(KernelVersion::new(6, 6, 0)) { Self::Tcx } else { Self::Clsact }
    }

    /// Before all others: a program that lets a packet of a spliced flow go on to the local stack would
    /// have it answered with a RST.
    fn options(self) -> TcAttachOptions {
        match self {
            Self::Tcx => TcAttachOptions::TcxOrder(LinkOrder::first()),
            // Without a priority, the kernel chooses one before those that are there.
            Self::Clsact => TcAttachOptions::Netlink(NlOptions::default()),
        }
    }
}

/// An interface does not get the programs.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("there is no interface with index {ifindex}")]
    Gone { ifindex: u32 },
    #[error("{name} is neither Ethernet nor loopback")]
    Kind { name: String },
    #[error("cannot ask the kernel for its interfaces")]
    Unknown(#[source] io::Error),
    #[error("cannot attach {program} to {name}")]
    Refused {
        program: &'static str,
        name: String,
        #[source]
        source: ProgramError,
    },
}

impl AttachError {
    /// The reason of streams that are relayed because of it.
    pub fn reason(&self) -> Reason {
        Reason::Interface
    }
}

/// The programs, and the interfaces that they are attached to.
pub(super) struct Interfaces {
    hook: Hook,
    attached: Mutex<Attached>,
}

struct Attached {
    programs: Ebpf,
    monitor: LinkMonitor,
    /// By index. Dropping a link detaches the program.
    links: HashMap<u32, [SchedClassifierLink; 2]>,
}

const PROGRAMS: [(&str, TcAttachType); 2] =
    [(abi::PROG_PACKET_INGRESS, TcAttachType::Ingress), (abi::PROG_PACKET_EGRESS, TcAttachType::Egress)];

/// Gives the programs to the kernel, which needs all maps to be open.
pub(super) fn load_programs(programs: &mut Ebpf) -> Result<(), LoadError> {
    for (name, _) in PROGRAMS {
        let program: &mut SchedClassifier = loader::program(programs, name)?;
        program.load().map_err(|error| loader::not_verified(name, error))?;
    }
    Ok(())
}

impl Interfaces {
    /// `programs` have gone through [`load_programs`]; they are attached to nothing yet.
    pub(super) fn new(programs: Ebpf, hook: Hook) -> Result<Self, LoadError> {
        let monitor = LinkMonitor::new().map_err(|error| LoadError::refused("watching interfaces", error))?;
        let attached = Attached { programs, monitor, links: HashMap::new() };
        Ok(Self { hook, attached: Mutex::new(attached) })
    }

    /// See [`super::PacketKernel::attach`].
    pub(super) fn attach(&self, ifindex: u32) -> Result<(), AttachError> {
        // Each change of the set is made at once, after everything that can fail.
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        attached.forget_removed(self.hook).map_err(AttachError::Unknown)?;
        if attached.links.contains_key(&ifindex) {
            return Ok(());
        }
        let interface = host::interface(ifindex).map_err(|error| match error.raw_os_error() {
            Some(libc::ENODEV) => AttachError::Gone { ifindex },
            _ => AttachError::Unknown(error),
        })?;
        if interface.kind == InterfaceKind::Other {
            return Err(AttachError::Kind { name: interface.name });
        }
        let links = attached.attach(&interface.name, self.hook)?;
        tracing::info!(interface = interface.name, ifindex, hook = ?self.hook, "attached the packet splice");
        attached.links.insert(ifindex, links);
        Ok(())
    }
}

impl Attached {
    /// An index may be given to another interface once its own is gone.
    fn forget_removed(&mut self, hook: Hook) -> io::Result<()> {
        for ifindex in self.monitor.removed(self.links.keys().copied())? {
            let Some(links) = self.links.remove(&ifindex) else { continue };
            tracing::info!(ifindex, "an interface of the packet splice is gone");
            match hook {
                Hook::Tcx => drop(links),
                // The filters went with the interface. To remove them now could hit those of a new one.
                Hook::Clsact => std::mem::forget(links),
            }
        }
        Ok(())
    }

    fn attach(&mut self, interface: &str, hook: Hook) -> Result<[SchedClassifierLink; 2], AttachError> {
        let refused =
            |program| move |source| AttachError::Refused { program, name: interface.to_owned(), source };
        if hook == Hook::Clsact {
            add_clsact(interface).map_err(|error| refused("the qdisc clsact")(error.into()))?;
        }
        let mut attach = |(name, direction)| {
            let program: &mut SchedClassifier = self.programs.program_mut(name).expect(LOADED).try_into()?;
            let link = program.attach_with_options(interface, direction, hook.options())?;
            program.take_link(link)
        };
        let [ingress, egress] = PROGRAMS;
        Ok([attach(ingress).map_err(refused(ingress.0))?, attach(egress).map_err(refused(egress.0))?])
    }
}

const LOADED: &str = "the program was there when it was loaded";

fn add_clsact(interface: &str) -> Result<(), TcError> {
    match tc::qdisc_add_clsact(interface) {
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_interface() {
        let error = AttachError::Kind { name: "tun0".to_owned() };
        assert_eq!(error.to_string(), "tun0 is neither Ethernet nor loopback");
        assert_eq!(error.reason(), Reason::Interface);
    }
}
