//! Many WebSocket-like streams at once, of which every byte is compared. An endpoint echoes.
//! Clients send messages that depend on stream and position. Most clients send about one a second,
//! and some send large ones without a pause. The machine is idle for most of the time, so that the
//! cost of a restart can be told from noise.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Much longer than any step takes. A step that takes longer hangs.
const HANG: Duration = Duration::from_secs(20);
/// The time from the echo of a message to the next message.
const PAUSE: Duration = Duration::from_secs(1);
/// One in so many streams is a fast one.
const FAST: u32 = 100;
const FAST_BYTES: usize = 64 * 1024;
const FAST_PAUSE: Duration = Duration::from_millis(50);

/// What the streams have done so far, and what they shall do next.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) opened: AtomicU32,
    pub(crate) messages: AtomicU64,
    pub(crate) bytes: AtomicU64,
    /// For each echo: when it came, and how long after its message. Without the fast streams.
    echoes: Mutex<Vec<(Instant, Duration)>>,
    pause: AtomicBool,
    stop: AtomicBool,
    pub(crate) errors: Mutex<Vec<String>>,
}

impl Traffic {
    /// For each echo since the last call: when it came, and how long after its message. Without the
    /// fast streams.
    pub(crate) fn take_echoes(&self) -> Vec<(Instant, Duration)> {
        std::mem::take(&mut *self.echoes.lock().unwrap())
    }

    /// Makes the streams pause, each after its last message has come back, until they shall close.
    pub(crate) fn pause(&self) {
        self.pause.store(true, Ordering::Relaxed);
    }

    /// Makes the streams close, each after its last message has come back.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Opens `streams` streams. Returns when they were told to stop and are closed.
    pub(crate) async fn clients(self: Arc<Self>, front: SocketAddr, streams: u32) {
        // No more handshakes at a time than fit into a backlog.
        let gate = Arc::new(Semaphore::new(64));
        let mut clients = JoinSet::new();
        for id in 0..streams {
            let (traffic, gate) = (Arc::clone(&self), Arc::clone(&gate));
            clients.spawn(async move {
                let place = gate.acquire_owned().await;
                let opened = open(front).await;
                drop(place);
                let done = match opened {
                    Ok(stream) => {
                        traffic.opened.fetch_add(1, Ordering::Relaxed);
                        traffic.exchange(stream, id).await
                    }
                    Err(error) => Err(format!("cannot be opened: {error}")),
                };
                if let Err(error) = done {
                    traffic.errors.lock().unwrap().push(format!("stream {id}: {error}"));
                }
            });
        }
        while clients.join_next().await.is_some() {}
    }

    async fn exchange(&self, mut stream: TcpStream, id: u32) -> Result<(), String> {
        let mut random = SmallRng::seed_from_u64(id.into());
        let is_fast = id.is_multiple_of(FAST);
        let mut count = 0_u64;
        let pause = if is_fast { FAST_PAUSE } else { PAUSE };
        sleep(pause.mul_f64(random.random())).await;
        while !self.is_stopped() {
            if self.pause.load(Ordering::Relaxed) {
                sleep(Duration::from_millis(20)).await;
                continue;
            }
            let mut message = vec![0; if is_fast { FAST_BYTES } else { random.random_range(16..1500) }];
            random.fill(&mut message[..]);
            message[..8].copy_from_slice(&count.to_be_bytes());
            let begin = Instant::now();
            let echoed = timeout(HANG, echo(&mut stream, &message)).await;
            let echoed = echoed.map_err(|_| format!("message {count} hangs"))?;
            let echoed = echoed.map_err(|error| format!("message {count}: {error}"))?;
            if echoed != message {
                return Err(format!("message {count} came back changed"));
            }
            let took = begin.elapsed();
            self.messages.fetch_add(1, Ordering::Relaxed);
            self.bytes.fetch_add(2 * message.len() as u64, Ordering::Relaxed);
            if !is_fast {
                self.echoes.lock().unwrap().push((begin + took, took));
            }
            count += 1;
            sleep(pause).await;
        }
        stream.shutdown().await.map_err(|error| error.to_string())?;
        let rest = timeout(HANG, stream.read(&mut [0; 16]))
            .await
            .map_err(|_| "the endpoint's FIN does not come".to_owned())?;
        match rest {
            Ok(0) => Ok(()),
            Ok(more) => Err(format!("{more} bytes too many came back")),
            Err(error) => Err(format!("at its end: {error}")),
        }
    }
}

async fn echo(stream: &mut TcpStream, message: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut echoed = vec![0; message.len()];
    let (mut read, mut write) = stream.split();
    tokio::try_join!(write.write_all(message), read.read_exact(&mut echoed))?;
    Ok(echoed)
}

/// Opens a stream, and returns when its 101 has come.
pub(crate) async fn open(front: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = if front.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    let mut stream = timeout(HANG, socket.connect(front)).await??;
    stream.set_nodelay(true)?;
    let request = format!(
        "GET / HTTP/1.1\r\nHost: {front}\r\nX-Forwarded-For: 192.0.2.1\r\nConnection: Upgrade\r\n\
         Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let head = timeout(HANG, read_head(&mut stream)).await??;
    if head.starts_with("HTTP/1.1 101 ") { Ok(stream) } else { Err(std::io::Error::other(head)) }
}

/// Answers every upgrade and then echoes, without end.
pub(crate) async fn serve(listener: TcpListener) {
    let mut streams = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        streams.spawn(serve_stream(stream));
        while streams.try_join_next().is_some() {}
    }
}

async fn serve_stream(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    // A connection without a request: Steer only wanted to learn the MSS.
    read_head(&mut stream).await?;
    let answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                  Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
    stream.write_all(answer.as_bytes()).await?;
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
pub(crate) async fn read_head(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}
