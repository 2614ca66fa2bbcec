//! Notifies systemd, and takes sockets from systemd: sd_notify(3) and sd_listen_fds(3).
//!
//! The crate `sd-notify` (0.5) is not used: it accepts no abstract address in NOTIFY_SOCKET, and
//! takes no socket of LISTEN_FDS at all if one of them is not open.

use std::env;
use std::io;
use std::net::TcpListener;
use std::os::fd::{OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::AddressFamily;
use rustix::net::sockopt::{socket_acceptconn, socket_domain};
use steer_kernel::process;
use steer_kernel::tcp::clock;

/// The environment variables that describe the passed sockets. The children of the process must not
/// get these variables.
pub(crate) const LISTEN_VARIABLES: [&str; 3] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// The states that the service manager is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Ready,
    /// Another process is about to take over.
    Reloading,
    /// The process with this id has taken over, and is the service now.
    TakenOver {
        pid: i32,
    },
    Stopping,
}

/// Tells the service manager the state, if there is a service manager.
pub(crate) fn notify(state: State) {
    let Some(address) = env::var_os("NOTIFY_SOCKET") else { return };
    let sent = address_of(address.as_encoded_bytes())
        .and_then(|address| UnixDatagram::unbound()?.send_to_addr(text(state).as_bytes(), &address));
    if let Err(error) = sent {
        tracing::warn!(%error, "cannot tell the service manager (NOTIFY_SOCKET)");
    }
}

fn text(state: State) -> String {
    match state {
        State::Ready => "READY=1".to_owned(),
        // The manager waits for a READY=1 that is sent after this time: that is the end of the
        // reload.
        State::Reloading => format!("RELOADING=1\nMONOTONIC_USEC={}", clock::monotonic_ns() / 1000),
        State::TakenOver { pid } => format!("MAINPID={pid}\nREADY=1"),
        State::Stopping => "STOPPING=1".to_owned(),
    }
}

/// A path, or `@` and the name of an abstract socket.
fn address_of(address: &[u8]) -> io::Result<SocketAddr> {
    match address.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(std::path::Path::new(
            std::str::from_utf8(address).map_err(|_| io::ErrorKind::InvalidInput)?,
        )),
    }
}

/// The listening TCP sockets that the service manager has passed to this process. A warning names
/// each other socket. To be called once, before the process has opened any descriptor.
pub(crate) fn listen_fds() -> Vec<TcpListener> {
    let number = |name| env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Vec::new();
    }
    let passed = process::passed_descriptors(number("LISTEN_FDS").unwrap_or(0));
    passed.into_iter().filter_map(|(descriptor, socket)| listener(descriptor, socket)).collect()
}

fn listener(descriptor: RawFd, socket: OwnedFd) -> Option<TcpListener> {
    let listens = fcntl_setfd(&socket, FdFlags::CLOEXEC).and_then(|()| {
        let is_inet = matches!(socket_domain(&socket)?, AddressFamily::INET | AddressFamily::INET6);
        Ok(is_inet && socket_acceptconn(&socket)?)
    });
    match listens {
        Ok(true) => Some(socket.into()),
        Ok(false) | Err(_) => {
            tracing::warn!(descriptor, "a socket of LISTEN_FDS is not a listening TCP socket, and is closed");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_those_of_the_manual() {
        assert_eq!(text(State::Ready), "READY=1");
        assert_eq!(text(State::TakenOver { pid: 7 }), "MAINPID=7\nREADY=1");
        let reloading = text(State::Reloading);
        let micros = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
        assert!(micros.parse::<u64>().unwrap() > 0);
    }

    #[test]
    fn both_kinds_of_addresses_are_read() {
        assert_eq!(address_of(b"/run/n").unwrap().as_pathname().unwrap().to_str(), Some("/run/n"));
        assert_eq!(address_of(b"@n").unwrap().as_abstract_name(), Some(&b"n"[..]));
    }
}
