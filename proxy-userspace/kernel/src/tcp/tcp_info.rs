//! TCP's own counters of a socket (`TCP_INFO`, include/uapi/linux/tcp.h).

use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsFd, AsRawFd as _};
use std::time::Duration;

use proxy_common::packet::options::TimestampsOption;
use proxy_common::reason::Reason;

/// The head of the kernel's `struct tcp_info`. [`REQUIRED`] bytes of it are there since Linux 4.6,
/// `snd_wnd` since 5.4.
#[repr(C)]
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
struct RawTcpInfo {
    state: u8,
    ca_state_to_backoff: [u8; 4],
    options: u8,
    /// The scale of the peer's windows in the lower half, that of ours in the upper one (on a
    /// little-endian machine).
    scales: u8,
    flags: u8,
    rto: u32,
    ato: u32,
    snd_mss: u32,
    rcv_mss: u32,
    unacked: u32,
    sacked_to_fackets: [u32; 4],
    last_data_sent: u32,
    last_ack_sent: u32,
    last_data_recv: u32,
    last_ack_recv: u32,
    pmtu_to_snd_cwnd: [u32; 6],
    advmss: u32,
    reordering_to_total_retrans: [u32; 4],
    pacing_rate: u64,
    max_pacing_rate: u64,
    bytes_acked: u64,
    bytes_received: u64,
    segs_out: u32,
    segs_in: u32,
    notsent_bytes: u32,
    min_rtt: u32,
    data_segs_in_to_rcv_ooopack: [u32; 19],
    snd_wnd: u32,
}

const REQUIRED: usize = offset_of!(RawTcpInfo, data_segs_in_to_rcv_ooopack);

const _: () = {
    assert!(offset_of!(RawTcpInfo, options) == 5);
    assert!(offset_of!(RawTcpInfo, scales) == 6);
    assert!(offset_of!(RawTcpInfo, unacked) == 24);
    assert!(offset_of!(RawTcpInfo, last_data_recv) == 52);
    assert!(offset_of!(RawTcpInfo, advmss) == 84);
    assert!(offset_of!(RawTcpInfo, pacing_rate) == 104);
    assert!(offset_of!(RawTcpInfo, bytes_acked) == 120);
    assert!(offset_of!(RawTcpInfo, bytes_received) == 128);
    assert!(offset_of!(RawTcpInfo, notsent_bytes) == 144);
    assert!(REQUIRED == 152);
    assert!(offset_of!(RawTcpInfo, snd_wnd) == 228);
    assert!(size_of::<RawTcpInfo>() == 232);
};

/// `enum` of include/net/tcp_states.h.
const TCP_ESTABLISHED: u8 = 1;
const TCP_TIME_WAIT: u8 = 6;
const TCP_CLOSE: u8 = 7;
const TCP_CLOSE_WAIT: u8 = 8;
const TCP_LAST_ACK: u8 = 9;
const TCP_CLOSING: u8 = 11;

/// Bits of `tcpi_options`.
const TCPI_OPT_TIMESTAMPS: u8 = 1;
const TCPI_OPT_SACK: u8 = 2;
const TCPI_OPT_WSCALE: u8 = 4;
const TCPI_OPT_ECN: u8 = 8;
/// Microsecond timestamps exist since Linux 6.7.
const TCPI_OPT_USEC_TS: u8 = 64;

/// Bytes that timestamps take of each segment of a connection that has them, with the two NOPs
/// before them.
pub const TIMESTAMP_BYTES: u32 = size_of::<TimestampsOption>() as u32;

/// What both ends of a connection agreed on in its handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TcpOptions {
    /// RFC 7323, like the window scale.
    pub timestamps: bool,
    pub sack: bool,
    /// Whether windows are scaled. If not, both scales are 0.
    pub window_scale: bool,
    /// RFC 3168.
    pub ecn: bool,
}

/// Counters of one moment, taken under the socket's lock. Only the state may be older than the
/// counters, since the kernel reads the state before it takes the lock (tcp_get_info, 6.18).
#[derive(Clone, Copy)]
pub struct TcpInfo(RawTcpInfo);

impl TcpInfo {
    /// # Errors
    /// The descriptor is no TCP socket, or the kernel is older than 4.6.
    pub fn of(socket: impl AsFd) -> io::Result<Self> {
        let mut raw = RawTcpInfo::default();
        let mut len = size_of::<RawTcpInfo>() as libc::socklen_t;
        // SAFETY: both pointers are to locals of the size that `len` tells; the kernel writes at
        // most `len` bytes, and any bytes are a `RawTcpInfo`.
        let result = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                (&raw mut raw).cast(),
                &raw mut len,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        if (len as usize) < REQUIRED {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel's TCP_INFO is too short"));
        }
        Ok(Self(raw))
    }

    /// Neither side has finished, as far as this one knows.
    pub fn is_established(&self) -> bool {
        self.0.state == TCP_ESTABLISHED
    }

    /// Both directions are finished, or the connection was reset.
    pub fn is_closed(&self) -> bool {
        self.0.state == TCP_CLOSE
    }

    /// Payload bytes received in order, read or not. One too many if the kernel handles the peer's
    /// FIN at this moment, because the state is older.
    pub fn received(&self) -> u64 {
        // The FIN takes a place in the sequence and counts as a byte. (A reset connection is closed
        // without a FIN. What it has received does not matter any more.)
        let fin =
            matches!(self.0.state, TCP_TIME_WAIT | TCP_CLOSE | TCP_CLOSE_WAIT | TCP_LAST_ACK | TCP_CLOSING);
        self.0.bytes_received.saturating_sub(u64::from(fin))
    }

    /// Payload bytes received in order, and one for the peer's FIN if it has come.
    pub fn received_with_fin(&self) -> u64 {
        self.0.bytes_received
    }

    /// The options of the handshake.
    pub fn options(&self) -> TcpOptions {
        let has = |bit| self.0.options & bit != 0;
        TcpOptions {
            timestamps: has(TCPI_OPT_TIMESTAMPS),
            sack: has(TCPI_OPT_SACK),
            window_scale: has(TCPI_OPT_WSCALE),
            ecn: has(TCPI_OPT_ECN),
        }
    }

    /// Whether TSvals count microseconds (a property of the route, since Linux 6.7).
    pub fn has_microsecond_timestamps(&self) -> bool {
        self.0.options & TCPI_OPT_USEC_TS != 0
    }

    /// By how many bits the windows that the peer announces are to be shifted, 0 to 14.
    pub fn send_scale(&self) -> u8 {
        let [send, _] = self.scales();
        send
    }

    /// By how many bits the windows that we announce are to be shifted, 0 to 14.
    pub fn receive_scale(&self) -> u8 {
        let [_, receive] = self.scales();
        receive
    }

    /// Two bit fields of C. A big-endian machine has them in the other order.
    fn scales(&self) -> [u8; 2] {
        let (low, high) = (self.0.scales & 0xf, self.0.scales >> 4);
        if cfg!(target_endian = "little") { [low, high] } else { [high, low] }
    }

    /// The window that the peer offers, in bytes; 0 also on kernels before 5.4.
    pub fn send_window(&self) -> u32 {
        self.0.snd_wnd
    }

    /// The maximum segment size that we have announced to the peer, in bytes without any options.
    pub fn announced_mss(&self) -> u32 {
        // The kernel has taken the timestamps' bytes off (tcp_rcv_state_process, 6.18).
        self.0.advmss + if self.options().timestamps { TIMESTAMP_BYTES } else { 0 }
    }

    /// Payload bytes of the largest segment that we send: what the peer has announced, or less if
    /// the path has a smaller MTU, without the bytes of the timestamp option.
    pub fn send_mss(&self) -> u32 {
        self.0.snd_mss
    }

    /// Bytes in the send queue that were never sent (tcpi_notsent_bytes).
    pub fn unsent(&self) -> u32 {
        self.0.notsent_bytes
    }

    /// The shortest round trip that was measured; zero if none was.
    pub fn min_rtt(&self) -> Duration {
        const UNKNOWN: u32 = u32::MAX;
        match self.0.min_rtt {
            UNKNOWN => Duration::ZERO,
            microseconds => Duration::from_micros(microseconds.into()),
        }
    }

    /// Whether everything in the send queue was sent and acknowledged.
    pub fn send_queue_is_empty(&self) -> bool {
        self.0.unacked == 0 && self.0.notsent_bytes == 0
    }

    /// The time since the last segment with payload came in.
    pub fn since_last_data(&self) -> Duration {
        Duration::from_millis(self.0.last_data_recv.into())
    }
}

/// Bytes that were put into the send queue in the socket's life, sent or not, and counted from an
/// arbitrary start (0 or 1): for comparing two looks at one socket. Never too large, and exact
/// while no acknowledgement comes in. A FIN counts as a byte.
///
/// Not `bytes_sent - bytes_retrans + notsent_bytes`: a segment that the outgoing device refuses
/// counts as sent there, and once more when it really is (__tcp_transmit_skb, 6.18).
pub fn queued(socket: impl AsFd) -> io::Result<u64> {
    const LOOKS: usize = 8;
    let socket = socket.as_fd();
    let mut acked = TcpInfo::of(socket)?.0.bytes_acked;
    let mut queued = 0;
    for _ in 0..LOOKS {
        // What is acknowledged between the two looks is missing from the sum.
        queued = acked + unacknowledged(socket)?;
        let before = std::mem::replace(&mut acked, TcpInfo::of(socket)?.0.bytes_acked);
        if before == acked {
            break;
        }
    }
    Ok(queued)
}

/// Bytes in the send queue: from the first that is not acknowledged to the last that was put there.
/// A FIN counts as one.
///
/// # Errors
/// The descriptor is no TCP socket, or one that listens.
pub fn unacknowledged(socket: impl AsFd) -> io::Result<u64> {
    queue_length(socket, libc::TIOCOUTQ)
}

/// Bytes received in order that nobody has read. Not for a socket in a sockmap, where some kernels
/// (6.6.128+, 6.12.75+, 6.18.14+) always answer 0.
///
/// # Errors
/// The descriptor is no TCP socket, or one that listens.
pub fn unread(socket: impl AsFd) -> io::Result<u64> {
    queue_length(socket, libc::FIONREAD)
}

/// `request` is one of TCP's `ioctl`s that answer with the length of a queue (tcp_ioctl).
fn queue_length(socket: impl AsFd, request: libc::Ioctl) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: these requests write one int to the pointer, which is to a local.
    if unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), request, &raw mut bytes) } != 0 {
        return Err(io::Error::last_os_error());
    }
    u64::try_from(bytes).map_err(io::Error::other)
}

/// Bytes of an established socket that have been read so far. Not for a socket in a sockmap.
///
/// # Errors
/// Its peer has closed it already, or data came in so fast that no two looks agreed.
pub fn bytes_read(socket: impl AsFd) -> Result<u64, Reason> {
    const LOOKS: usize = 16;
    let socket = socket.as_fd();
    let look = || TcpInfo::of(socket).map_err(|_| Reason::StateUnreadable);
    for _ in 0..LOOKS {
        let before = look()?;
        let unread = unread(socket).map_err(|_| Reason::StateUnreadable)?;
        let after = look()?;
        if !after.is_established() {
            return Err(Reason::NotEstablished);
        }
        if before.received() == after.received() {
            return before.received().checked_sub(unread).ok_or(Reason::StateUnreadable);
        }
    }
    Err(Reason::Busy)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{Shutdown, TcpListener, TcpStream};

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    #[test]
    fn counts_what_was_sent_received_and_read() {
        let (mut near, mut far) = pair();
        let before = queued(&near).unwrap();
        near.write_all(&[1; 1000]).unwrap();
        far.read_exact(&mut [0; 400]).unwrap();
        assert_eq!(queued(&near).unwrap() - before, 1000);
        assert_eq!(TcpInfo::of(&far).unwrap().received(), 1000);
        assert_eq!(bytes_read(&far), Ok(400));
        assert!(TcpInfo::of(&far).unwrap().since_last_data() < Duration::from_secs(10));
    }

    #[test]
    fn a_fin_is_not_a_byte() {
        let (mut near, mut far) = pair();
        near.write_all(b"last").unwrap();
        near.shutdown(Shutdown::Write).unwrap();
        far.read_to_end(&mut Vec::new()).unwrap();
        assert_eq!(TcpInfo::of(&far).unwrap().received(), 4);
        assert_eq!(bytes_read(&far), Err(Reason::NotEstablished));
        // Closed by both: the other end is in TIME_WAIT, or rather its socket is closed.
        far.shutdown(Shutdown::Write).unwrap();
        near.read_to_end(&mut Vec::new()).unwrap();
        assert_eq!(TcpInfo::of(&near).unwrap().received(), 0);
    }

    /// Once its error was taken, the state and epoll tell a reset like an orderly end.
    #[test]
    fn a_fin_takes_a_place_in_the_sequence_and_a_reset_does_not() {
        for (reset, expected) in [(false, 5), (true, 4)] {
            let (mut near, far) = pair();
            near.write_all(b"last").unwrap();
            if reset {
                socket2::SockRef::from(&near).set_linger(Some(Duration::ZERO)).unwrap();
            }
            drop(near);
            assert_eq!(far.take_error().unwrap().is_some(), reset);
            assert_eq!(TcpInfo::of(&far).unwrap().received_with_fin(), expected);
        }
    }

    #[test]
    fn unsent_bytes_are_queued_too() {
        let (near, far) = pair();
        near.set_nonblocking(true).unwrap();
        let before = queued(&near).unwrap();
        let mut sent = 0;
        while let Ok(n) = (&near).write(&[7; 65536]) {
            sent += n as u64;
        }
        let info = TcpInfo::of(&near).unwrap();
        assert_eq!(queued(&near).unwrap() - before, sent);
        assert!(!info.send_queue_is_empty());
        drop(far);
    }

    #[test]
    fn other_descriptors_are_refused() {
        assert!(TcpInfo::of(io::stdin()).is_err());
    }
}
