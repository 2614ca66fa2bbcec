//! Filters of dead processes that no later process takes over.

use std::io;

use proxy_common::instance::Instance;

use super::clsact;
use super::pinned::{self, PinnedError};
use super::programs::PROGRAMS;
use crate::bpf::filters::{self, Filter};
use crate::bpf::pins::{self, Pins};

/// Filters of the programs in the caller's network namespace whose process has died, and to which
/// no pins lead. A crash leaves such filters where there are no links and nothing could be pinned.
/// No process looks after their streams, and new connections from the same source ports could not
/// be established.
#[derive(Debug)]
pub struct Orphans(Vec<Filter>);

impl Orphans {
    /// # Errors
    /// The kernel does not tell.
    pub fn find() -> io::Result<Self> {
        filters::orphans(&PROGRAMS.map(|(name, _)| name), is_kept).map(Self)
    }

    /// How many interfaces have such filters.
    pub fn interfaces(&self) -> usize {
        filters::count_interfaces(&self.0)
    }

    /// Removes the filters, and with them their programs and maps. Their streams end: the local
    /// stack answers the next packet of each peer with a RST.
    ///
    /// # Errors
    /// CAP_NET_ADMIN is missing.
    pub fn remove(self) -> io::Result<()> {
        self.0.iter().try_for_each(|filter| match filter.detach() {
            // The filter was removed with its interface, or by another program.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)) =>
            {
                Ok(())
            }
            removed => removed,
        })
    }
}

/// Whether the instance's next process will find the filters on an interface by its pins.
fn is_kept(instance: Option<&Instance>, ifindex: u32) -> bool {
    // Pins that cannot be read may lead to the filters.
    instance.is_some_and(|instance| has_note_of(instance, ifindex).unwrap_or(true))
}

/// Whether an instance has a note that an interface of the caller's network namespace has its
/// filters.
fn has_note_of(instance: &Instance, ifindex: u32) -> Result<bool, PinnedError> {
    let here = pinned::netns()?;
    let look = || -> Result<bool, PinnedError> {
        for path in pinned::used_directories(&pins::path_of(instance))? {
            if clsact::note_of(&path, ifindex).exists()
                && pinned::read(&pinned::open_about(&path)?)?.netns == here
            {
                return Ok(true);
            }
        }
        Ok(false)
    };
    // Its process may have moved the note to a directory that this loop has already passed.
    Ok(look()? || look()?)
}

/// Removes the filters that a crash has left. To be called before there are new streams: the old
/// filters would take their packets.
pub(super) fn remove_orphans() {
    let removed = Orphans::find().and_then(|orphans| {
        let interfaces = orphans.interfaces();
        orphans.remove().map(|()| interfaces)
    });
    match removed {
        Ok(0) => {}
        Ok(interfaces) => tracing::info!(
            interfaces,
            "removed the filters of a process that has died; its streams end with a RST"
        ),
        Err(error) => tracing::warn!(%error, "cannot remove the filters of a process that has died"),
    }
}

/// Removes all that a stopped process of an instance has pinned, and its filters in the caller's
/// network namespace.
///
/// # Errors
/// The file system refuses, or CAP_NET_ADMIN is missing.
pub fn remove_pinned(pins: &Pins) -> Result<(), PinnedError> {
    // The pins go first. A filter to which no pins lead can still be found, as an orphan.
    pins.remove()?;
    let remove = || {
        let programs = PROGRAMS.map(|(name, _)| name);
        let others = |instance: Option<&Instance>, _| instance != Some(pins.instance());
        Orphans(filters::orphans(&programs, others)?).remove()
    };
    remove().map_err(PinnedError::Filters)
}
