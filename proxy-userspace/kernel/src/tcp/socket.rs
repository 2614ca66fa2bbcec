//! The options of a connection's socket: what all connections have in common, and what `close()`
//! sends.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};

use super::{receive, repair};

/// What both sides' connections have in common: no delay for small writes, urgent bytes stay in
/// line, and a peer that has vanished is noticed at some time (`net.ipv4.tcp_keepalive_time`). The
/// connections that a listener accepts get the listener's options.
///
/// # Errors
/// The descriptor is no TCP socket.
pub fn prepare(socket: impl AsFd) -> io::Result<()> {
    receive::prepare(&socket)?;
    let socket = SockRef::from(&socket);
    socket.set_tcp_nodelay(true)?;
    socket.set_keepalive(true)
}

/// Notices a peer that has vanished in two minutes of silence. Costs four system calls, which a
/// connection that soon ends does not need.
///
/// # Errors
/// The descriptor is no TCP socket.
pub fn watch_peer(socket: impl AsFd) -> io::Result<()> {
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(60))
        .with_interval(Duration::from_secs(15))
        .with_retries(4);
    SockRef::from(&socket).set_tcp_keepalive(&keepalive)
}

/// Lets a hand-over read the connection's send position later. [`repair::select_send_queue`] says
/// when this may be called.
pub fn prepare_for_hand_over(socket: impl AsFd) {
    // Refused without CAP_NET_ADMIN. Then no stream is spliced by packets, and nobody reads the
    // position.
    repair::select_send_queue(socket).ok();
}

/// Makes `close()` send a RST, and drop what is unsent.
pub fn reset_on_close(socket: impl AsFd) {
    // A socket that refuses the option is closed already, and sends nothing.
    SockRef::from(&socket).set_linger(Some(Duration::ZERO)).ok();
}

/// Makes `close()` send what is unsent, and a FIN after it.
pub fn finish_on_close(socket: impl AsFd) {
    // As above.
    SockRef::from(&socket).set_linger(None).ok();
}
