//! The relay between real sockets on loopback.

use std::sync::Arc;

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use strum::VariantArray as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::*;
use crate::streams::{StreamInfo, Streams};
use crate::telemetry::Metrics;

const MIB: usize = 1 << 20;
/// Far longer than any wait of a passing test. A test that waits this long hangs.
const HANG: Duration = Duration::from_secs(60);

/// A session that is being relayed, and both its peers.
struct Rig {
    client: TcpStream,
    backend: TcpStream,
    relay: JoinHandle<()>,
    pipes: Arc<Pipes>,
    streams: Arc<Streams>,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Options {
    to_upstream: &'static [u8],
    to_downstream: &'static [u8],
    idle_timeout: Option<Duration>,
    pipes: usize,
}

impl Rig {
    async fn start(options: Options) -> Self {
        let (client, downstream) = connected().await;
        let (backend, upstream) = connected().await;
        let metrics = Metrics::new();
        let streams = Streams::new(&metrics);
        let session = Session {
            downstream,
            upstream,
            source: None,
            to_upstream: Bytes::from_static(options.to_upstream),
            to_downstream: Bytes::from_static(options.to_downstream),
            idle_timeout: options.idle_timeout,
            guard: streams.open(StreamInfo {
                client: client.local_addr().unwrap(),
                cluster: "sio".into(),
                endpoint: backend.local_addr().unwrap(),
                key_hash: None,
            }),
        };
        let pipes = Arc::new(Pipes::new(options.pipes));
        let lent = Arc::clone(&pipes);
        let relay = tokio::spawn(async move { run(session, &lent).await });
        Self { client, backend, relay, pipes, streams, metrics }
    }

    /// Waits until the relay is done. Returns the end and the bytes that were counted for the
    /// stream.
    async fn end(self) -> (End, [u64; 2]) {
        timeout(HANG, self.relay).await.expect("the relay ends").unwrap();
        assert!(self.streams.is_empty());
        assert_eq!(self.pipes.left(), self.pipes.max);
        let metrics = &self.metrics;
        let end = End::VARIANTS
            .iter()
            .copied()
            .find(|end| metrics.streams_closed.with_label_values(&["sio", end.into_str()]).get() == 1)
            .expect("the end is counted");
        let bytes = ["to_upstream", "to_downstream"]
            .map(|direction| metrics.stream_bytes.with_label_values(&["sio", direction]).get());
        (end, bytes)
    }
}

/// Two ends of a TCP connection.
async fn connected() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    let far = far.unwrap().0;
    steer_kernel::tcp::socket::prepare(&far).unwrap();
    (near.unwrap(), far)
}

/// Bytes that depend on their position, so a lost, repeated or swapped byte is noticed.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    SmallRng::seed_from_u64(seed).fill(&mut bytes[..]);
    bytes
}

async fn read_to_end(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    timeout(HANG, stream.read_to_end(&mut bytes)).await.expect("the stream ends").unwrap();
    bytes
}

/// Reads until the connection is reset; a FIN makes the test fail.
async fn expect_reset(stream: &mut TcpStream) {
    let mut bytes = Vec::new();
    let error = timeout(HANG, stream.read_to_end(&mut bytes)).await.expect("the reset arrives").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

/// Waits for a reset without reading, so the stall goes on.
async fn expect_error(stream: &TcpStream) {
    timeout(HANG, stream.ready(Interest::ERROR)).await.expect("the reset arrives").unwrap();
}

/// Writes until nothing has moved for half a second; returns how many bytes were written.
async fn write_until_stalled(stream: &mut TcpStream) -> usize {
    let chunk = [7; 64 * 1024];
    let mut sent = 0;
    while let Ok(written) = timeout(Duration::from_millis(500), stream.write(&chunk)).await {
        sent += written.unwrap();
    }
    sent
}

#[tokio::test]
async fn client_half_closes_first() {
    let mut rig = Rig::start(Options::default()).await;
    rig.client.write_all(b"question").await.unwrap();
    rig.client.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut rig.backend).await, b"question");
    sleep(Duration::from_millis(50)).await;
    rig.backend.write_all(b"answer").await.unwrap();
    rig.backend.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut rig.client).await, b"answer");
    assert_eq!(rig.end().await, (End::Finished, [8, 6]));
}

#[tokio::test]
async fn backend_half_closes_first() {
    let mut rig = Rig::start(Options::default()).await;
    rig.backend.write_all(b"bye").await.unwrap();
    rig.backend.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut rig.client).await, b"bye");
    rig.client.write_all(b"still talking").await.unwrap();
    rig.client.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut rig.backend).await, b"still talking");
    assert_eq!(rig.end().await, (End::Finished, [13, 3]));
}

#[tokio::test]
async fn surplus_goes_first() {
    let mut rig =
        Rig::start(Options { to_upstream: b"early", to_downstream: b"after the 101", ..Options::default() })
            .await;
    rig.client.write_all(b", late").await.unwrap();
    rig.backend.write_all(b", later").await.unwrap();
    rig.client.shutdown().await.unwrap();
    rig.backend.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut rig.backend).await, b"early, late");
    assert_eq!(read_to_end(&mut rig.client).await, b"after the 101, later");
    assert_eq!(rig.end().await, (End::Finished, [11, 20]));
}

/// After the last bytes nothing arrives that could wake the relay. In bulk, `splice(2)` cannot pass
/// the urgent byte.
#[tokio::test]
async fn what_an_urgent_byte_holds_back_is_relayed() {
    for bulk in [0, 4 * MIB] {
        let Rig { mut client, mut backend, relay: _relay, .. } =
            Rig::start(Options { pipes: 1, ..Options::default() }).await;
        let sent = pattern(9, bulk + 3);
        let writes = async {
            client.write_all(&sent).await.unwrap();
            let urgent = || socket2::SockRef::from(&client).send_out_of_band(b"X");
            client.async_io(Interest::WRITABLE, urgent).await.unwrap();
            client.write_all(b"def").await.unwrap();
            if bulk > 0 {
                client.shutdown().await.unwrap();
            }
        };
        let mut got = vec![0; sent.len() + 4];
        let both = timeout(HANG, async { tokio::join!(backend.read_exact(&mut got), writes) }).await;
        both.expect("all bytes arrive").0.unwrap();
        assert_eq!(got, [&sent[..], b"Xdef"].concat());
    }
}

#[tokio::test]
async fn reset_reaches_a_silent_peer() {
    for from_client in [true, false] {
        let rig = Rig::start(Options::default()).await;
        let Rig { client, backend, .. } = rig;
        let (resetting, mut other) = if from_client { (client, backend) } else { (backend, client) };
        resetting.set_zero_linger().unwrap();
        drop(resetting);
        expect_reset(&mut other).await;
    }
}

/// The relay waits until one side takes bytes, and has nothing to write to the other side. So the
/// relay neither reads nor writes the side that resets.
#[tokio::test]
async fn reset_is_seen_while_the_other_side_is_stalled() {
    for (from_client, pipes) in [(true, 0), (false, 0), (true, 2), (false, 2)] {
        let mut rig = Rig::start(Options { pipes, ..Options::default() }).await;
        let (sender, reader) = match from_client {
            true => (&mut rig.client, &mut rig.backend),
            false => (&mut rig.backend, &mut rig.client),
        };
        reader.shutdown().await.unwrap();
        assert_eq!(read_to_end(sender).await, b"");
        write_until_stalled(sender).await;
        sender.set_zero_linger().unwrap();
        // This drops the sender: an unrelated socket takes its place.
        *sender = connected().await.0;
        expect_error(reader).await;
        assert_eq!(rig.end().await.0, End::Reset);
    }
}

/// The reader resets. The sender must learn of the reset although its socket is full.
#[tokio::test]
async fn reset_by_a_stalled_reader() {
    for pipes in [0, 2] {
        let mut rig = Rig::start(Options { pipes, ..Options::default() }).await;
        write_until_stalled(&mut rig.client).await;
        // Closing a socket with unread bytes resets the connection, also without SO_LINGER.
        rig.backend = connected().await.0;
        expect_reset(&mut rig.client).await;
        assert_eq!(rig.end().await.0, End::Reset);
    }
}

/// After its FIN the relay does not read that side any more.
#[tokio::test]
async fn reset_after_half_close() {
    let mut rig = Rig::start(Options::default()).await;
    rig.client.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut rig.backend).await, b"");
    rig.client.set_zero_linger().unwrap();
    rig.client = connected().await.0;
    expect_error(&rig.backend).await;
    assert_eq!(rig.end().await.0, End::Reset);
}

#[tokio::test]
async fn a_stream_that_is_asked_to_end_resets_both_peers() {
    let mut rig = Rig::start(Options::default()).await;
    rig.client.write_all(b"hello").await.unwrap();
    let mut hello = [0; 5];
    rig.backend.read_exact(&mut hello).await.unwrap();
    rig.streams.snapshot()[0].end(End::NotCarried);
    for peer in [&mut rig.client, &mut rig.backend] {
        let error = timeout(HANG, peer.read(&mut [0])).await.expect("the stream ends").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
    assert_eq!(rig.end().await, (End::NotCarried, [5, 0]));
}

#[tokio::test]
async fn idle_timeout_counts_from_the_last_byte() {
    let limit = Duration::from_millis(400);
    let mut rig = Rig::start(Options { idle_timeout: Some(limit), ..Options::default() }).await;
    let start = Instant::now();
    for round in 0..4 {
        sleep(limit / 2).await;
        // A byte in either direction counts.
        let (writer, reader) = match round % 2 {
            0 => (&mut rig.client, &mut rig.backend),
            _ => (&mut rig.backend, &mut rig.client),
        };
        writer.write_all(b"x").await.unwrap();
        reader.read_u8().await.unwrap();
    }
    assert_eq!(read_to_end(&mut rig.client).await, b"");
    assert_eq!(read_to_end(&mut rig.backend).await, b"");
    assert!(start.elapsed() >= limit * 3, "{:?}", start.elapsed());
    assert_eq!(rig.end().await, (End::IdleTimeout, [2, 2]));
}

/// Bytes: the maximum of `tcp_rmem` or `tcp_wmem` (32 MiB since Linux 6.17, 4 to 6 MiB before).
fn largest_buffer(setting: &str) -> usize {
    let text = std::fs::read_to_string(format!("/proc/sys/net/ipv4/{setting}")).unwrap();
    text.split_whitespace().next_back().unwrap().parse().unwrap()
}

/// A stalled reader holds back the sender. The bytes on their way are bounded, and arrive in the
/// end.
#[tokio::test]
async fn stalled_reader_holds_back_the_sender() {
    // Two connections, each with a buffer for sending and one for receiving.
    let sockets = 2 * (largest_buffer("tcp_rmem") + largest_buffer("tcp_wmem"));
    for (pipes, in_relay) in [(0, SCRATCH_BYTES), (2, MIB)] {
        let mut rig = Rig::start(Options { pipes, ..Options::default() }).await;
        let sent = write_until_stalled(&mut rig.client).await;
        assert!(sent < sockets + in_relay, "{sent} bytes are more than all buffers hold");
        rig.client.shutdown().await.unwrap();
        assert_eq!(read_to_end(&mut rig.backend).await.len(), sent);
        rig.backend.shutdown().await.unwrap();
        assert_eq!(rig.end().await, (End::Finished, [sent as u64, 0]));
    }
}

#[tokio::test]
async fn bulk_takes_pipes_and_gives_them_back() {
    let mut rig = Rig::start(Options { pipes: 2, ..Options::default() }).await;
    let sent = pattern(1, 32 * MIB);
    let (mut client_read, mut client_write) = rig.client.split();
    let (mut backend_read, mut backend_write) = rig.backend.split();
    let (mut up, mut down) = (vec![0; sent.len()], vec![0; sent.len()]);
    let fewest_left = async {
        let mut fewest = usize::MAX;
        while rig.streams.snapshot()[0].bytes().iter().sum::<u64>() < 2 * sent.len() as u64 {
            fewest = fewest.min(rig.pipes.left());
            sleep(Duration::from_millis(1)).await;
        }
        fewest
    };
    let (_, _, _, _, fewest_left) = tokio::join!(
        async { client_write.write_all(&sent).await.unwrap() },
        async { backend_write.write_all(&sent).await.unwrap() },
        async { client_read.read_exact(&mut down).await.unwrap() },
        async { backend_read.read_exact(&mut up).await.unwrap() },
        fewest_left,
    );
    assert!(up == sent && down == sent);
    assert_eq!(fewest_left, 0, "both directions were spliced");

    // After silence the pipes are given back, and messages work as before.
    timeout(HANG, async {
        while rig.pipes.left() < 2 {
            sleep(PIPE_LINGER / 4).await;
        }
    })
    .await
    .expect("the pipes come back");
    client_write.write_all(b"ping").await.unwrap();
    let mut message = [0; 4];
    backend_read.read_exact(&mut message).await.unwrap();
    assert_eq!(&message, b"ping");
    drop((rig.client, rig.backend));
    timeout(HANG, rig.relay).await.expect("the relay ends").unwrap();
}

/// A direction that was bulk and now carries messages, without a pause, is copied again.
#[tokio::test]
async fn messages_after_bulk_give_the_pipe_back() {
    let mut rig = Rig::start(Options { pipes: 1, ..Options::default() }).await;
    let sent = pattern(2, 16 * MIB);
    let mut got = vec![0; sent.len()];
    let (mut write, mut read) = (rig.client, rig.backend);
    tokio::join!(async { write.write_all(&sent).await.unwrap() }, async {
        // The relay falls behind, so its reads are large.
        sleep(Duration::from_millis(50)).await;
        read.read_exact(&mut got).await.unwrap();
    });
    assert!(got == sent);
    assert_eq!(rig.pipes.left(), 0);
    for _ in 0..2 * CALM_AFTER {
        write.write_all(b"ping").await.unwrap();
        read.read_exact(&mut got[..4]).await.unwrap();
    }
    assert_eq!(rig.pipes.left(), 1);
    rig.client = write;
    rig.backend = read;
    drop((rig.client, rig.backend));
    timeout(HANG, rig.relay).await.expect("the relay ends").unwrap();
}

/// Both peers of one stream of [`streams_of_random_shape_arrive_whole`].
async fn random_stream(seed: u64, pipes: usize) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut rig = Rig::start(Options { pipes, ..Options::default() }).await;
    let sizes: [usize; 2] = std::array::from_fn(|_| match rng.random_range(0..4) {
        0 => rng.random_range(0..100),
        1 => rng.random_range(0..100_000),
        _ => rng.random_range(0..6 * MIB),
    });
    let seeds: [u64; 4] = rng.random();
    let [to_backend, to_client] = [0, 1].map(|side| pattern(seeds[side], sizes[side]));
    let (client_read, client_write) = rig.client.split();
    let (backend_read, backend_write) = rig.backend.split();
    let (got_down, got_up, (), ()) = tokio::join!(
        read_slowly(client_read, seeds[2]),
        read_slowly(backend_read, seeds[3]),
        write_in_pieces(client_write, &to_backend, seeds[2]),
        write_in_pieces(backend_write, &to_client, seeds[3]),
    );
    assert!(got_up == to_backend, "to upstream, seed {seed}: {} of {}", got_up.len(), sizes[0]);
    assert!(got_down == to_client, "to downstream, seed {seed}: {} of {}", got_down.len(), sizes[1]);
    assert_eq!(rig.end().await, (End::Finished, sizes.map(|size| size as u64)), "seed {seed}");
}

async fn read_slowly(mut from: impl AsyncReadExt + Unpin, seed: u64) -> Vec<u8> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut chunk = vec![0; rng.random_range(1000..300_000)];
    let pause = rng.random_range(0..4);
    let mut bytes = Vec::new();
    loop {
        match timeout(HANG, from.read(&mut chunk)).await.expect("bytes keep coming").unwrap() {
            0 => return bytes,
            read => bytes.extend_from_slice(&chunk[..read]),
        }
        if rng.random_ratio(pause, 10) {
            sleep(Duration::from_millis(rng.random_range(0..20))).await;
        }
    }
}

async fn write_in_pieces(mut to: impl AsyncWriteExt + Unpin, mut bytes: &[u8], seed: u64) {
    let mut rng = SmallRng::seed_from_u64(seed ^ 1);
    while !bytes.is_empty() {
        let (piece, rest) = bytes.split_at(rng.random_range(1..=bytes.len()));
        to.write_all(piece).await.unwrap();
        bytes = rest;
        if rng.random_ratio(1, 4) {
            sleep(Duration::from_millis(rng.random_range(0..10))).await;
        }
    }
    to.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_random_shape_arrive_whole() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let streams: Vec<_> = (0..60)
        .map(|index| tokio::spawn(random_stream(seed.wrapping_add(index), index as usize % 3)))
        .collect();
    for stream in streams {
        stream.await.unwrap();
    }
}

/// The memory of an idle stream in userspace, without the registrations of its two sockets.
#[tokio::test]
async fn idle_stream_is_small() {
    let (_client, downstream) = connected().await;
    let (_backend, upstream) = connected().await;
    let streams = Streams::new(&Metrics::new());
    let session = Session {
        downstream,
        upstream,
        source: None,
        to_upstream: Bytes::new(),
        to_downstream: Bytes::new(),
        idle_timeout: None,
        guard: streams.open(StreamInfo {
            client: "192.0.2.1:5000".parse().unwrap(),
            cluster: "sio".into(),
            endpoint: "192.0.2.9:3000".parse().unwrap(),
            key_hash: None,
        }),
    };
    let pipes = Pipes::new(0);
    let size = size_of_val(&run(session, &pipes));
    assert!(size <= 2112, "{size} bytes");
}
