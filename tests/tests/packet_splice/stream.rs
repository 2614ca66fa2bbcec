//! A stream as its two peers hold it: what they send, and what each learns of the other.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use socket2::SockRef;

/// Much longer than any step takes. A test that takes longer hangs.
pub(crate) const HANG: Duration = Duration::from_secs(20);

pub(crate) struct Stream {
    pub(crate) client: TcpStream,
    pub(crate) backend: TcpStream,
    pub(crate) client_address: SocketAddr,
    pub(crate) front: SocketAddr,
    /// The proxy's address towards the endpoint.
    pub(crate) source: SocketAddr,
    pub(crate) endpoint: SocketAddr,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Backend,
}

impl Side {
    pub(crate) const BOTH: [Self; 2] = [Self::Client, Self::Backend];
}

/// What a peer learns of the other peer's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Learned {
    Fin,
    /// A reset. Also a broken pipe, which is the error for a reset after a FIN.
    Reset,
    /// The peer's own keepalives were not answered.
    TimedOut,
    Nothing,
}

impl Stream {
    pub(crate) fn new(client: TcpStream, backend: TcpStream) -> Self {
        for socket in [&client, &backend] {
            socket.set_nodelay(true).unwrap();
            socket.set_read_timeout(Some(HANG)).unwrap();
            socket.set_write_timeout(Some(HANG)).unwrap();
        }
        Self {
            client_address: client.local_addr().unwrap(),
            front: client.peer_addr().unwrap(),
            source: backend.peer_addr().unwrap(),
            endpoint: backend.local_addr().unwrap(),
            client,
            backend,
        }
    }

    /// `(local, remote)` of both connections, as the proxy's host would list them.
    pub(crate) fn proxy_tuples(&self) -> [(SocketAddr, SocketAddr); 2] {
        [(self.front, self.client_address), (self.source, self.endpoint)]
    }

    /// The sockets, the one of `side` first.
    pub(crate) fn from(self, side: Side) -> (TcpStream, TcpStream) {
        match side {
            Side::Client => (self.client, self.backend),
            Side::Backend => (self.backend, self.client),
        }
    }

    /// Sends one message each way. Returns how long both took.
    pub(crate) fn echo(&mut self) -> Duration {
        let begin = Instant::now();
        say(&mut self.client, &mut self.backend, b"a question of the client");
        say(&mut self.backend, &mut self.client, b"an answer");
        begin.elapsed()
    }

    /// Sends at least `bytes` both ways at the same time, and compares them.
    pub(crate) fn bulk(&mut self, bytes: usize) {
        transfer(&self.client, &self.backend, bytes);
    }
}

/// `from` writes `message`, and `to` must read exactly `message`.
pub(crate) fn say(from: &mut TcpStream, to: &mut TcpStream, message: &[u8]) {
    from.write_all(message).unwrap();
    let mut got = vec![0; message.len()];
    to.read_exact(&mut got).unwrap();
    assert_eq!(got, message);
}

const BLOCK: usize = 64 * 1024;

/// Bytes that depend on seed and position: parts of one random area, at distances that do not match
/// any buffer boundary.
fn block(seed: usize, index: usize) -> &'static [u8] {
    static AREA: OnceLock<Vec<u8>> = OnceLock::new();
    const SIZE: usize = 1 << 20;
    let area = AREA.get_or_init(|| {
        let mut bytes = vec![0; SIZE + BLOCK];
        SmallRng::seed_from_u64(1).fill(&mut bytes[..]);
        bytes
    });
    let at = (seed * 500_009 + index * 70_001) % SIZE;
    &area[at..at + BLOCK]
}

/// Sends at least `bytes` from `a` to `b`, and from `b` to `a`, at the same time.
fn transfer(a: &TcpStream, b: &TcpStream, bytes: usize) {
    let blocks = bytes.div_ceil(BLOCK);
    let write = |mut socket: &TcpStream, seed| {
        for index in 0..blocks {
            socket.write_all(block(seed, index)).unwrap();
        }
    };
    let read = |mut socket: &TcpStream, seed| {
        let mut got = vec![0; BLOCK];
        for index in 0..blocks {
            socket.read_exact(&mut got).unwrap_or_else(|error| panic!("after {index} blocks: {error}"));
            assert!(got == block(seed, index), "block {index} of {blocks} differs");
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| write(a, 1));
        scope.spawn(|| write(b, 2));
        scope.spawn(|| read(a, 2));
        read(b, 1);
    });
}

/// What `socket` learns within `patience` by reading. The result is `Fin` also if a reset would come
/// after the FIN.
pub(crate) fn learned(socket: &mut TcpStream, patience: Duration) -> Learned {
    let deadline = Instant::now() + patience;
    let mut buffer = vec![0; BLOCK];
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        socket.set_read_timeout(Some(left)).unwrap();
        match socket.read(&mut buffer) {
            Ok(0) => return Learned::Fin,
            Ok(_) => {}
            Err(error) => return by_error(&error),
        }
    }
}

/// What `socket` learns within `patience` by writing.
pub(crate) fn learned_by_writing(socket: &mut TcpStream, patience: Duration) -> Learned {
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        if let Err(error) = socket.write_all(b"still there?") {
            return by_error(&error);
        }
        thread::sleep(Duration::from_millis(20));
    }
    Learned::Nothing
}

fn by_error(error: &std::io::Error) -> Learned {
    match error.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Learned::Reset,
        ErrorKind::WouldBlock => Learned::Nothing,
        ErrorKind::TimedOut => Learned::TimedOut,
        _ => panic!("{error}"),
    }
}

/// Closes with a RST.
pub(crate) fn reset(socket: TcpStream) {
    SockRef::from(&socket).set_linger(Some(Duration::ZERO)).unwrap();
}

/// Closes without sending anything, like a host that loses its state.
pub(crate) fn forget(socket: TcpStream) {
    const TCP_REPAIR: libc::c_int = 19;
    let socket = OwnedFd::from(socket);
    let on: libc::c_int = 1;
    // SAFETY: the option takes an int, which lives until the call returns.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, TCP_REPAIR, (&raw const on).cast(), 4)
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

pub(crate) fn ask_upgrade(client: &mut TcpStream, host: SocketAddr) {
    let request = format!(
        "GET / HTTP/1.1\r\nHost: {host}\r\nX-Forwarded-For: 192.0.2.1\r\nConnection: Upgrade\r\n\
         Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    client.write_all(request.as_bytes()).unwrap();
}

/// Accepts a connection, reads its request and answers 101. Skips connections without a request:
/// Steer opens such a connection to learn an endpoint's MSS.
pub(crate) fn accept_upgrade(listener: &TcpListener) -> TcpStream {
    let mut backend = loop {
        let (backend, _) = listener.accept().unwrap();
        backend.set_read_timeout(Some(HANG)).unwrap();
        // A connection without a request: Steer only wanted to learn the MSS.
        if backend.peek(&mut [0]).unwrap() > 0 {
            break backend;
        }
    };
    read_head(&mut backend);
    let response = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                    Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
    backend.write_all(response.as_bytes()).unwrap();
    backend
}

/// Reads byte by byte, so that no byte after the head is taken.
pub(crate) fn read_head(socket: &mut TcpStream) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        socket.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap()
}
