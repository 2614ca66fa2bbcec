//! The socket splice between real TCP peers: clients, proxy and endpoint in network namespaces
//! joined by veth. Needs root and the BPF object (`cargo xtask build-ebpf`).
//!
//! Every byte is compared with what the other side sent, by position.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod net;
mod stall;

use std::io::Read as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use steer::splice::Session;
use steer::streams::End;
use steer_tests::require;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::net::{Legs, Net, ONE_SESSION, with_net};

const MIB: usize = 1 << 20;
/// Much longer than any step takes. A test that takes longer hangs.
const HANG: Duration = Duration::from_secs(60);

/// Bytes that depend on seed and position.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    SmallRng::seed_from_u64(seed).fill(&mut bytes[..]);
    bytes
}

/// What one peer does with its connection.
struct Plan {
    sends: Vec<u8>,
    expects: Vec<u8>,
    /// Sends its FIN only after the other peer's FIN: the other peer half-closes.
    closes_second: bool,
    slow_reader: bool,
    seed: u64,
}

/// Carries out the plan. Returns an error if something went wrong.
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
            // If the reader has failed, it drops the sender.
            fin_seen.await.ok();
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
    // If the writer has failed, nobody receives this.
    saw_fin.send(()).ok();
    writer.await.unwrap()?;
    if got == expects {
        return Ok(());
    }
    let same = got.iter().zip(&expects).take_while(|(a, b)| a == b).count();
    Err(format!("got {} bytes, expected {}, first difference at {same}", got.len(), expects.len()))
}

/// One stream with random choices: sizes, pauses, who closes when, what the proxy has read before
/// the hand-over, and when the hand-over is.
async fn random_stream(net: Arc<Net>, legs: Legs, seed: u64) -> Result<(), String> {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut size = || match random.random_range(0..4) {
        0 => 0,
        1 => random.random_range(1..300),
        2 => random.random_range(1..64 * 1024),
        _ => random.random_range(1..3 * MIB / 2),
    };
    let (up, down) = (pattern(seed * 2, size()), pattern(seed * 2 + 1, size()));
    // 0, 1: this side half-closes. 2: both sides close independently.
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
    // The proxy may have read a part of a segment already, as hyper does.
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
        // A peer had closed before the hand-over. The session must still be complete.
        relay_by_copying(refused.session).await;
    }
    let both = async { (client.await.unwrap(), backend.await.unwrap()) };
    let (client, backend) = timeout(HANG, both).await.map_err(|_| "hangs".to_owned())?;
    client.map_err(|what| format!("client: {what}"))?;
    backend.map_err(|what| format!("backend: {what}"))
}

async fn relay_by_copying(session: Session) {
    let Session { mut downstream, mut upstream, to_upstream, to_downstream, guard, .. } = session;
    upstream.write_all(&to_upstream).await.unwrap();
    downstream.write_all(&to_downstream).await.unwrap();
    tokio::io::copy_bidirectional(&mut downstream, &mut upstream).await.unwrap();
    guard.ended(End::Finished);
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
        let view = net.streams.snapshot()[0].row();
        assert_eq!((view.path, view.bytes_to_upstream, view.bytes_to_downstream), ("sockmap", 4000, 9000));
        drop((client, backend));
        timeout(HANG, carried).await.unwrap().unwrap();
        let bytes = |direction| net.metrics.stream_bytes.with_label_values(&["sio", direction]).get();
        assert_eq!((bytes("to_upstream"), bytes("to_downstream")), (4000, 9000));
        assert_eq!(net.ended("finished"), 1);
    });
}

/// Each side resets, while the other side is quiet or sends, before and after a half-close.
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
                // The timeout ends the write, so that the buffers are full.
                timeout(Duration::from_millis(50), other.write_all(&vec![1; 64 * MIB])).await.ok();
            }
            resetting.set_zero_linger().unwrap();
            drop(resetting);
            // The reset is an error also where a FIN was read before.
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

/// A reset passes without userspace.
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
        // The task was aborted, so it returns an error.
        carried.await.ok();
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
