//! Attaches the programs to interfaces, and notices when an interface goes away.
//!
//! If the instance has pins, the links of an interface are among the pins, as `IFINDEX-ingress` and
//! `IFINDEX-egress`. For an interface that has filters, there is a note, as `IFINDEX-filters`.

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::{fs, io};

use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions, TcError};
use aya::programs::{LinkOrder, ProgramError, TcAttachType};
use aya::util::KernelVersion;
use proxy_common::instance::Instance;
use proxy_common::reason::Reason;

use super::clsact::{self, AttachedFilter, Filters};
use super::programs::{PROGRAMS, Programs, name_of};
use crate::bpf::filters;
use crate::bpf::links;
use crate::bpf::loader::LoadError;
use crate::bpf::pins;
use crate::bpf::presence;
use crate::bpf::refusal;
use crate::failpoint;
use crate::net::host::{self, InterfaceKind};
use crate::net::netlink::LinkMonitor;
use crate::net::remembered::Remembered;

/// How programs are attached to an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Links (Linux 6.6). When the process ends, in whatever way, the kernel detaches the links
    /// that are not pinned.
    Tcx,
    /// Filters of the qdisc clsact. They stay when the process is killed. The next process of the
    /// instance takes the filters over, or removes them if there are no pins. A qdisc that was made
    /// for the filters is removed with them, unless another program uses the qdisc by then.
    Clsact,
}

impl Hook {
    /// Links where the kernel has them, else filters.
    pub fn of_this_kernel() -> Self {
        if failpoint::is_asked("attach filters") {
            return Self::Clsact;
        }
        // If the kernel does not tell its version, take the older kind, which works everywhere.
        let version = KernelVersion::current().ok();
        if version >= Some(KernelVersion::new(6, 6, 0)) { Self::Tcx } else { Self::Clsact }
    }
}

/// Why an interface does not get the programs.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("there is no interface with index {ifindex}")]
    Gone { ifindex: u32 },
    #[error("{name} is neither Ethernet nor loopback")]
    Kind { name: String },
    #[error("cannot ask the kernel for its interfaces")]
    Unknown(#[source] io::Error),
    #[error("cannot attach {program} to {name}{}", refusal::wanted(source))]
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
        source: io::Error,
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
    /// The interfaces that are attached, by index. Once an interface is gone, another one may get
    /// its index. The kernel reports that the first one has gone before the second one can exist,
    /// so no stream takes the second one for attached.
    known: Remembered<u32, ()>,
    /// Locked for interfaces that are not known, hence once after each change of the network.
    attached: Mutex<Attached>,
}

struct Attached {
    programs: Programs,
    monitor: LinkMonitor,
    /// By index.
    links: HashMap<u32, [Attachment; 2]>,
    /// Where the links are pinned, if they are pinned.
    pins: Option<PathBuf>,
    /// The filters, with the hook clsact.
    filters: Option<Filters>,
}

/// An attached program. Dropping this detaches the program, unless the link is pinned.
#[expect(dead_code, reason = "what is in it is held")]
enum Attachment {
    Link(SchedClassifierLink),
    Filter(AttachedFilter),
}

impl Interfaces {
    /// Takes over the links and filters that, according to `pins`, an earlier process of the
    /// instance has left. They get `programs` instead of their own programs.
    pub(super) fn new(
        programs: Programs,
        hook: Hook,
        pins: Option<(Instance, PathBuf)>,
    ) -> Result<Self, LoadError> {
        let (instance, pins) = pins.unzip();
        let monitor = LinkMonitor::new().map_err(|error| LoadError::refused("watching interfaces", error))?;
        let filters = (hook == Hook::Clsact).then(|| Filters::new(instance)).transpose();
        let filters =
            filters.map_err(|error| LoadError::refused("a socket that marks its filters", error))?;
        let mut attached = Attached { programs, monitor, links: HashMap::new(), pins, filters };
        attached.adopt().map_err(|error| LoadError::refused("what is pinned of interfaces", error))?;
        Ok(Self { hook, known: Remembered::new(), attached: Mutex::new(attached) })
    }

    /// See [`super::PacketKernel::attach_all`].
    pub(super) fn attach(&self, interfaces: &[u32]) -> Result<(), AttachError> {
        self.known.with(|known| {
            interfaces
                .iter()
                .try_for_each(|ifindex| known.get(*ifindex, |ifindex| self.attach_unknown(*ifindex)))
        })
    }

    fn attach_unknown(&self, ifindex: u32) -> Result<(), AttachError> {
        // The set changes in one step, after everything that can fail.
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
        let links = attached.attach(ifindex, &interface.name)?;
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
                // The filters are gone with the interface. Removing them now could hit the filters
                // of a new interface with the same index.
                Hook::Clsact => std::mem::forget(links),
            }
        }
        Ok(())
    }

    fn attach(&mut self, ifindex: u32, interface: &str) -> Result<[Attachment; 2], AttachError> {
        if self.filters.is_some() {
            return self.attach_filters(ifindex, interface);
        }
        let refused =
            |program| move |source| AttachError::Refused { program, name: interface.to_owned(), source };
        let mut attach = |program: (&'static str, TcAttachType)| {
            let (_, direction) = program;
            let program = self.programs.get(program)?;
            // Before all other programs: if another program took a packet of a spliced flow to the
            // local stack, the stack would answer with a RST.
            let first = TcAttachOptions::TcxOrder(LinkOrder::first());
            let link = program.attach_with_options(interface, direction, first)?;
            program.take_link(link)
        };
        let [ingress, egress] = PROGRAMS;
        let links =
            [attach(ingress).map_err(refused(ingress.0))?, attach(egress).map_err(refused(egress.0))?];
        let Some(pins) = &self.pins else { return Ok(links.map(Attachment::Link)) };
        let [one, other] = links;
        let pin = |link, (program, direction)| {
            pin(link, &path_of(pins, ifindex, direction))
                .map(Attachment::Link)
                .map_err(io::Error::other)
                .map_err(|source| AttachError::NotPinned { program, name: interface.to_owned(), source })
        };
        let pinned = pin(one, ingress).and_then(|one| Ok([one, pin(other, egress)?]));
        // A single link would make the next attempt fail.
        pinned.inspect_err(|_| self.remove_pins(ifindex))
    }

    fn attach_filters(&mut self, ifindex: u32, interface: &str) -> Result<[Attachment; 2], AttachError> {
        let links = self.put_filters(ifindex).map_err(|(program, source)| AttachError::Refused {
            program,
            name: interface.to_owned(),
            source,
        })?;
        // The note comes last: if this process dies before, the next one removes the filters.
        if let Some(pins) = &self.pins {
            clsact::note(pins, ifindex).map_err(|source| AttachError::NotPinned {
                program: PROGRAMS[0].0,
                name: interface.to_owned(),
                source,
            })?;
        }
        Ok(links)
    }

    /// An error names the program that was to be attached.
    fn put_filters(&mut self, ifindex: u32) -> Result<[Attachment; 2], (&'static str, ProgramError)> {
        let of_io = |error| ProgramError::from(TcError::IoError(error));
        let made_qdisc = filters::make_qdisc(ifindex).map_err(|error| ("the qdisc clsact", of_io(error)))?;
        let note = self.pins.as_ref().map(|pins| clsact::note_of(pins, ifindex));
        let mut put = |program: (&'static str, TcAttachType)| {
            let (name, direction) = program;
            let fd = self.programs.get(program)?.fd()?;
            let filters = self.filters.as_ref().ok_or(ProgramError::NotLoaded)?;
            let filter = filters.attach((ifindex, direction), (name, fd.as_fd()), (note.clone(), made_qdisc));
            Ok(Attachment::Filter(filter.map_err(of_io)?))
        };
        let [ingress, egress] = PROGRAMS;
        Ok([
            put(ingress).map_err(|error| (ingress.0, error))?,
            put(egress).map_err(|error| (egress.0, error))?,
        ])
    }

    /// Gives the pinned links, or the filters, of an earlier process the programs of this process.
    /// The kernel swaps each program in one step: no packet passes in between.
    fn adopt(&mut self) -> io::Result<()> {
        let Some(pins) = self.pins.clone() else { return Ok(()) };
        for ifindex in pinned(&pins::names(&pins)?) {
            match self.adopt_links(&pins, ifindex) {
                Ok(links) => {
                    tracing::info!(ifindex, "took over the packet splice of an interface");
                    self.links.insert(ifindex, links);
                    failpoint::reached("first link");
                }
                Err(error) => {
                    let error: &dyn std::error::Error = &error;
                    tracing::warn!(ifindex, error, "cannot take over the packet splice of an interface");
                    self.replace(&pins, ifindex);
                }
            }
        }
        Ok(())
    }

    fn adopt_links(&mut self, pins: &Path, ifindex: u32) -> Result<[Attachment; 2], AdoptError> {
        // Another interface may have the index by now, or this interface may have come from another
        // namespace.
        host::interface(ifindex).map_err(AdoptError::Interface)?;
        if self.filters.is_some() {
            if !presence::is_there(&clsact::note_of(pins, ifindex)).map_err(AdoptError::Unknown)? {
                return Err(AdoptError::Elsewhere);
            }
            return self.put_filters(ifindex).map_err(|(_, error)| error.into());
        }
        let mut adopt = |program: (&'static str, TcAttachType)| {
            let (_, direction) = program;
            let pin = path_of(pins, ifindex, direction);
            let attached = links::attached_to(ifindex, direction).map_err(AdoptError::Unknown)?;
            if !attached.contains(&links::id(&pin).map_err(AdoptError::Unknown)?) {
                return Err(AdoptError::Elsewhere);
            }
            let link = FdLink::from(PinnedLink::from_pin(pin)?);
            let program = self.programs.get(program)?;
            let link = program.attach_to_link(link.try_into()?)?;
            Ok(Attachment::Link(program.take_link(link)?))
        };
        let [ingress, egress] = PROGRAMS;
        Ok([adopt(ingress)?, adopt(egress)?])
    }

    /// Attaches the programs anew, before the unusable links are removed. (Filters that are there
    /// can always be used.)
    fn replace(&mut self, pins: &Path, ifindex: u32) {
        let old: Vec<_> = PROGRAMS
            .iter()
            .filter_map(|(_, direction)| PinnedLink::from_pin(path_of(pins, ifindex, *direction)).ok())
            .collect();
        self.remove_pins(ifindex);
        if let Ok(interface) = host::interface(ifindex)
            && interface.kind != InterfaceKind::Other
        {
            match self.attach(ifindex, &interface.name) {
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
        for path in paths_of(pins, ifindex) {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(ifindex, %error, "cannot remove what was pinned of an interface");
                }
                _ => {}
            }
        }
    }
}

/// Why the programs on an interface cannot be taken over.
#[derive(Debug, thiserror::Error)]
enum AdoptError {
    #[error("the interface cannot be found")]
    Interface(#[source] io::Error),
    #[error("the kernel does not tell what is attached to the interface")]
    Unknown(#[source] io::Error),
    #[error("it belongs to another interface, which had the same index")]
    Elsewhere,
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Program(#[from] ProgramError),
}

/// The interfaces whose links or notes have these names.
pub(super) fn pinned(names: &[String]) -> HashSet<u32> {
    names.iter().filter_map(|name| name.split_once('-')?.0.parse().ok()).collect()
}

/// Whether the programs are still attached to any interface, in whatever network namespace. If not,
/// no packet of a stream is forwarded any more.
pub(super) fn any_is_attached(pins: &Path) -> io::Result<bool> {
    for ifindex in pinned(&pins::names(pins)?) {
        let links = PROGRAMS.map(|(_, direction)| links::is_attached(&path_of(pins, ifindex, direction)));
        let note = presence::is_there(&clsact::note_of(pins, ifindex));
        for attached in links.into_iter().chain([note]) {
            match attached {
                Ok(true) => return Ok(true),
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    Ok(false)
}

/// Moves the pins of interfaces from one directory to another. A pin that the other directory has
/// already stays where it is.
pub(super) fn move_pins(from: &Path, to: &Path) -> io::Result<()> {
    for ifindex in pinned(&pins::names(from)?) {
        for (from, to) in paths_of(from, ifindex).into_iter().zip(paths_of(to, ifindex)) {
            if from.exists() && !to.exists() {
                fs::rename(from, to)?;
            }
        }
    }
    Ok(())
}

/// All names that pins of an interface can have.
fn paths_of(pins: &Path, ifindex: u32) -> [PathBuf; 3] {
    let [ingress, egress] = PROGRAMS.map(|(_, direction)| path_of(pins, ifindex, direction));
    [ingress, egress, clsact::note_of(pins, ifindex)]
}

fn path_of(pins: &Path, ifindex: u32, direction: TcAttachType) -> PathBuf {
    pins.join(format!("{ifindex}-{}", name_of(direction)))
}

fn pin(link: SchedClassifierLink, path: &Path) -> Result<SchedClassifierLink, aya::pin::PinError> {
    // There are pins only where there are links.
    let link = FdLink::try_from(link).expect("a link of the hook tcx");
    let pinned = FdLink::from(link.pin(path)?);
    Ok(SchedClassifierLink::try_from(pinned).expect("what it was before"))
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
