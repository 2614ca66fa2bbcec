//! The socket splice between real TCP peers: clients, proxy and endpoint in network namespaces
//! joined by veth. Needs root and the BPF object (`cargo xtask build-ebpf`).
//!
//! Every byte is compared with what the other side sent, by position.

#![allow(clippy::unwrap_used, reason = "a failure ends the test, as it should")]

use std::io::Read as _;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use steer::config::SpliceMode;
use steer::kernel::maps::Entries;
use steer::splice::sock::SockSplice;
use steer::splice::{End, Session};
use steer::telemetry::Telemetry;
use steer::telemetry::flows::FlowInfo;
use steer_tests::require;
use steer_tests::topology::Topology;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

const MIB: usize = 1 << 20;
/// Far above anything that passes; a test that gets there hangs.
const HANG: Duration = Duration::from_secs(60);

/// Both legs of a stream: what the peers hold, and what the proxy holds.
struct Legs {
    client: TcpStream,
    downstream: TcpStream,
    upstream: TcpStream,
    backend: TcpStream,
}

struct Net {
    topology: Topology,
    front: TcpListener,
    endpoint: TcpListener,
    splice: Arc<SockSplice>,
    telemetry: Arc<Telemetry>,
}

impl Net {
    fn new() -> Self {
        let topology = Topology::new(1).unwrap();
        let listen = |address: SocketAddr| move || TcpListener::bind(address).unwrap();
        let front = topology.proxy.run(listen((Topology::PROXY, 8080).into())).unwrap();
        let endpoint = topology.endpoints[0].run(listen((Topology::endpoint(0), 3000).into())).unwrap();
        let telemetry = Telemetry::new();
        let splice = SockSplice::start(Arc::clone(&telemetry)).expect("the socket splice starts");
        Self { topology, front, endpoint, splice, telemetry }
    }

    fn legs(&self, count: usize) -> Vec<Legs> {
        // The thread that connects must be in the namespace; accepting works from anywhere.
        let connect = |netns: &steer_tests::netns::NetNs, listener: &TcpListener| {
            let address = listener.local_addr().unwrap();
            let pair = || {
                let near = std::net::TcpStream::connect(address).unwrap();
                (near, listener.accept().unwrap().0)
            };
            netns.run(|| (0..count).map(|_| pair()).collect::<Vec<_>>()).unwrap()
        };
        let front = connect(&self.topology.clients, &self.front);
        let back = connect(&self.topology.proxy, &self.endpoint);
        let tokio = |stream: std::net::TcpStream| {
            stream.set_nonblocking(true).unwrap();
            stream.set_nodelay(true).unwrap();
            TcpStream::from_std(stream).unwrap()
        };
        front
            .into_iter()
            .zip(back)
            .map(|((client, downstream), (upstream, backend))| Legs {
                client: tokio(client),
                downstream: tokio(downstream),
                upstream: tokio(upstream),
                backend: tokio(backend),
            })
            .collect()
    }

    fn session(
        &self,
        downstream: TcpStream,
        upstream: TcpStream,
        [to_upstream, to_downstream]: [Bytes; 2],
        idle_timeout: Option<Duration>,
    ) -> Session {
        let info = FlowInfo {
            client: downstream.peer_addr().unwrap(),
            cluster: "sio".into(),
            endpoint: upstream.peer_addr().unwrap(),
            key_hash: None,
        };
        let flow = self.telemetry.flows.open(info);
        let mode = SpliceMode::Sockmap;
        Session { downstream, upstream, source: None, to_upstream, to_downstream, mode, idle_timeout, flow }
    }

    /// Splices fresh legs; the peers' ends are returned.
    fn spliced(&self, idle_timeout: Option<Duration>) -> (TcpStream, TcpStream, JoinHandle<()>) {
        let Legs { client, downstream, upstream, backend } = self.legs(1).remove(0);
        let session = self.session(downstream, upstream, Default::default(), idle_timeout);
        let splice = Arc::clone(&self.splice);
        let carried = tokio::spawn(async move {
            splice.carry(session).await.expect("the session is spliced");
        });
        (client, backend, carried)
    }

    fn ended(&self, end: &str) -> u64 {
        self.telemetry.metrics.streams_closed.with_label_values(&["sio", end]).get()
    }

    fn fallbacks(&self, reason: &str) -> u64 {
        self.telemetry.metrics.splice_fallbacks.with_label_values(&[reason]).get()
    }

    async fn expect_entries(&self, expected: Entries) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.splice.entries() != expected {
            assert!(Instant::now() < deadline, "{:?}, not {expected:?}", self.splice.entries());
            sleep(Duration::from_millis(5)).await;
        }
    }
}

const NO_ENTRIES: Entries = Entries { target: 0, source: 0, flow: 0, credit: 0 };
const ONE_SESSION: Entries = Entries { target: 2, source: 2, flow: 2, credit: 2 };

/// Runs a test with the splice, and checks that nothing of it is left.
fn with_net<F: Future<Output = ()>>(test: impl FnOnce(Arc<Net>) -> F) {
    if !require::root() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let net = Arc::new(Net::new());
        let before = open_descriptors();
        test(Arc::clone(&net)).await;
        assert_eq!(net.telemetry.flows.len(), 0, "streams are left");
        net.expect_entries(NO_ENTRIES).await;
        assert_eq!(open_descriptors(), before, "descriptors are left");
    });
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Bytes that depend on seed and position.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    SmallRng::seed_from_u64(seed).fill(&mut bytes[..]);
    bytes
}

/// The same in pieces, for streams that nobody wants in memory.
struct Pattern(SmallRng);

impl Pattern {
    fn new(seed: u64) -> Self {
        Self(SmallRng::seed_from_u64(seed))
    }

    /// `len` must be the same multiple of 8 at each call on both sides.
    fn next(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.fill(&mut bytes[..]);
        bytes
    }
}

/// What one peer does with its connection.
struct Plan {
    sends: Vec<u8>,
    expects: Vec<u8>,
    /// Sends its FIN only after the other's: the other one half-closes.
    closes_second: bool,
    slow_reader: bool,
    seed: u64,
}

/// Returns a complaint, if there is one.
async fn peer(stream: TcpStream, plan: Plan) -> Result<(), String> {
    let Plan { sends, expects, closes_second, slow_reader, seed } = plan;
    let (mut read_half, mut write_half) = stream.into_split();
    let (saw_fin, fin_seen) = tokio::sync::oneshot::channel::<()>();
    let writer = tokio::spawn(async move {
        let mut random = SmallRng::seed_from_u64(seed ^ 0x77);
        let mut rest = &sends[..];
        while !rest.is_empty() {
            let most = if random.random_bool(0.5) { 200 } else { 100_000 };
            let (piece, later) = rest.split_at(rest.len().min(random.random_range(1..=most)));
            write_half.write_all(piece).await.map_err(|error| format!("write: {error}"))?;
            rest = later;
            if random.random_bool(0.05) {
                sleep(Duration::from_micros(random.random_range(0..3000))).await;
            }
        }
        if closes_second {
            let _reader_failed = fin_seen.await;
        }
        write_half.shutdown().await.map_err(|error| format!("shutdown: {error}"))?;
        Ok::<_, String>(())
    });

    let mut random = SmallRng::seed_from_u64(seed ^ 0x99);
    let mut got = Vec::with_capacity(expects.len());
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match read_half.read(&mut buffer).await {
            Ok(0) => break,
            Ok(read) => got.extend_from_slice(&buffer[..read]),
            Err(error) => return Err(format!("read after {} of {}: {error}", got.len(), expects.len())),
        }
        if slow_reader && random.random_bool(0.2) {
            sleep(Duration::from_millis(random.random_range(1..10))).await;
        }
    }
    let _writer_failed = saw_fin.send(());
    writer.await.unwrap()?;
    if got == expects {
        return Ok(());
    }
    let same = got.iter().zip(&expects).take_while(|(a, b)| a == b).count();
    Err(format!("got {} bytes, expected {}, first difference at {same}", got.len(), expects.len()))
}

/// One stream with everything by chance: sizes, pauses, who closes when, what the proxy has read
/// before it hands over, and when it does.
async fn random_stream(net: Arc<Net>, legs: Legs, seed: u64) -> Result<(), String> {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut size = || match random.random_range(0..4) {
        0 => 0,
        1 => random.random_range(1..300),
        2 => random.random_range(1..64 * 1024),
        _ => random.random_range(1..3 * MIB / 2),
    };
    let (up, down) = (pattern(seed * 2, size()), pattern(seed * 2 + 1, size()));
    // 0, 1: one side half-closes; 2: both close when they like.
    let order = random.random_range(0..3);
    let mut plan = |sends: &[u8], expects: &[u8], closes_second| Plan {
        sends: sends.to_vec(),
        expects: expects.to_vec(),
        closes_second,
        slow_reader: random.random_bool(0.3),
        seed: random.random(),
    };
    let (client_plan, backend_plan) = (plan(&up, &down, order == 0), plan(&down, &up, order == 1));
    let Legs { client, downstream, upstream, backend } = legs;
    let client = tokio::spawn(peer(client, client_plan));
    let backend = tokio::spawn(peer(backend, backend_plan));

    if random.random_bool(0.5) {
        sleep(Duration::from_micros(random.random_range(0..4000))).await;
    }
    // As hyper does: a part of a segment may have been read.
    let mut surplus = [Bytes::new(), Bytes::new()];
    for (stream, surplus) in [&downstream, &upstream].into_iter().zip(&mut surplus) {
        let mut buffer = vec![0; [16, 100, 8192][random.random_range(0..3)]];
        if random.random_bool(0.5) {
            let read = (&*socket2::SockRef::from(stream)).read(&mut buffer).unwrap_or(0);
            *surplus = Bytes::copy_from_slice(&buffer[..read]);
        }
    }
    let session = net.session(downstream, upstream, surplus, None);
    if let Err(refused) = net.splice.carry(session).await {
        // A peer had closed before the hand-over; the session must be whole.
        relay_by_copying(refused.session).await;
    }
    let both = async { (client.await.unwrap(), backend.await.unwrap()) };
    let (client, backend) = timeout(HANG, both).await.map_err(|_| "hangs".to_owned())?;
    client.map_err(|what| format!("client: {what}"))?;
    backend.map_err(|what| format!("backend: {what}"))
}

async fn relay_by_copying(session: Session) {
    let Session { mut downstream, mut upstream, to_upstream, to_downstream, flow, .. } = session;
    upstream.write_all(&to_upstream).await.unwrap();
    downstream.write_all(&to_downstream).await.unwrap();
    tokio::io::copy_bidirectional(&mut downstream, &mut upstream).await.unwrap();
    flow.ended(End::Finished);
}

#[test]
fn streams_of_all_kinds_arrive_whole() {
    let (rounds, at_once) = if require::long() { (40, 100) } else { (8, 80) };
    with_net(|net| async move {
        let mut failed = Vec::new();
        for round in 0..rounds {
            let streams: Vec<_> = (0..)
                .zip(net.legs(at_once))
                .map(|(i, legs)| {
                    let seed = round * 1000 + i;
                    (seed, tokio::spawn(random_stream(Arc::clone(&net), legs, seed)))
                })
                .collect();
            for (seed, stream) in streams {
                if let Err(what) = stream.await.unwrap() {
                    failed.push(format!("stream {seed}: {what}"));
                }
            }
        }
        let refused = net.fallbacks("not_established");
        eprintln!(
            "{} streams finished, {refused} refusals for a FIN, {} busy, {} gated",
            net.ended("finished"),
            net.fallbacks("busy"),
            net.fallbacks("gated")
        );
        assert!(failed.is_empty(), "{} failed:\n{}", failed.len(), failed.join("\n"));
        assert_eq!(net.ended("finished") as usize, rounds as usize * at_once);
    });
}

#[test]
fn the_kernel_carries_messages_and_is_left_clean() {
    with_net(|net| async move {
        let (mut client, mut backend, carried) = net.spliced(None);
        net.expect_entries(ONE_SESSION).await;
        for round in 0..1000_u32 {
            client.write_all(&round.to_be_bytes()).await.unwrap();
            assert_eq!(timeout(HANG, backend.read_u32()).await.unwrap().unwrap(), round);
            backend.write_all(&[7; 9]).await.unwrap();
            timeout(HANG, client.read_exact(&mut [0; 9])).await.unwrap().unwrap();
        }
        let view = net.telemetry.flows.snapshot()[0].view();
        assert_eq!((view.path, view.bytes_to_upstream, view.bytes_to_downstream), ("sockmap", 4000, 9000));
        drop((client, backend));
        timeout(HANG, carried).await.unwrap().unwrap();
        let bytes =
            |direction| net.telemetry.metrics.stream_bytes.with_label_values(&["sio", direction]).get();
        assert_eq!((bytes("to_upstream"), bytes("to_downstream")), (4000, 9000));
        assert_eq!(net.ended("finished"), 1);
    });
}

/// Each side resets, quietly or while the other one sends, before and after a half-close.
#[test]
fn resets_are_passed_on() {
    with_net(|net| async move {
        let mut resets = 0;
        for (by_client, sending, half_closed) in [
            (true, false, false),
            (false, false, false),
            (true, true, false),
            (false, true, false),
            (true, false, true),
            (false, false, true),
        ] {
            let (client, backend, carried) = net.spliced(None);
            net.expect_entries(ONE_SESSION).await;
            let (mut resetting, mut other) = if by_client { (client, backend) } else { (backend, client) };
            if half_closed {
                resetting.shutdown().await.unwrap();
                assert_eq!(timeout(HANG, other.read(&mut [0])).await.unwrap().unwrap(), 0);
            }
            if sending {
                let _sent = timeout(Duration::from_millis(50), other.write_all(&vec![1; 64 * MIB])).await;
            }
            resetting.set_zero_linger().unwrap();
            drop(resetting);
            // As an error also where a FIN was read before.
            let error = timeout(HANG, async {
                loop {
                    if let Err(error) = other.write_all(&[1; 1000]).await {
                        break error;
                    }
                    sleep(Duration::from_millis(1)).await;
                }
            });
            let error = error.await.expect("the reset arrives").kind();
            let reset = [std::io::ErrorKind::ConnectionReset, std::io::ErrorKind::BrokenPipe];
            assert!(reset.contains(&error), "{error:?}");
            timeout(HANG, carried).await.unwrap().unwrap();
            resets += 1;
            assert_eq!(net.ended("reset"), resets);
        }
    });
}

/// Without a word from userspace.
#[test]
fn a_reset_reaches_a_peer_that_only_reads() {
    with_net(|net| async move {
        let (client, mut backend, carried) = net.spliced(None);
        net.expect_entries(ONE_SESSION).await;
        client.set_zero_linger().unwrap();
        drop(client);
        let error = timeout(HANG, backend.read(&mut [0])).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        timeout(HANG, carried).await.unwrap().unwrap();
    });
}

#[test]
fn a_dropped_session_is_reset_and_forgotten() {
    with_net(|net| async move {
        let (mut client, mut backend, carried) = net.spliced(None);
        net.expect_entries(ONE_SESSION).await;
        carried.abort();
        for peer in [&mut client, &mut backend] {
            let error = timeout(HANG, peer.read(&mut [0])).await.unwrap().unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
        drop((client, backend));
        let _cancelled = carried.await;
        assert_eq!(net.ended("reset"), 1);
    });
}

#[test]
fn idle_streams_are_closed() {
    with_net(|net| async move {
        let limit = Duration::from_millis(400);
        let (mut client, mut backend, carried) = net.spliced(Some(limit));
        let start = Instant::now();
        for _ in 0..4 {
            sleep(limit / 2).await;
            client.write_all(b"x").await.unwrap();
            backend.read_u8().await.unwrap();
        }
        let last = start.elapsed();
        assert_eq!(timeout(HANG, client.read(&mut [0])).await.unwrap().unwrap(), 0);
        assert_eq!(timeout(HANG, backend.read(&mut [0])).await.unwrap().unwrap(), 0);
        assert!(start.elapsed() >= last + limit * 9 / 10, "{:?} {last:?}", start.elapsed());
        drop((client, backend));
        timeout(HANG, carried).await.unwrap().unwrap();
        assert_eq!(net.ended("idle_timeout"), 1);
    });
}

const PIECE: usize = 64 * 1024;

/// Sends until told to stop; returns how many pieces went out whole.
async fn flood(
    mut writer: impl AsyncWriteExt + Unpin,
    seed: u64,
    stop: Arc<std::sync::atomic::AtomicBool>,
    sent: Arc<std::sync::atomic::AtomicUsize>,
) -> usize {
    use std::sync::atomic::Ordering::Relaxed;
    let mut pattern = Pattern::new(seed);
    let mut pieces = 0;
    while !stop.load(Relaxed) {
        writer.write_all(&pattern.next(PIECE)).await.unwrap();
        pieces += 1;
        sent.store(pieces * PIECE, Relaxed);
    }
    writer.shutdown().await.unwrap();
    pieces
}

/// Reads to the end and compares; returns how many pieces there were.
async fn check_flood(mut reader: impl AsyncReadExt + Unpin, seed: u64) -> usize {
    let mut pattern = Pattern::new(seed);
    let mut piece = vec![0; PIECE];
    let mut pieces = 0;
    loop {
        match reader.read_exact(&mut piece).await {
            Ok(_) => assert!(piece == pattern.next(PIECE), "piece {pieces} differs"),
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
                return pieces;
            }
        }
        pieces += 1;
    }
}

fn available_memory() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find(|line| line.starts_with("MemAvailable:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

fn stall() -> Duration {
    Duration::from_secs(if require::long() { 20 } else { 5 })
}

/// What a stream may have under way: the largest buffers that TCP gives itself on four sockets, and
/// the credit. Without the gate it is a gigabyte after a second.
const UNDER_WAY: usize = 80 * MIB;
/// Others use the machine too.
const MEMORY_NOISE: usize = 1024 * MIB;

/// Nobody reads for a while, at one side or at both, while the other sends at full speed; then all
/// of it arrives.
async fn stalled(net: Arc<Net>, from_client: bool, from_backend: bool) {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
    let (client, backend, carried) = net.spliced(None);
    net.expect_entries(ONE_SESSION).await;
    let (client_read, client_write) = client.into_split();
    let (backend_read, backend_write) = backend.into_split();
    let stop = Arc::new(AtomicBool::new(false));
    let sent = [Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0))];
    let memory = available_memory();

    let until = |sends: bool| if sends { Arc::clone(&stop) } else { Arc::new(true.into()) };
    let up = tokio::spawn(flood(client_write, 1, until(from_client), Arc::clone(&sent[0])));
    let down = tokio::spawn(flood(backend_write, 2, until(from_backend), Arc::clone(&sent[1])));

    let mut early = [0; 2];
    let end = Instant::now() + stall();
    while Instant::now() < end {
        sleep(Duration::from_millis(100)).await;
        let now = [sent[0].load(Relaxed), sent[1].load(Relaxed)];
        assert!(now.iter().all(|&sent| sent < UNDER_WAY), "{now:?} bytes went nowhere");
        let used = memory.saturating_sub(available_memory());
        assert!(used < MEMORY_NOISE, "{used} bytes of memory are gone");
        if end - Instant::now() > stall() / 2 {
            early = now;
        }
    }
    let late = [sent[0].load(Relaxed), sent[1].load(Relaxed)];
    eprintln!("sent without a reader: {early:?} after half the time, {late:?} at its end");
    assert_eq!(early, late, "it still grows");

    let readers = Instant::now();
    let backend_check = tokio::spawn(check_flood(backend_read, 1));
    let client_check = tokio::spawn(check_flood(client_read, 2));
    sleep(Duration::from_secs(1)).await;
    stop.store(true, Relaxed);
    let all = async {
        (up.await.unwrap(), down.await.unwrap(), backend_check.await.unwrap(), client_check.await.unwrap())
    };
    let (up, down, got_up, got_down) = timeout(HANG, all).await.expect("the readers get all");
    assert_eq!((up, down), (got_up, got_down));
    timeout(HANG, carried).await.unwrap().unwrap();
    eprintln!(
        "{} MiB in all; ended {:?} after the readers began; {} gated",
        (up + down) * PIECE / MIB,
        readers.elapsed(),
        net.fallbacks("gated")
    );
    assert!(net.fallbacks("gated") >= 1);
    assert_eq!(net.ended("finished"), 1);
}

#[test]
fn a_stalled_client_holds_back_the_backend() {
    with_net(|net| stalled(net, false, true));
}

#[test]
fn a_stalled_backend_holds_back_the_client() {
    with_net(|net| stalled(net, true, false));
}

#[test]
fn two_stalled_sides_hold_back_each_other() {
    with_net(|net| stalled(net, true, true));
}
