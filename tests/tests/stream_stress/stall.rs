//! Streams whose readers stop while the senders send at full speed.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::backend::{Backend, Name};
use crate::footprint::{self, Footprint};
use crate::pattern::Pattern;
use crate::upgrade;

const MIB: u64 = 1 << 20;
/// The longest time for a stream to end after it was told to. Much longer than a stream needs.
const HANG: Duration = Duration::from_secs(60);

/// Which peers send. All peers read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Sends {
    Client,
    Backend,
    Both,
}

impl Sends {
    pub(crate) const ALL: [Self; 3] = [Self::Client, Self::Backend, Self::Both];

    pub(crate) fn client(self) -> bool {
        self != Self::Backend
    }

    pub(crate) fn backend(self) -> bool {
        self != Self::Client
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Senders send, nobody reads.
    Stalled,
    /// Senders send, readers read.
    Flowing,
    /// Senders send their FIN.
    Ending,
}

/// How long readers stop, and how many bytes may be held.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    stalled_for: Duration,
    /// By all streams together.
    held_bytes: u64,
}

impl Limits {
    /// `largest_tcp_buffers` are for receiving and for sending, in bytes.
    pub(crate) fn new(stalled_for: Duration, [receive, send]: [u64; 2]) -> Self {
        // Two connections, and between them a pipe, or the credit of the socket splice.
        let per_direction = 2 * (receive + send) + MIB;
        Self { stalled_for, held_bytes: DIRECTIONS * per_direction }
    }
}

/// The number of streams of each kind.
const STREAMS: u32 = 2;
/// Of all streams together: one for each stream with one sender, two for each stream with two
/// senders.
const DIRECTIONS: u64 = 4 * STREAMS as u64;
/// The time until all buffers are full.
const SETTLE: Duration = Duration::from_secs(3);
/// How many more bytes the buffers of all streams may take after that, because the kernel packs
/// bytes more tightly.
const HELD_GROWTH: u64 = DIRECTIONS * MIB;
/// The memory that Steer may need for the streams: a read for each direction, and the allocator's
/// rounding.
const RSS_GROWTH: u64 = 8 * MIB;
/// The memory that the rest of the machine may take meanwhile. A path that buffers without a limit
/// takes more within two seconds.
const HOST_NOISE: u64 = 1024 * MIB;

/// Opens streams of each kind through `target`. Nobody reads for a while, then everybody reads.
/// Reports how many bytes were held where.
pub(crate) async fn test(
    target: SocketAddr,
    backend: Arc<Backend>,
    pid: u32,
    limits: Limits,
) -> Result<String> {
    let stall = &backend.stall;
    let start = Sample::take(stall, pid)?;
    let mut clients = JoinSet::new();
    for sends in Sends::ALL {
        for number in 0..STREAMS {
            clients.spawn(client(target, Arc::clone(&backend), Name::Stall { sends, number }));
        }
    }
    sleep(SETTLE).await;
    let settled = Sample::take(stall, pid)?;
    let mut worst = settled;
    let until = Instant::now() + limits.stalled_for;
    while Instant::now() < until {
        sleep(Duration::from_millis(200)).await;
        worst = worst.worse(Sample::take(stall, pid)?);
        // Checks at once, before an unbounded path uses up the host's memory.
        anyhow::ensure!(worst.held <= limits.held_bytes, "more than {limits:?} held: {worst:?}");
    }
    let report = format!("start {start:?}, settled {settled:?}, worst {worst:?}");
    anyhow::ensure!(worst.held > 0, "nothing was sent: {report}");
    anyhow::ensure!(worst.held - settled.held <= HELD_GROWTH, "what is held grows: {report}");
    anyhow::ensure!(worst.rss <= start.rss + RSS_GROWTH, "steer grows: {report}");
    // Payload takes up to three times its size in the kernel when it comes in small segments.
    let available = start.available.saturating_sub(HOST_NOISE + 3 * worst.held);
    anyhow::ensure!(worst.available >= available, "the host's memory shrinks: {report}");

    // All streams go on at full speed, and then end.
    stall.phase.send_replace(Phase::Flowing);
    sleep(Duration::from_secs(2)).await;
    let flowed = stall.received.load(Ordering::SeqCst);
    anyhow::ensure!(flowed > worst.held + 10 * MIB, "only {flowed} bytes came after the stall: {report}");
    stall.phase.send_replace(Phase::Ending);
    while let Some(result) = timeout(HANG, clients.join_next()).await.context("a stream hangs")? {
        result??;
    }
    anyhow::ensure!(stall.held() == 0, "{} bytes are lost: {report}", stall.held());
    Ok(format!("{report}, {flowed} bytes in the two seconds after"))
}

async fn client(target: SocketAddr, backend: Arc<Backend>, name: Name) -> Result<()> {
    let Name::Stall { sends, number } = name else { anyhow::bail!("{name} is not a stream for stalls") };
    let verdict = backend.verdict_on(name, &Arc::default());
    let mut stream = TcpStream::connect(target).await.context("connecting")?;
    stream.write_all(upgrade::request(&name.to_string(), target, number).as_bytes()).await?;
    let (head, surplus) = upgrade::read_head(&mut stream).await?;
    upgrade::ensure_switched(&head)?;
    run(stream, sends.client(), &surplus, &backend.stall).await.with_context(|| format!("{name}"))?;
    verdict.await?.with_context(|| format!("{name}, at the backend"))
}

/// What is held at one moment, in bytes.
#[derive(Debug, Clone, Copy)]
struct Sample {
    /// Bytes that were sent and not received.
    held: u64,
    /// Steer's resident memory.
    rss: u64,
    /// The host's available memory.
    available: u64,
}

impl Sample {
    fn take(stall: &Stall, pid: u32) -> Result<Self> {
        let rss = Footprint::of(pid)?.resident_bytes;
        Ok(Self { held: stall.held(), rss, available: footprint::memory_available()? })
    }

    fn worse(self, other: Self) -> Self {
        Self {
            held: self.held.max(other.held),
            rss: self.rss.max(other.rss),
            available: self.available.min(other.available),
        }
    }
}

/// State that all peers of all stalled streams share.
#[derive(Debug)]
pub(crate) struct Stall {
    pub(crate) phase: watch::Sender<Phase>,
    /// Bytes that `send()` has accepted.
    pub(crate) sent: AtomicU64,
    /// Bytes that `recv()` has returned.
    pub(crate) received: AtomicU64,
}

impl Stall {
    pub(crate) fn new() -> Self {
        Self {
            phase: watch::Sender::new(Phase::Stalled),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
        }
    }

    /// Bytes under way: in socket buffers, in pipes, in Steer, in the kernel.
    pub(crate) fn held(&self) -> u64 {
        // Reads `received` first. In the other order, a byte could be received after `sent` was
        // read.
        let received = self.received.load(Ordering::SeqCst);
        self.sent.load(Ordering::SeqCst) - received
    }
}

/// Runs one peer of a stalled stream.
pub(crate) async fn run(mut stream: TcpStream, sends: bool, surplus: &[u8], stall: &Stall) -> Result<()> {
    const SEED: u64 = 99;
    let (from, to) = stream.split();
    let mut expects = Pattern::new(SEED);
    expects.check(surplus)?;
    stall.received.fetch_add(surplus.len() as u64, Ordering::SeqCst);
    let (received, sent) =
        tokio::join!(receive(from, expects, stall), send(to, Pattern::new(SEED), sends, stall));
    received.and(sent)
}

async fn send(mut to: WriteHalf<'_>, mut pattern: Pattern, sends: bool, stall: &Stall) -> Result<()> {
    let mut phase = stall.phase.subscribe();
    if !sends {
        phase.wait_for(|phase| *phase == Phase::Ending).await?;
    }
    while *phase.borrow() < Phase::Ending {
        let written = to.write(pattern.peek(256 * 1024)).await.context("sending")?;
        pattern.advance(written);
        stall.sent.fetch_add(written as u64, Ordering::SeqCst);
    }
    to.shutdown().await.context("sending the FIN")
}

async fn receive(mut from: ReadHalf<'_>, mut pattern: Pattern, stall: &Stall) -> Result<()> {
    stall.phase.subscribe().wait_for(|phase| *phase >= Phase::Flowing).await?;
    let mut chunk = vec![0; 256 * 1024];
    loop {
        match from.read(&mut chunk).await.context("reading")? {
            0 => return Ok(()),
            read => {
                pattern.check(&chunk[..read])?;
                stall.received.fetch_add(read as u64, Ordering::SeqCst);
            }
        }
    }
}
