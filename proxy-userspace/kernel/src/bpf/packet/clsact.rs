//! The programs on an interface as filters of its qdisc clsact.
//!
//! Where the instance has pins, there is a note among them of each interface that has filters (see [`presence`]). With the note
//! the filters stay when the process ends, and the next one knows by the note that they are its own to look after.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use aya::programs::TcAttachType;
use proxy_common::instance::Instance;

use crate::bpf::filters::{self, Filter, Mark};
use crate::bpf::presence;

/// The filters of this process.
#[derive(Debug)]
pub(super) struct Filters {
    mark: Mark,
    /// If they can outlive it.
    instance: Option<Instance>,
}

/// A filter that is attached. Dropping it detaches it, unless a note keeps it or another process has it.
#[derive(Debug)]
pub(super) struct AttachedFilter {
    filter: Filter,
    note: Option<PathBuf>,
}

impl Drop for AttachedFilter {
    fn drop(&mut self) {
        if self.note.as_ref().is_some_and(|note| note.exists()) {
            return;
        }
        let detached =
            self.filter.is_there().and_then(|there| if there { self.filter.detach() } else { Ok(()) });
        if let Err(error) = detached {
            tracing::warn!(%error, "cannot remove a filter of the packet splice; `steer cleanup` does");
        }
    }
}

impl Filters {
    pub(super) fn new(instance: Option<Instance>) -> io::Result<Self> {
        Ok(Self { mark: Mark::new(instance.clone())?, instance })
    }

    /// Puts a program of this name on an interface; where there is one of an earlier process of the instance, in its place, without
    /// a packet passing in between. If the qdisc was made for it, it goes with it.
    pub(super) fn attach(
        &self,
        (ifindex, direction): (u32, TcAttachType),
        program: (&str, BorrowedFd<'_>),
        (note, made_qdisc): (Option<PathBuf>, bool),
    ) -> io::Result<AttachedFilter> {
        let mut earlier = self.earlier(ifindex, program.0)?.into_iter();
        let filter = match earlier.next() {
            Some(filter) => filter.replace(program, &self.mark)?,
            None => Filter::attach(ifindex, direction, program, &self.mark, made_qdisc)?,
        };
        earlier.try_for_each(|more| more.detach())?;
        Ok(AttachedFilter { filter, note })
    }

    fn earlier(&self, ifindex: u32, program: &str) -> io::Result<Vec<Filter>> {
        match &self.instance {
            Some(instance) => filters::of_instance(instance, ifindex, program),
            None => Ok(Vec::new()),
        }
    }
}

/// The note of an interface.
pub(super) fn note_of(pins: &Path, ifindex: u32) -> PathBuf {
    pins.join(format!("{ifindex}-filters"))
}

/// Makes it, unless it is there already.
pub(super) fn note(pins: &Path, ifindex: u32) -> io::Result<()> {
    let path = note_of(pins, ifindex);
    if path.exists() { Ok(()) } else { presence::note(ifindex, &path) }
}
