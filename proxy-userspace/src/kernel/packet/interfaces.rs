//! Attaches the programs to interfaces, and notices when an interface goes away.
//!
//! Where the instance has pins, its links are among them, as `IFINDEX-ingress` and `IFINDEX-egress`; and the programs, as
//! `program-BUILD-ingress` and `program-BUILD-egress`. To verify them takes the kernel half a second; a process that is started
//! again after a crash finds its own and is spared that.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::{fs, io};

use aya::Ebpf;
use aya::pin::PinError;
use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use aya::util::KernelVersion;
use proxy_common::abi;
use proxy_common::reason::Reason;

use crate::kernel::host::{self, InterfaceKind};
use crate::kernel::loader::{self, LoadError};
use crate::kernel::netlink::LinkMonitor;
use crate::kernel::pins;

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
    #[error("cannot pin {program}, attached to {name}")]
    NotPinned {
        program: &'static str,
        name: String,
        #[source]
        source: PinError,
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
    programs: Programs,
    monitor: LinkMonitor,
    /// By index. Dropping a link detaches the program, unless it is pinned.
    links: HashMap<u32, [SchedClassifierLink; 2]>,
    /// Where links are pinned, if they are.
    pins: Option<PathBuf>,
}

const PROGRAMS: [(&str, TcAttachType); 2] =
    [(abi::PROG_PACKET_INGRESS, TcAttachType::Ingress), (abi::PROG_PACKET_EGRESS, TcAttachType::Egress)];

/// The two programs, verified.
pub(super) struct Programs {
    /// In the order of [`PROGRAMS`].
    handles: [SchedClassifier; 2],
}

impl Programs {
    /// Those of `ebpf`, given to the kernel, which needs all maps to be open.
    ///
    /// In `pins`, where they are pinned, there may be those of an earlier process. They are used in their place if they are of
    /// the same `build`: of the same object, with the same globals. The maps that they use have to be those of this directory.
    pub(super) fn load(ebpf: &mut Ebpf, build: u64, pins: Option<&Path>) -> Result<Self, LoadError> {
        if let Some(pins) = pins {
            let [ingress, egress] = PROGRAMS.map(|(_, direction)| program_path(pins, build, direction));
            if let (Ok(ingress), Ok(egress)) =
                (SchedClassifier::from_pin(ingress), SchedClassifier::from_pin(egress))
            {
                tracing::debug!("the programs of the earlier process are the same");
                return Ok(Self { handles: [ingress, egress] });
            }
            remove_programs(pins).map_err(|error| LoadError::refused("the earlier programs", error))?;
        }
        let [ingress, egress] = PROGRAMS;
        Ok(Self { handles: [verify(ebpf, ingress, build, pins)?, verify(ebpf, egress, build, pins)?] })
    }

    fn get(&mut self, name: &str) -> &mut SchedClassifier {
        let [ingress, egress] = &mut self.handles;
        if name == abi::PROG_PACKET_INGRESS { ingress } else { egress }
    }
}

/// Gives a program to the kernel, and pins it if there is a place for that.
fn verify(
    ebpf: &mut Ebpf,
    (name, direction): (&'static str, TcAttachType),
    build: u64,
    pins: Option<&Path>,
) -> Result<SchedClassifier, LoadError> {
    let program: &mut SchedClassifier = loader::program(ebpf, name)?;
    program.load().map_err(|error| loader::not_verified(name, error))?;
    if let Some(pins) = pins {
        // What cannot be pinned is verified again the next time.
        if let Err(error) = program.pin(program_path(pins, build, direction)) {
            tracing::debug!(program = name, error = &error as &dyn std::error::Error, "not pinned");
        }
    }
    let info = program.info().map_err(|error| LoadError::refused(name, error))?;
    let again = SchedClassifier::from_program_info(info, name.into());
    again.map_err(|error| LoadError::refused(name, error))
}

fn program_path(pins: &Path, build: u64, direction: TcAttachType) -> PathBuf {
    pins.join(format!("{PROGRAM}{build:016x}-{}", name_of(direction)))
}

/// Those of other builds.
fn remove_programs(pins: &Path) -> io::Result<()> {
    let names = pins::names(pins)?;
    names
        .iter()
        .filter(|name| name.starts_with(PROGRAM))
        .try_for_each(|name| fs::remove_file(pins.join(name)))
}

/// Begins the names of their pins.
const PROGRAM: &str = "program-";

impl Interfaces {
    /// The links that are pinned in `pins` get `programs` in the place of those that they have.
    pub(super) fn new(programs: Programs, hook: Hook, pins: Option<PathBuf>) -> Result<Self, LoadError> {
        let monitor = LinkMonitor::new().map_err(|error| LoadError::refused("watching interfaces", error))?;
        let mut attached = Attached { programs, monitor, links: HashMap::new(), pins };
        attached.adopt(hook).map_err(|error| LoadError::refused("the pinned links", error))?;
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
        let links = attached.attach(ifindex, &interface.name, self.hook)?;
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
            self.remove_pins(ifindex);
            match hook {
                Hook::Tcx => drop(links),
                // The filters went with the interface. To remove them now could hit those of a new one.
                Hook::Clsact => std::mem::forget(links),
            }
        }
        Ok(())
    }

    fn attach(
        &mut self,
        ifindex: u32,
        interface: &str,
        hook: Hook,
    ) -> Result<[SchedClassifierLink; 2], AttachError> {
        let refused =
            |program| move |source| AttachError::Refused { program, name: interface.to_owned(), source };
        if hook == Hook::Clsact {
            add_clsact(interface).map_err(|error| refused("the qdisc clsact")(error.into()))?;
        }
        let mut attach = |(name, direction)| {
            let program = self.programs.get(name);
            let link = program.attach_with_options(interface, direction, hook.options())?;
            program.take_link(link)
        };
        let [ingress, egress] = PROGRAMS;
        let links =
            [attach(ingress).map_err(refused(ingress.0))?, attach(egress).map_err(refused(egress.0))?];
        let Some(pins) = &self.pins else { return Ok(links) };
        let [one, other] = links;
        let pin = |link, (program, direction)| {
            pin(link, &path_of(pins, ifindex, direction)).map_err(|source| AttachError::NotPinned {
                program,
                name: interface.to_owned(),
                source,
            })
        };
        let pinned = pin(one, ingress).and_then(|one| Ok([one, pin(other, egress)?]));
        // One alone would be in the way of the next attempt.
        pinned.inspect_err(|_| self.remove_pins(ifindex))
    }

    /// Gives the pinned links of a process that has ended the programs of this one. The kernel does that at once: no packet
    /// passes in between.
    fn adopt(&mut self, hook: Hook) -> io::Result<()> {
        let Some(pins) = self.pins.clone() else { return Ok(()) };
        for ifindex in pinned(&pins::names(&pins)?) {
            match self.adopt_links(&pins, ifindex) {
                Ok(links) => {
                    tracing::info!(ifindex, "took over the packet splice of an interface");
                    self.links.insert(ifindex, links);
                }
                Err(error) => {
                    let error: &dyn std::error::Error = &error;
                    tracing::warn!(ifindex, error, "cannot take over the links of an interface");
                    self.replace(&pins, ifindex, hook);
                }
            }
        }
        Ok(())
    }

    fn adopt_links(&mut self, pins: &Path, ifindex: u32) -> Result<[SchedClassifierLink; 2], AdoptError> {
        let interface = host::interface(ifindex).map_err(AdoptError::Interface)?.name;
        let mut adopt = |(name, direction)| {
            let link = FdLink::from(PinnedLink::from_pin(path_of(pins, ifindex, direction))?);
            // The index may have been given to another interface, or this one come from another namespace.
            let (_, attached) = SchedClassifier::query_tcx(&interface, direction)?;
            let program = link.info()?.program_id();
            if !attached.iter().any(|other| other.id() == program) {
                return Err(AdoptError::Elsewhere);
            }
            let program = self.programs.get(name);
            let link = program.attach_to_link(link.try_into()?)?;
            Ok(program.take_link(link)?)
        };
        let [ingress, egress] = PROGRAMS;
        Ok([adopt(ingress)?, adopt(egress)?])
    }

    /// Attaches the programs anew, before the links that cannot be used go.
    fn replace(&mut self, pins: &Path, ifindex: u32, hook: Hook) {
        let old: Vec<_> = PROGRAMS
            .iter()
            .filter_map(|(_, direction)| PinnedLink::from_pin(path_of(pins, ifindex, *direction)).ok())
            .collect();
        self.remove_pins(ifindex);
        if let Ok(interface) = host::interface(ifindex)
            && interface.kind != InterfaceKind::Other
        {
            match self.attach(ifindex, &interface.name, hook) {
                Ok(links) => drop(self.links.insert(ifindex, links)),
                Err(error) => {
                    let error: &dyn std::error::Error = &error;
                    tracing::error!(interface = interface.name, error, "streams over an interface are lost");
                }
            }
        }
        drop(old);
    }

    fn remove_pins(&self, ifindex: u32) {
        let Some(pins) = &self.pins else { return };
        for (_, direction) in PROGRAMS {
            match fs::remove_file(path_of(pins, ifindex, direction)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(ifindex, %error, "cannot remove a link's pin");
                }
                _ => {}
            }
        }
    }
}

/// The links of an interface cannot be taken over.
#[derive(Debug, thiserror::Error)]
enum AdoptError {
    #[error("the interface cannot be found")]
    Interface(#[source] io::Error),
    #[error("they are not those of this interface")]
    Elsewhere,
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Program(#[from] ProgramError),
}

/// The interfaces whose links are among what these names stand for.
pub(super) fn pinned(names: &[String]) -> HashSet<u32> {
    names.iter().filter_map(|name| name.split_once('-')?.0.parse().ok()).collect()
}

fn path_of(pins: &Path, ifindex: u32, direction: TcAttachType) -> PathBuf {
    pins.join(format!("{ifindex}-{}", name_of(direction)))
}

const fn name_of(direction: TcAttachType) -> &'static str {
    if matches!(direction, TcAttachType::Ingress) { "ingress" } else { "egress" }
}

fn pin(link: SchedClassifierLink, path: &Path) -> Result<SchedClassifierLink, PinError> {
    // There are pins only where there are links.
    let link = FdLink::try_from(link).expect("a link of the hook tcx");
    let pinned = FdLink::from(link.pin(path)?);
    Ok(SchedClassifierLink::try_from(pinned).expect("what it was before"))
}

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
