//! Readers that stop. Their writers have to stop, too, and the data under way must not grow.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use steer_tests::require;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};

use crate::net::{Net, ONE_SESSION, with_net};
use crate::{HANG, MIB};

/// Bytes that depend on seed and position, made in pieces, so that a long stream needs little
/// memory.
struct Pattern(SmallRng);

impl Pattern {
    fn new(seed: u64) -> Self {
        Self(SmallRng::seed_from_u64(seed))
    }

    /// `len` must be the same multiple of 8 for each call on both sides.
    fn next(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.fill(&mut bytes[..]);
        bytes
    }
}

const PIECE: usize = 64 * 1024;

/// Sends until it is told to stop. Returns how many pieces were sent completely.
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

/// Reads to the end and compares. Returns how many pieces there were.
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

/// How many bytes a stream may have under way: the largest buffers that TCP chooses on four
/// sockets, and the credit. Without the credit, it would be a gigabyte after a second.
const UNDER_WAY: usize = 80 * MIB;
/// Memory that other processes may take.
const MEMORY_NOISE: usize = 1024 * MIB;

/// Nobody reads for a while, at one side or at both, while the other side sends at full speed. Then
/// all bytes arrive.
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
        assert!(now.iter().all(|&sent| sent < UNDER_WAY), "{now:?} bytes were sent that nobody reads");
        let used = memory.saturating_sub(available_memory());
        assert!(used < MEMORY_NOISE, "{used} bytes of memory are gone");
        if end - Instant::now() > stall() / 2 {
            early = now;
        }
    }
    let late = [sent[0].load(Relaxed), sent[1].load(Relaxed)];
    eprintln!("sent without a reader: {early:?} after half the time, {late:?} at its end");
    assert_eq!(early, late, "senders still send without a reader");

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
