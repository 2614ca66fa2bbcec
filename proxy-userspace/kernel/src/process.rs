//! What a process has from its parent: descriptors, and how it takes signals.

use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// The first descriptor that a service manager passes (sd_listen_fds(3)).
const LISTEN_FDS_START: RawFd = 3;

/// Takes the `count` descriptors that a service manager has passed, with their numbers. Only the
/// first call gets descriptors, and owns them. A number at which nothing is open is named in a
/// warning. Call this before the process has opened any descriptor.
pub fn passed_descriptors(count: u32) -> Vec<(RawFd, OwnedFd)> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Vec::new();
    }
    let end = LISTEN_FDS_START.saturating_add_unsigned(count);
    (LISTEN_FDS_START..end).filter(|number| is_open(*number)).map(owned).collect()
}

fn is_open(descriptor: RawFd) -> bool {
    // SAFETY: takes numbers and touches no memory.
    let is_open = unsafe { libc::fcntl(descriptor, libc::F_GETFD) } >= 0;
    if !is_open {
        tracing::warn!(descriptor, "a socket of LISTEN_FDS is not open");
    }
    is_open
}

fn owned(descriptor: RawFd) -> (RawFd, OwnedFd) {
    // SAFETY: the descriptor is open, and the service manager has opened it for this process.
    // `passed_descriptors` gives each descriptor out once, so nothing else owns it.
    (descriptor, unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Lets SIGPIPE end the process when it writes to a pipe that nobody reads, as SIGPIPE ends other
/// programs. Rust programs start with the signal ignored.
pub fn end_with_the_reader() {
    // SAFETY: takes two numbers. The default action runs no code of this process.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}
