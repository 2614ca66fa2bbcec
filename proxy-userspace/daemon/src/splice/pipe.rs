//! Pipes for `splice(2)`: bytes go from socket to socket without a copy in userspace. This module
//! owns the descriptors of the pipes, and limits their number. The relay decides when to use a
//! pipe.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How many directions of the process may have a pipe at a time. Each pipe costs two descriptors
/// and, while its reader stalls, up to [`SIZES`]`[0]` bytes. Bulk directions beyond that number are
/// copied.
pub(super) const MAX_PIPES: usize = 128;

/// Capacities to ask for, in bytes. All pipes of a user share `fs.pipe-user-pages-soft` (64 MiB by
/// default). Above that limit, and without CAP_SYS_RESOURCE, the kernel refuses to enlarge a pipe
/// (EPERM).
const SIZES: [usize; 2] = [1 << 20, 1 << 18];

/// In bytes. Copying is faster than a smaller pipe, and pipes above the soft limit are smaller.
const MIN_SIZE: usize = 1 << 16;

/// One fill takes at most this many bytes, so that a stream does not keep its thread for long. A pipe
/// is larger, since each of its pages holds at most one segment, and a segment may be smaller than a
/// page.
const MAX_FILL: usize = 1 << 18;

/// Hands out pipes, up to a limit.
#[derive(Debug)]
pub(super) struct Pipes {
    permits: Arc<Semaphore>,
    #[cfg(test)]
    pub(super) max: usize,
}

impl Pipes {
    pub(super) fn new(max: usize) -> Self {
        Self {
            permits: Arc::new(Semaphore::new(max)),
            #[cfg(test)]
            max,
        }
    }

    /// A new pipe. `None`: all pipes are in use, or there is no descriptor or memory for another
    /// one. Then the caller copies.
    pub(super) fn take(&self) -> Option<Pipe> {
        let permit = Arc::clone(&self.permits).try_acquire_owned().ok()?;
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)
            .inspect_err(|error| tracing::debug!(%error, "no pipe for splice(2)"))
            .ok()?;
        let resized = SIZES.into_iter().find_map(|size| fcntl_setpipe_size(&write, size).ok());
        let capacity = match resized {
            Some(capacity) => capacity,
            None => fcntl_getpipe_size(&write).ok()?,
        };
        (capacity >= MIN_SIZE).then_some(Pipe { read, write, capacity, held: 0, _permit: permit })
    }

    #[cfg(test)]
    pub(super) fn left(&self) -> usize {
        self.permits.available_permits()
    }
}

/// A pipe between two sockets. Dropping the pipe closes it, and [`Pipes`] may hand out another one.
#[derive(Debug)]
pub(super) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    capacity: usize,
    /// Bytes in the pipe.
    held: usize,
    _permit: OwnedSemaphorePermit,
}

impl Pipe {
    /// Bytes filled in and not yet drained.
    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// Takes what `from` has received, at most [`MAX_FILL`] and the capacity of the pipe, and returns
    /// the number of bytes; 0 means `from`'s FIN.
    ///
    /// The pipe must be empty. An empty pipe has room, so `WouldBlock` can only mean that `from`
    /// has nothing: `splice(2)` returns EAGAIN both for a full pipe and for an empty socket.
    pub(super) fn fill(&mut self, from: &TcpStream) -> io::Result<usize> {
        debug_assert_eq!(self.held, 0, "a pipe is filled only when empty");
        self.held = from.try_io(Interest::READABLE, || {
            Ok(splice(from, None, &self.write, None, self.capacity.min(MAX_FILL), FLAGS)?)
        })?;
        Ok(self.held)
    }

    /// Gives `to` as much as its send buffer takes, and returns the number of bytes (at least 1).
    ///
    /// The pipe must not be empty. So `WouldBlock` can only mean that `to` is full.
    pub(super) fn drain(&mut self, to: &TcpStream) -> io::Result<usize> {
        debug_assert_ne!(self.held, 0, "a pipe is drained only when it is not empty");
        let moved =
            to.try_io(Interest::WRITABLE, || Ok(splice(&self.read, None, to, None, self.held, FLAGS)?))?;
        if moved == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        // The kernel moves at most as many bytes as it was asked to.
        self.held -= moved;
        Ok(moved)
    }
}

const FLAGS: SpliceFlags = SpliceFlags::NONBLOCK.union(SpliceFlags::MOVE);

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    /// What a descriptor of this process refers to. The name of a pipe has its inode number, which
    /// the kernel does not use again.
    fn target(fd: impl std::fmt::Display) -> Option<std::path::PathBuf> {
        std::fs::read_link(format!("/proc/self/fd/{fd}")).ok()
    }

    fn open_descriptors_of(pipe: &std::path::Path) -> usize {
        std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter(|entry| target(entry.as_ref().unwrap().file_name().display()).as_deref() == Some(pipe))
            .count()
    }

    #[test]
    fn pipes_are_capped_and_closed_when_given_back() {
        let pipes = Pipes::new(2);
        let (first, second) = (pipes.take().unwrap(), pipes.take().unwrap());
        assert!(pipes.take().is_none());
        assert!(first.capacity >= MIN_SIZE, "{}", first.capacity);

        let name = target(first.read.as_raw_fd()).unwrap();
        assert_eq!(open_descriptors_of(&name), 2);
        drop(first);
        assert_eq!(open_descriptors_of(&name), 0);
        assert_eq!(pipes.left(), 1);
        assert!(pipes.take().is_some());
        drop(second);
        assert_eq!(pipes.left(), 2);
    }
}
