//! The programs on an interface as filters of its qdisc clsact.
//!
//! If the instance has pins, there is a note among the pins for each interface that has filters
//! (see [`presence`]). The filters of a noted interface stay when the process ends, and the note
//! tells the next process to look after them.

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
    /// Where the notes are, if the filters can outlive the process.
    instance: Option<Instance>,
}

/// An attached filter. Dropping it detaches the filter, unless a note keeps the filter or another
/// process has taken it over.
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

    /// Attaches a program of this name to an interface. A filter of an earlier process of the
    /// instance is replaced, and no packet passes between the two. A qdisc that was made for the
    /// filter is removed together with the filter.
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

/// The path of the note of an interface.
pub(super) fn note_of(pins: &Path, ifindex: u32) -> PathBuf {
    pins.join(format!("{ifindex}-filters"))
}

/// Makes the note, unless there is one already.
pub(super) fn note(pins: &Path, ifindex: u32) -> io::Result<()> {
    let path = note_of(pins, ifindex);
    if path.exists() { Ok(()) } else { presence::note(ifindex, &path) }
}
