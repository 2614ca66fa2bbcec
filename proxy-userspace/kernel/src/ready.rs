//! Descriptors that a tokio runtime waits for.

use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers the descriptor with the current runtime. The descriptor must be non-blocking.
///
/// # Errors
///
/// If the runtime's epoll refuses it.
pub fn descriptor(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` always gives the same descriptor, and closes it when dropped.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, interest) }?)
}

/// [`descriptor`], for a socket that listens: ready when there is somebody to accept. Several
/// runtimes may wait for the same socket.
///
/// # Errors
///
/// If the runtime's epoll refuses it.
pub fn listener(listener: Arc<TcpListener>) -> io::Result<AsyncFd<Arc<TcpListener>>> {
    // SAFETY: a listening socket has one descriptor, which is open until the last owner of the
    // socket drops it.
    Ok(unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) }?)
}
