//! What TCP_REPAIR tells about a connection, and closing it so that its peer does not notice.
//!
//! Everything here needs CAP_NET_ADMIN, in the user namespace that owns the socket's network
//! namespace. Numbers are sequence numbers as they stand in the segments, in host order.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

use proxy_common::reason::Reason;
use socket2::SockRef;

use super::clock;
use super::tcp_info::{self, TcpInfo};

/// Values of TCP_REPAIR and TCP_REPAIR_QUEUE (include/uapi/linux/tcp.h).
const REPAIR_ON: libc::c_int = 1;
const REPAIR_OFF_NO_WINDOW_PROBE: libc::c_int = -1;
const RECEIVE_QUEUE: libc::c_int = 1;
const SEND_QUEUE: libc::c_int = 2;

/// How much of the peer's data has been received, and how much of that is unread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadPosition {
    /// The sequence number that the socket expects next.
    pub rcv_nxt: u32,
    /// Bytes before it that its owner has not read.
    pub unread: u32,
}

/// Lets [`write_seq`] work on a socket, and on the sockets that a listener accepts. Call this
/// before `connect` or `listen`, and before SO_REUSEADDR is set: the call clears that option. (On a
/// connected socket only while nothing is unsent: an acknowledgement that comes in between would
/// mark unsent data as sent; tcp_write_xmit, 6.18.)
///
/// # Errors
/// CAP_NET_ADMIN is missing, or the kernel has no TCP_REPAIR (CONFIG_CHECKPOINT_RESTORE is not
/// needed).
pub fn select_send_queue(socket: impl AsFd) -> io::Result<()> {
    select_queue(socket.as_fd(), SEND_QUEUE)
}

/// One past the last byte that was ever put into the socket's send queue, sent or not. Works once
/// for a socket: the call then selects the receive queue, which [`rcv_nxt`] needs. Sets
/// SO_REUSEADDR again, which the kernel clears when the socket leaves repair mode. Without the
/// option, a restarted listener could not bind to the port as long as this connection exists, or is
/// in TIME_WAIT.
///
/// # Errors
/// `EINVAL` without [`select_send_queue`]; CAP_NET_ADMIN is missing.
pub fn write_seq(socket: impl AsFd) -> io::Result<u32> {
    let socket = socket.as_fd();
    let write_seq = get(socket, libc::TCP_QUEUE_SEQ)?;
    select_queue(socket, RECEIVE_QUEUE)?;
    SockRef::from(&socket).set_reuse_address(true)?;
    Ok(write_seq)
}

/// The sequence number that the socket expects next. A FIN that has been received takes one number.
///
/// # Errors
/// `EINVAL` before [`write_seq`] was called once.
pub fn rcv_nxt(socket: impl AsFd) -> io::Result<u32> {
    get(socket.as_fd(), libc::TCP_QUEUE_SEQ)
}

/// The same together with the number of unread bytes, both of the same moment. Call [`write_seq`]
/// once before.
///
/// # Errors
/// The peer has closed or reset the connection; or data came in so fast that no two looks agreed.
pub fn read_position(socket: impl AsFd) -> Result<ReadPosition, Reason> {
    const LOOKS: usize = 64;
    let socket = socket.as_fd();
    let expected = || rcv_nxt(socket).map_err(|_| Reason::RepairRefused);
    // Otherwise an urgent byte is taken out of the stream, and `unread` ends before it (tcp_inq).
    SockRef::from(&socket).set_out_of_band_inline(true).map_err(|_| Reason::StateUnreadable)?;
    for _ in 0..LOOKS {
        let before = expected()?;
        let unread = tcp_info::unread(socket).map_err(|_| Reason::StateUnreadable)?;
        if expected()? != before {
            continue;
        }
        // The state is read last: a FIN would be part of the number, but not of the unread bytes.
        let info = TcpInfo::of(socket).map_err(|_| Reason::StateUnreadable)?;
        if !info.is_established() {
            return Err(Reason::NotEstablished);
        }
        let unread = u32::try_from(unread).map_err(|_| Reason::StateUnreadable)?;
        return Ok(ReadPosition { rcv_nxt: before, unread });
    }
    Err(Reason::Busy)
}

/// What the socket adds to [`clock::monotonic_ms`] to make a TSval. Exact before Linux 6.7; since
/// then it may be one too low (the kernel clears the lowest bit of its answer), which PAWS
/// tolerates. `info` is of the same socket.
///
/// # Errors
/// The connection's timestamps are in microseconds.
pub fn timestamp_offset(socket: impl AsFd, info: &TcpInfo) -> Result<u32, Reason> {
    const LOOKS: usize = 64;
    let socket = socket.as_fd();
    if info.has_microsecond_timestamps() {
        return Err(Reason::MicrosecondTimestamps);
    }
    for _ in 0..LOOKS {
        let before = clock::monotonic_ms();
        let value = get(socket, libc::TCP_TIMESTAMP).map_err(|_| Reason::StateUnreadable)?;
        if clock::monotonic_ms() == before {
            // Timestamps count modulo 2^32.
            return Ok(value.wrapping_sub(before as u32));
        }
    }
    Err(Reason::StateUnreadable)
}

/// Closes the socket without a FIN or RST: for its peer the connection goes on. What is in its
/// queues is lost.
///
/// # Errors
/// The kernel does not take the socket into repair mode. The descriptor then stays open for the
/// life of the process, because closing it would tell the peer.
pub fn close_silently(socket: TcpStream) -> io::Result<()> {
    let entered = set(socket.as_fd(), libc::TCP_REPAIR, REPAIR_ON);
    if entered.is_err() {
        std::mem::forget(socket);
    }
    entered
}

/// Marks the packets that the socket sends from now on (SO_MARK), for the egress program.
///
/// # Errors
/// CAP_NET_ADMIN (or, since 5.17, CAP_NET_RAW) is missing.
pub fn set_mark(socket: impl AsFd, mark: u32) -> io::Result<()> {
    SockRef::from(&socket).set_mark(mark)
}

/// Offers the peer a window of at most `bytes`, until the kernel finds that the reader keeps up
/// with more.
///
/// # Errors
/// The socket is closed.
pub fn clamp_window(socket: impl AsFd, bytes: u32) -> io::Result<()> {
    set(socket.as_fd(), libc::TCP_WINDOW_CLAMP, libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX))
}

/// Enters repair mode, selects the queue, and leaves repair mode. The socket keeps everything but
/// SO_REUSEADDR.
fn select_queue(socket: BorrowedFd<'_>, queue: libc::c_int) -> io::Result<()> {
    set(socket, libc::TCP_REPAIR, REPAIR_ON)?;
    let selected = set(socket, libc::TCP_REPAIR_QUEUE, queue);
    set(socket, libc::TCP_REPAIR, REPAIR_OFF_NO_WINDOW_PROBE)?;
    selected
}

fn set(socket: BorrowedFd<'_>, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the pointer is to a parameter of the length given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn get(socket: BorrowedFd<'_>, option: libc::c_int) -> io::Result<u32> {
    let mut value = 0_u32;
    let mut len = size_of::<u32>() as libc::socklen_t;
    // SAFETY: both pointers are to locals, and `len` tells the size of the first.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, option, (&raw mut value).cast(), &raw mut len)
    };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}
