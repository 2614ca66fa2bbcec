//! Compares what `steer-kernel` reads from TCP connections, and does to them, with what a peer sees
//! on the wire.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod capture;
mod link;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use proxy_common::packet::headers::tcp_flags;
use socket2::{Domain, SockRef, Socket, Type};
use steer_tests::require;

use capture::{Capture, Seen};
use link::Link;
use steer_kernel::tcp::raw::{RawSender, Segment};
use steer_kernel::tcp::tcp_info::{self, TcpInfo, TcpOptions};
use steer_kernel::tcp::{clock, repair};

const MOMENT: Duration = Duration::from_millis(50);

/// A connection over the link.
struct Connection {
    /// The proxy's socket, which was accepted.
    near: TcpStream,
    /// The peer's socket.
    far: TcpStream,
    /// Runs in the peer's namespace since before the handshake.
    capture: Capture,
}

impl Connection {
    fn new(link: &Link, address: IpAddr) -> Self {
        let listener = link.proxy.run(|| TcpListener::bind((address, 0)).unwrap()).unwrap();
        let to = listener.local_addr().unwrap();
        let (far, capture) = link
            .peer
            .run(|| {
                let capture = Capture::open();
                (TcpStream::connect(to).unwrap(), capture)
            })
            .unwrap();
        let (near, _) = listener.accept().unwrap();
        far.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        Self { near, far, capture }
    }

    fn send_to_near(&mut self, bytes: &[u8]) {
        self.far.write_all(bytes).unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        while tcp_info::unacknowledged(&self.far).unwrap() > 0 {
            assert!(Instant::now() < deadline);
        }
    }

    /// The segments that the proxy has sent, among those that pass within a moment.
    fn of_near(&mut self) -> Vec<Seen> {
        let near = self.near.local_addr().unwrap();
        let mut seen = self.capture.after(MOMENT);
        seen.retain(|segment| segment.source.port() == near.port());
        seen
    }
}

/// Only valid while no data is unsent.
fn write_seq(socket: &TcpStream) -> std::io::Result<u32> {
    repair::select_send_queue(socket)?;
    repair::write_seq(socket)
}

#[test]
fn positions_are_those_on_the_wire() {
    if !require::root() {
        return;
    }
    let link = Link::new();
    for address in Link::PROXY {
        let mut connection = Connection::new(&link, address);
        for round in 1..4 {
            connection.near.write_all(&vec![1; 10_000 * round]).unwrap();
            connection.far.read_exact(&mut vec![0; 10_000 * round]).unwrap();
            connection.send_to_near(&vec![2; 3000]);
            connection.near.read_exact(&mut [0; 1000]).unwrap();

            let write_seq = write_seq(&connection.near).unwrap();
            let position = repair::read_position(&connection.near).unwrap();
            let seen = connection.of_near();
            let last = seen.iter().rfind(|segment| segment.payload > 0).unwrap();
            assert_eq!(write_seq, last.end(), "{address} {round}");
            assert_eq!(position.rcv_nxt, seen.last().unwrap().ack);
            assert_eq!(position.unread, 2000 * round as u32);
            assert_eq!(u64::from(position.unread), tcp_info::unread(&connection.near).unwrap());
        }
        assert!(SockRef::from(&connection.near).reuse_address().unwrap());

        connection.far.shutdown(Shutdown::Write).unwrap();
        std::thread::sleep(MOMENT);
        let closed = repair::read_position(&connection.near).unwrap_err();
        assert_eq!(closed.as_str(), "not_established");
        let mut rest = Vec::new();
        connection.near.read_to_end(&mut rest).unwrap();
        assert_eq!(rest.len(), 6000);
    }
}

#[test]
fn positions_hold_while_data_flows() {
    if !require::root() {
        return;
    }
    let link = Link::new();
    let Connection { near, far, .. } = Connection::new(&link, Link::PROXY[0]);
    let start = write_seq(&near).unwrap();
    let base = repair::read_position(&near).unwrap();
    let total: u32 = 40_000_000;
    let sender = std::thread::spawn(move || {
        let mut far = far;
        (&far).write_all(&vec![5; total as usize]).unwrap();
        let mut echoed = [0; 3];
        far.read_exact(&mut echoed).unwrap();
    });
    let mut read = 0;
    let mut buffer = vec![0; 64 << 10];
    let mut agreed = 0;
    while read < total {
        read += (&near).read(&mut buffer).unwrap() as u32;
        // The answer "busy" is allowed.
        if let Ok(position) = repair::read_position(&near) {
            let consumed = position.rcv_nxt.wrapping_sub(position.unread);
            assert_eq!(consumed.wrapping_sub(base.rcv_nxt), read);
            agreed += 1;
        }
    }
    assert!(agreed > 10, "{agreed}");
    (&near).write_all(b"end").unwrap();
    sender.join().unwrap();
    assert_eq!(write_seq(&near).unwrap().wrapping_sub(start), 3);
}

/// A socket that selects its send queue before it is connected can be asked at any time. A listener
/// passes the selection on to the sockets that it accepts.
#[test]
fn positions_are_told_while_data_is_unsent() {
    if !require::root() {
        return;
    }
    let new = || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        repair::select_send_queue(&socket).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        socket
    };
    let listener = new();
    listener.listen(1).unwrap();
    let near = new();
    near.connect(&listener.local_addr().unwrap()).unwrap();
    let (far, _) = listener.accept().unwrap();

    far.set_nonblocking(true).unwrap();
    let mut sent = 0;
    while let Ok(written) = far.send(&[3; 64 << 10]) {
        sent += written as u32;
    }
    assert!(TcpInfo::of(&far).unwrap().unsent() > 0);
    let written = repair::write_seq(&far).unwrap();
    let begin = written.wrapping_sub(sent);
    assert_eq!(repair::write_seq(&near).unwrap(), repair::rcv_nxt(&far).unwrap());
    let position = repair::read_position(&near).unwrap();
    assert_eq!(position.rcv_nxt.wrapping_sub(position.unread), begin);
    far.shutdown(Shutdown::Write).unwrap();
    assert_eq!((&near).read_to_end(&mut Vec::new()).unwrap(), sent as usize);
    assert_eq!(repair::rcv_nxt(&near).unwrap(), written.wrapping_add(1));
}

/// An urgent byte is read in its place like any other byte, also if it was unread for a while.
#[test]
fn urgent_data_stays_in_line() {
    if !require::root() {
        return;
    }
    let link = Link::new();
    let mut connection = Connection::new(&link, Link::PROXY[0]);
    write_seq(&connection.near).unwrap();
    let before = repair::read_position(&connection.near).unwrap();
    connection.send_to_near(b"abc");
    SockRef::from(&connection.far).send_out_of_band(b"!").unwrap();
    connection.send_to_near(b"def");
    let position = repair::read_position(&connection.near).unwrap();
    assert_eq!(position.unread, 7);
    assert_eq!(position.rcv_nxt.wrapping_sub(before.rcv_nxt), 7);
    let mut bytes = [0; 7];
    connection.near.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"abc!def");
}

#[test]
fn a_silent_close_is_not_noticed() {
    if !require::root() {
        return;
    }
    let link = Link::new();
    for address in Link::PROXY {
        let mut connection = Connection::new(&link, address);
        connection.send_to_near(b"never read");
        connection.near.write_all(b"read").unwrap();
        connection.far.read_exact(&mut [0; 4]).unwrap();
        connection.capture.after(MOMENT);

        let Connection { near, mut far, mut capture } = connection;
        repair::close_silently(near).unwrap();
        assert_eq!(capture.after(Duration::from_millis(400)), []);
        far.set_read_timeout(Some(MOMENT)).unwrap();
        assert_eq!(far.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
        assert!(TcpInfo::of(&far).unwrap().is_established());
        // Without the splice, a closed connection ends like this.
        far.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        far.write_all(b"x").unwrap();
        assert_eq!(far.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}

#[test]
fn timestamp_offsets_are_those_on_the_wire() {
    if !require::root() {
        return;
    }
    let link = Link::new();
    for _ in 0..20 {
        let mut connection = Connection::new(&link, Link::PROXY[0]);
        connection.of_near();
        let offset =
            repair::timestamp_offset(&connection.near, &TcpInfo::of(&connection.near).unwrap()).unwrap();
        let before = clock::monotonic_ms() as u32;
        connection.near.write_all(b"now").unwrap();
        let after = clock::monotonic_ms() as u32;
        let seen = connection.of_near();
        let (value, _) = seen[0].timestamps.unwrap();
        // The timestamp is exact, or one too low.
        let sent = value.wrapping_sub(offset);
        assert!(sent.wrapping_sub(before) <= after - before + 1, "{sent} is not in {before}..={after}");
    }
}

#[test]
fn microsecond_timestamps_are_refused() {
    if !require::root() {
        return;
    }
    let link = Link::new();
    let connection = Connection::new(&link, Link::PROXY[0]);
    assert!(!TcpInfo::of(&connection.near).unwrap().has_microsecond_timestamps());
    set_odd_timestamp(&connection.near);
    let refused =
        repair::timestamp_offset(&connection.near, &TcpInfo::of(&connection.near).unwrap()).unwrap_err();
    assert_eq!(refused.as_str(), "microsecond_timestamps");
}

/// An odd value in repair mode makes the kernel (6.7) count microseconds.
fn set_odd_timestamp(socket: &TcpStream) {
    use std::os::fd::AsRawFd as _;
    for (option, value) in [(libc::TCP_REPAIR, 1), (libc::TCP_TIMESTAMP, 1), (libc::TCP_REPAIR, -1)] {
        // SAFETY: the pointer and the length are those of a local variable.
        let result = unsafe {
            libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, option, (&raw const value).cast(), 4)
        };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }
}

#[test]
fn negotiated_options_are_read() {
    if !require::root() {
        return;
    }
    let all = TcpOptions { timestamps: true, sack: true, window_scale: true, ecn: false };
    let link = Link::new();
    let info = |link: &Link| TcpInfo::of(&Connection::new(link, Link::PROXY[0]).near).unwrap();
    let default = info(&link);
    assert_eq!(default.options(), all);
    assert_eq!((default.announced_mss(), default.send_mss(), default.unsent()), (1460, 1448, 0));
    assert!((1..=14).contains(&default.send_scale()) && (1..=14).contains(&default.receive_scale()));

    link.set(&link.peer, "ipv4/tcp_timestamps", "0");
    assert_eq!(info(&link).options(), TcpOptions { timestamps: false, ..all });
    assert_eq!((info(&link).announced_mss(), info(&link).send_mss()), (1460, 1460));
    link.set(&link.peer, "ipv4/tcp_sack", "0");
    link.set(&link.peer, "ipv4/tcp_ecn", "1");
    link.set(&link.peer, "ipv4/tcp_rmem", "4096 131072 65536");
    let options = info(&link);
    assert_eq!(options.options(), TcpOptions { timestamps: false, sack: false, ecn: true, ..all });
    // The peer's smaller buffers need a smaller scale. The proxy's own scale does not change.
    assert!(options.send_scale() < default.send_scale());
    assert_eq!(options.receive_scale(), default.receive_scale());
    link.set(&link.peer, "ipv4/tcp_window_scaling", "0");
    let unscaled = info(&link);
    assert!(!unscaled.options().window_scale);
    assert_eq!((unscaled.send_scale(), unscaled.receive_scale()), (0, 0));
}

#[test]
fn a_crafted_reset_is_believed_by_the_peer() {
    if !require::root() {
        return;
    }
    let link = Link::new();
    let sender = link.proxy.run(|| RawSender::new().unwrap()).unwrap();
    for address in Link::PROXY {
        for timestamps in [None, Some((1, 2))] {
            let mut connection = Connection::new(&link, address);
            write_seq(&connection.near).unwrap();
            let segment = Segment {
                source: connection.near.local_addr().unwrap(),
                destination: connection.near.peer_addr().unwrap(),
                seq: write_seq(&connection.near).unwrap(),
                ack: repair::rcv_nxt(&connection.near).unwrap(),
                flags: tcp_flags::RST,
                window: 0,
                timestamps,
            };
            sender.send(Segment { seq: segment.seq.wrapping_sub(1), ..segment }).unwrap();
            connection.far.set_read_timeout(Some(MOMENT)).unwrap();
            assert_eq!(connection.far.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
            sender.send(segment).unwrap();
            connection.far.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            assert_eq!(connection.far.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
            let seen = connection.of_near();
            let sent =
                seen.iter().find(|seen| seen.seq == segment.seq && seen.flags == tcp_flags::RST).unwrap();
            assert_eq!((sent.ack, sent.timestamps), (segment.ack, timestamps));
        }
    }
}
