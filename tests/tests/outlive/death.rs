//! The process dies while a stream is being handed over.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use steer_tests::require;
use steer_tests::topology::Topology;

use crate::bed::{Bed, HANG, Kernel, endpoint, front};

/// Both peers have to learn of the end within this time.
pub(crate) const AT_ONCE: Duration = Duration::from_secs(1);

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 192.0.2.1\r\nConnection: Upgrade\r\n\
    Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
pub(crate) const ANSWER: &[u8] =
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
    Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

/// Opens a stream, and returns its two ends after the 101.
fn opened(bed: &Bed<'_>, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let mut client = bed.topology.clients.run(|| TcpStream::connect(front()).unwrap()).unwrap();
    client.write_all(REQUEST).unwrap();
    let mut backend = loop {
        let (backend, _) = listener.accept().unwrap();
        backend.set_read_timeout(Some(HANG)).unwrap();
        // A connection without a request: Steer only wanted to learn the MSS.
        if backend.peek(&mut [0]).unwrap() > 0 {
            break backend;
        }
    };
    read_head(&mut backend);
    backend.write_all(ANSWER).unwrap();
    read_head(&mut client);
    (client, backend)
}

/// A stream whose endpoint reads nothing. So the stream stays in its hand-over, with sockets, and
/// the process has bytes of the client.
fn stuck(bed: &Bed<'_>, listener: &TcpListener) -> (TcpStream, TcpStream) {
    for _ in 0..5 {
        let (mut client, backend) = opened(bed, listener);
        client.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        while client.write(&[1; 65_536]).is_ok() {}
        // Much longer than the hand-over of a stream that can be handed over.
        std::thread::sleep(Duration::from_millis(1500));
        let address = client.local_addr().unwrap().to_string();
        let row = bed.rows().into_iter().find(|row| row["client"] == address).unwrap();
        if row["path"] == "packet" && bed.spliced() < bed.rows().len() {
            return (client, backend);
        }
    }
    panic!("no stream stays in its hand-over");
}

fn read_head(socket: &mut TcpStream) {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        socket.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
}

/// How a connection ends for its peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Fin,
    Reset,
}

/// Reads until `socket` learns of an end. Returns the end, and how long that took.
fn end_after(socket: &mut TcpStream) -> (End, Duration) {
    let begin = Instant::now();
    socket.set_read_timeout(Some(HANG)).unwrap();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match socket.read(&mut buffer) {
            Ok(0) => return (End::Fin, begin.elapsed()),
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
                return (End::Reset, begin.elapsed());
            }
        }
    }
}

#[test]
fn a_stream_in_its_hand_over_is_reset_on_both_sides_when_the_process_dies() {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    for starts_again in [false, true] {
        let listener = topology.endpoints[0].run(|| TcpListener::bind(endpoint()).unwrap()).unwrap();
        let mut bed = Bed::start(&topology, &["hand_over_within: 1s"]);
        let pins = bed.pins();
        bed.steer.stop(libc::SIGTERM).unwrap();
        let before = Kernel::now(&topology, &pins);
        bed.steer.start_again().unwrap();
        let (mut client, mut backend) = stuck(&bed, &listener);
        bed.steer.stop(libc::SIGKILL).unwrap();
        if starts_again {
            bed.steer.start_again().unwrap();
        }
        for (who, socket) in [("client", &mut client), ("endpoint", &mut backend)] {
            let (end, took) = end_after(socket);
            let learns = format!("the {who} learns {end:?} after {took:?}, started again: {starts_again}");
            assert!(end == End::Reset && took < AT_ONCE, "{learns}");
        }
        if starts_again {
            bed.expect_no_stream();
            bed.steer.stop(libc::SIGTERM).unwrap();
        } else {
            bed.cli_text(&["cleanup"]);
        }
        before.expect(&topology, &pins);
    }
}
