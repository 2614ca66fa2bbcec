//! Clients that count their actions and note every error: streams that echo all the time, streams
//! that come and go, and keep-alive connections with request after request. Also the endpoint of
//! all of them.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Much longer than any step takes. A step that takes longer hangs.
const HANG: Duration = Duration::from_secs(20);
/// The time between two messages of a lasting stream, and between two requests of a client.
const PAUSE: Duration = Duration::from_millis(20);
/// The number of requests on one connection.
const REQUESTS: u32 = 25;

/// How many clients of each kind there are at a time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub(crate) streams: u32,
    pub(crate) short_streams: u32,
    pub(crate) clients: u32,
}

#[derive(Debug, Default)]
pub(crate) struct Load {
    /// How many lasting streams were opened.
    pub(crate) opened: AtomicU64,
    pub(crate) messages: AtomicU64,
    pub(crate) short_streams: AtomicU64,
    pub(crate) connections: AtomicU64,
    pub(crate) requests: AtomicU64,
    /// The slowest request on a new connection since the last reading, with its handshake, in
    /// microseconds.
    slowest_us: AtomicU64,
    stop: AtomicBool,
    pub(crate) errors: Mutex<Vec<String>>,
}

impl Load {
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    pub(crate) fn take_slowest(&self) -> Duration {
        Duration::from_micros(self.slowest_us.swap(0, Ordering::Relaxed))
    }

    fn note(&self, what: &str, error: &io::Error) {
        self.errors.lock().unwrap().push(format!("{what}: {error}"));
    }

    /// Runs the clients. Returns when all have been told to stop and are closed.
    pub(crate) async fn clients(self: Arc<Self>, front: SocketAddr, size: Size) {
        let mut all = JoinSet::new();
        for id in 0..size.streams {
            let load = Arc::clone(&self);
            all.spawn(async move {
                // Spread, so that the connections fit into a backlog.
                sleep(Duration::from_millis(2) * id).await;
                if let Err(error) = load.lasting(front, id).await {
                    load.note(&format!("stream {id}"), &error);
                }
            });
        }
        for _ in 0..size.short_streams {
            let load = Arc::clone(&self);
            all.spawn(async move {
                while !load.is_stopped() {
                    match load.short(front).await {
                        Ok(()) => drop(load.short_streams.fetch_add(1, Ordering::Relaxed)),
                        Err(error) => load.note("short stream", &error),
                    }
                }
            });
        }
        for _ in 0..size.clients {
            let load = Arc::clone(&self);
            all.spawn(async move {
                while !load.is_stopped() {
                    if let Err(error) = load.requests(front).await {
                        load.note("request", &error);
                    }
                }
            });
        }
        while all.join_next().await.is_some() {}
    }

    async fn lasting(&self, front: SocketAddr, id: u32) -> io::Result<()> {
        let mut stream = open(front).await?;
        self.opened.fetch_add(1, Ordering::Relaxed);
        for count in 0_u32.. {
            if self.is_stopped() {
                break;
            }
            echo(&mut stream, id ^ count).await?;
            self.messages.fetch_add(1, Ordering::Relaxed);
            sleep(PAUSE).await;
        }
        finish(stream).await
    }

    async fn short(&self, front: SocketAddr) -> io::Result<()> {
        let mut stream = open(front).await?;
        for count in 0..5 {
            echo(&mut stream, count).await?;
            sleep(PAUSE).await;
        }
        finish(stream).await
    }

    /// Sends the requests of one connection.
    async fn requests(&self, front: SocketAddr) -> io::Result<()> {
        let begin = Instant::now();
        let mut socket = in_time(TcpStream::connect(front)).await?;
        socket.set_nodelay(true)?;
        self.connections.fetch_add(1, Ordering::Relaxed);
        for number in 0..REQUESTS {
            let request =
                format!("GET /{number} HTTP/1.1\r\nHost: {front}\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n");
            in_time(socket.write_all(request.as_bytes())).await?;
            let head = in_time(read_head(&mut socket)).await?.to_ascii_lowercase();
            if !head.starts_with("http/1.1 200 ") {
                return Err(io::Error::other(head));
            }
            let mut body = [0; 2];
            in_time(socket.read_exact(&mut body)).await?;
            self.requests.fetch_add(1, Ordering::Relaxed);
            if number == 0 {
                self.slowest_us.fetch_max(begin.elapsed().as_micros() as u64, Ordering::Relaxed);
            }
            if head.contains("\r\nconnection: close\r\n") || self.is_stopped() {
                break;
            }
            sleep(PAUSE).await;
        }
        Ok(())
    }
}

async fn in_time<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(HANG, work).await.unwrap_or_else(|_| Err(io::Error::other("hangs")))
}

/// Sends a message that depends on `seed`, and compares the echo.
pub(crate) async fn echo(stream: &mut TcpStream, seed: u32) -> io::Result<()> {
    let message: Vec<u8> = (0..200 + seed % 1000).map(|at| (seed.wrapping_mul(31) + at) as u8).collect();
    let mut echoed = vec![0; message.len()];
    in_time(stream.write_all(&message)).await?;
    in_time(stream.read_exact(&mut echoed)).await?;
    if echoed == message { Ok(()) } else { Err(io::Error::other("the message came back changed")) }
}

pub(crate) async fn finish(mut stream: TcpStream) -> io::Result<()> {
    stream.shutdown().await?;
    match in_time(stream.read(&mut [0; 16])).await? {
        0 => Ok(()),
        more => Err(io::Error::other(format!("{more} bytes too many came back"))),
    }
}

/// Opens a stream, and returns it after its 101.
pub(crate) async fn open(front: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = in_time(TcpStream::connect(front)).await?;
    stream.set_nodelay(true)?;
    let request = format!(
        "GET / HTTP/1.1\r\nHost: {front}\r\nX-Forwarded-For: 192.0.2.1\r\nConnection: Upgrade\r\n\
         Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let head = in_time(read_head(&mut stream)).await?;
    if head.starts_with("HTTP/1.1 101 ") { Ok(stream) } else { Err(io::Error::other(head)) }
}

/// Answers requests, and echoes after an upgrade, without end.
pub(crate) async fn serve(listener: TcpListener) {
    let mut streams = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        streams.spawn(serve_connection(stream));
        while streams.try_join_next().is_some() {}
    }
}

async fn serve_connection(mut stream: TcpStream) -> io::Result<()> {
    const UPGRADED: &[u8] =
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
        Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
    stream.set_nodelay(true)?;
    while !read_head(&mut stream).await?.to_ascii_lowercase().contains("\r\nupgrade:") {
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await?;
    }
    stream.write_all(UPGRADED).await?;
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            return stream.shutdown().await;
        }
        stream.write_all(&buffer[..read]).await?;
    }
}

/// Reads byte by byte, so that no byte after the head is taken.
async fn read_head(stream: &mut TcpStream) -> io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}
