//! Streams of which the test holds both ends. Each end writes bytes that depend on stream and
//! position, compares the bytes that it reads, and notes when and how it learns of the stream's
//! end.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::time::{sleep, timeout};

use crate::bed::HANG;
use crate::traffic::read_head;

/// A prime number, so that the loss of a power of two of bytes is noticed.
const PERIOD: usize = 65_521;
const CHUNK: usize = 16 * 1024;
/// How often an end that does not read checks whether the stream has ended.
const LOOK: Duration = Duration::from_millis(20);

/// What an end does until it is told to stop. Then it stops writing, and reads the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Writes {
    Nothing,
    /// A few bytes every two milliseconds.
    Messages,
    Bulk,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Does {
    reads: bool,
    writes: Writes,
}

/// What the client and the endpoint of a stream do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    Quiet,
    /// Messages both ways.
    Talk,
    /// Bulk both ways.
    Flow,
    /// The client only writes, the endpoint only reads.
    Up,
    /// The reverse.
    Down,
    /// The client only writes, the endpoint neither reads nor writes.
    Stuck,
}

impl Kind {
    pub(crate) const ALL: [Self; 6] =
        [Self::Quiet, Self::Talk, Self::Flow, Self::Up, Self::Down, Self::Stuck];

    /// What each end does, the client first.
    fn sides(self) -> [Does; 2] {
        let does = |reads, writes| Does { reads, writes };
        match self {
            Self::Quiet => [does(true, Writes::Nothing); 2],
            Self::Talk => [does(true, Writes::Messages); 2],
            Self::Flow => [does(true, Writes::Bulk); 2],
            Self::Up => [does(false, Writes::Bulk), does(true, Writes::Nothing)],
            Self::Down => [does(true, Writes::Nothing), does(false, Writes::Bulk)],
            Self::Stuck => [does(false, Writes::Bulk), does(false, Writes::Nothing)],
        }
    }
}

/// How an end learns that the stream has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// A FIN after so many bytes.
    Fin(u64),
    Reset,
}

/// One end of a stream.
#[derive(Debug, Default)]
pub(crate) struct Side {
    /// The number of bytes that were given to the socket.
    sent: AtomicU64,
    ended: Mutex<Option<(End, Instant)>>,
    wrong: Mutex<Option<String>>,
}

impl Side {
    pub(crate) fn ended(&self) -> Option<(End, Instant)> {
        *self.ended.lock().unwrap()
    }

    fn end(&self, end: End) {
        self.ended.lock().unwrap().get_or_insert((end, Instant::now()));
    }

    fn wrong(&self, what: String) {
        self.wrong.lock().unwrap().get_or_insert(what);
    }
}

#[derive(Debug)]
pub(crate) struct Pair {
    id: u32,
    pub(crate) kind: Kind,
    /// The client's address.
    pub(crate) address: SocketAddr,
    stop: AtomicBool,
    /// Whether the client has received its 101.
    opened: AtomicBool,
    /// Whether the endpoint has sent the 101.
    accepted: AtomicBool,
    /// The two ends, the client first.
    pub(crate) sides: [Side; 2],
}

impl Pair {
    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// The ends that have begun: the client, and the endpoint once it has accepted.
    pub(crate) fn begun(&self) -> impl Iterator<Item = (&'static str, &Side)> {
        let begun = [true, self.accepted.load(Ordering::Acquire)];
        let named = ["client", "endpoint"].into_iter().zip(&self.sides);
        named.zip(begun).filter_map(|(side, begun)| begun.then_some(side))
    }

    pub(crate) fn is_open(&self) -> bool {
        self.opened.load(Ordering::Acquire)
    }

    /// Makes both ends stop writing. The stream is intact if each end then reads everything that
    /// the other end has written, and its FIN.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether every byte and both FINs have arrived after [`stop`](Self::stop). `None` while that
    /// is not known.
    pub(crate) fn is_intact(&self) -> Option<bool> {
        let [client, endpoint] = &self.sides;
        let (client_end, endpoint_end) = (client.ended()?.0, endpoint.ended()?.0);
        let whole = |end, from: &Side| end == End::Fin(from.sent.load(Ordering::Acquire));
        Some(whole(client_end, endpoint) && whole(endpoint_end, client))
    }

    /// The first wrong byte, if there was one.
    pub(crate) fn wrong(&self) -> Option<String> {
        self.sides.iter().find_map(|side| side.wrong.lock().unwrap().clone())
    }
}

/// Streams that run in their own runtime, so that the test's thread may block.
pub(crate) struct Pairs {
    runtime: Handle,
    all: Arc<Mutex<HashMap<u32, Arc<Pair>>>>,
    next: u32,
}

impl Pairs {
    pub(crate) fn new(runtime: &Handle) -> Self {
        Self { runtime: runtime.clone(), all: Arc::default(), next: 0 }
    }

    /// Starts an endpoint that answers on `listener`.
    pub(crate) fn serve(&self, listener: std::net::TcpListener) {
        listener.set_nonblocking(true).unwrap();
        let all = Arc::clone(&self.all);
        self.runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let all = Arc::clone(&all);
                // Steer may only have wanted to learn the MSS, or may have died.
                tokio::spawn(async move { drop(endpoint(stream, &all).await) });
            }
        });
    }

    /// Begins a stream.
    pub(crate) fn open(&mut self, kind: Kind, stream: std::net::TcpStream) -> Arc<Pair> {
        let pair = Arc::new(Pair {
            id: self.next,
            kind,
            address: stream.local_addr().unwrap(),
            stop: AtomicBool::new(false),
            opened: AtomicBool::new(false),
            accepted: AtomicBool::new(false),
            sides: Default::default(),
        });
        self.next += 1;
        self.all.lock().unwrap().insert(pair.id, Arc::clone(&pair));
        let of_client = Arc::clone(&pair);
        stream.set_nonblocking(true).unwrap();
        self.runtime.spawn(async move {
            if client(stream, &of_client).await.is_err() {
                of_client.sides[0].end(End::Reset);
            }
        });
        pair
    }

    pub(crate) fn forget(&self, pairs: &[Arc<Pair>]) {
        pairs.iter().for_each(|pair| drop(self.all.lock().unwrap().remove(&pair.id)));
    }
}

async fn client(stream: std::net::TcpStream, pair: &Pair) -> io::Result<()> {
    let mut stream = TcpStream::from_std(stream)?;
    stream.set_nodelay(true)?;
    let request = format!(
        "GET /{} HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 192.0.2.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        pair.id
    );
    stream.write_all(request.as_bytes()).await?;
    let head = timeout(HANG, read_head(&mut stream)).await??;
    if !head.starts_with("HTTP/1.1 101 ") {
        return Err(io::Error::other(head));
    }
    pair.opened.store(true, Ordering::Release);
    run(stream, pair, 0).await;
    Ok(())
}

async fn endpoint(mut stream: TcpStream, all: &Mutex<HashMap<u32, Arc<Pair>>>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let head = read_head(&mut stream).await?;
    let id = head.split([' ', '/']).nth(2).and_then(|id| id.parse().ok());
    let pair = id.and_then(|id: u32| all.lock().unwrap().get(&id).cloned());
    let pair = pair.ok_or_else(|| io::Error::other(head))?;
    pair.accepted.store(true, Ordering::Release);
    match stream.write_all(crate::death::ANSWER).await {
        Ok(()) => run(stream, &pair, 1).await,
        Err(_) => pair.sides[1].end(End::Reset),
    }
    Ok(())
}

/// Runs one end until it knows that the stream has ended and, if it was stopped, has written
/// everything.
async fn run(mut stream: TcpStream, pair: &Pair, index: usize) {
    let (side, does) = (&pair.sides[index], pair.kind.sides()[index]);
    let seed = |index: usize| u64::from(pair.id) << 1 | index as u64;
    let (incoming, outgoing) = (pattern(seed(1 - index)), pattern(seed(index)));
    let (reader, writer) = stream.split();
    let done = tokio::try_join!(
        read(reader, pair, side, does, &incoming),
        write(writer, pair, side, does.writes, &outgoing)
    );
    if done.is_err() {
        side.end(End::Reset);
    }
}

fn pattern(seed: u64) -> Vec<u8> {
    // The pattern stands there twice, so that a chunk can begin at any position.
    let mut pattern = vec![0; PERIOD];
    SmallRng::seed_from_u64(seed).fill(&mut pattern[..]);
    pattern.extend_from_within(..);
    pattern
}

fn expected(pattern: &[u8], position: u64, len: usize) -> &[u8] {
    let from = (position % PERIOD as u64) as usize;
    &pattern[from..from + len]
}

/// Reads until the FIN.
async fn read(
    mut reader: ReadHalf<'_>,
    pair: &Pair,
    side: &Side,
    does: Does,
    pattern: &[u8],
) -> io::Result<()> {
    while !does.reads && !pair.is_stopped() {
        sleep(LOOK).await;
        let Ok(ready) = timeout(LOOK, reader.ready(Interest::READABLE | Interest::ERROR)).await else {
            continue;
        };
        let ready = ready?;
        if ready.is_error() {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        // The other end was not told to finish yet, so this FIN is Steer's. Bytes before it were
        // not read.
        if ready.is_read_closed() && !pair.is_stopped() {
            side.end(End::Fin(0));
            return Ok(());
        }
    }
    let (mut buffer, mut position) = (vec![0; CHUNK], 0);
    loop {
        let read = reader.read(&mut buffer).await?;
        if read == 0 {
            side.end(End::Fin(position));
            return Ok(());
        }
        if buffer[..read] != *expected(pattern, position, read) {
            side.wrong(format!("stream {} ({:?}): other bytes than {position} ...", pair.id, pair.kind));
        }
        position += read as u64;
    }
}

/// Writes until the end is stopped.
async fn write(
    mut writer: WriteHalf<'_>,
    pair: &Pair,
    side: &Side,
    writes: Writes,
    pattern: &[u8],
) -> io::Result<()> {
    let mut position = 0;
    while !pair.is_stopped() {
        let len = match writes {
            Writes::Nothing => 0,
            Writes::Messages => 100,
            Writes::Bulk => CHUNK,
        };
        if writes == Writes::Bulk {
            tokio::task::yield_now().await;
        } else {
            sleep(Duration::from_millis(2)).await;
        }
        // An end that knows of the stream's end stops writing.
        if side.ended().is_some() {
            return Ok(());
        }
        writer.write_all(expected(pattern, position, len)).await?;
        position += len as u64;
        side.sent.store(position, Ordering::Release);
    }
    writer.shutdown().await
}
