//! Holds back what arrives at a socket, so that its place in a sockmap can be changed safely.
//!
//! A socket must not leave the map of a verdict program while the kernel works on its segments: one
//! that is past TCP and then finds no program is dropped, although it was acknowledged
//! (sk_psock_verdict_recv, net/core/skmsg.c). A [`Hold`] keeps segments with payload away from TCP:
//! to the peer they are lost on the way, so it sends them again later. Nothing is lost.

use std::io;
use std::net::TcpStream;

use socket2::{SockFilter, SockRef};

use crate::grace;

/// Classic BPF over the TCP header: keeps segments without payload and RSTs, drops the others.
/// The length that a socket filter of TCP sees begins with the TCP header (tcp_filter).
const PAYLOAD_IS_DROPPED: [SockFilter; 10] = {
    const fn op(code: u32, jt: u8, jf: u8, k: u32) -> SockFilter {
        SockFilter::new(code as u16, jt, jf, k)
    }
    use libc::{
        BPF_ALU, BPF_B, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_LEN, BPF_MISC, BPF_RET, BPF_RSH, BPF_TAX,
    };
    const KEEP: u32 = u32::MAX;
    [
        // The flags: RST is kept.
        op(BPF_LD | BPF_B | libc::BPF_ABS, 0, 0, 13),
        op(BPF_JMP | BPF_JSET | BPF_K, 6, 0, 0x04),
        // Header length in bytes: the upper half of byte 12, times four.
        op(BPF_LD | BPF_B | libc::BPF_ABS, 0, 0, 12),
        op(BPF_ALU | BPF_RSH | BPF_K, 0, 0, 2),
        op(BPF_ALU | libc::BPF_AND | BPF_K, 0, 0, 0x3c),
        op(BPF_MISC | BPF_TAX, 0, 0, 0),
        op(BPF_LD | BPF_LEN, 0, 0, 0),
        op(BPF_JMP | libc::BPF_JGT | libc::BPF_X, 1, 0, 0),
        op(BPF_RET | BPF_K, 0, 0, KEEP),
        op(BPF_RET | BPF_K, 0, 0, 0),
    ]
};

/// While the value lives, no payload reaches the socket. For payload that is under way already, see
/// [`Hold::settle`].
#[derive(Debug)]
pub struct Hold<'a> {
    socket: &'a TcpStream,
}

impl<'a> Hold<'a> {
    pub fn new(socket: &'a TcpStream) -> io::Result<Self> {
        SockRef::from(socket).attach_filter(&PAYLOAD_IS_DROPPED)?;
        Ok(Self { socket })
    }

    /// Returns when the kernel is done with every segment that had passed before the hold.
    pub async fn settle(&self) -> io::Result<()> {
        // Filters run inside an RCU reader that ends when the segment has been dealt with, or left
        // in the socket's backlog ...
        tokio::task::spawn_blocking(grace::wait_for_rcu_readers).await.map_err(io::Error::other)?;
        // ... which whoever unlocks the socket works off.
        kick(self.socket)
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        if let Err(error) = SockRef::from(self.socket).detach_filter() {
            tracing::error!(%error, "cannot take the filter off a socket; its stream will stall");
        }
    }
}

/// Makes the kernel show the verdict program what has arrived at a socket, under the socket's lock.
/// Without this call the program does not see data that arrived before the program was attached
/// (tcp_set_rcvlowat calls data_ready).
pub fn kick(socket: &TcpStream) -> io::Result<()> {
    let one: libc::c_int = 1;
    // SAFETY: the pointer is to a local of the length given.
    let result = unsafe {
        libc::setsockopt(
            std::os::fd::AsRawFd::as_raw_fd(socket),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const one).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
