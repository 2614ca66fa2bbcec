//! A build with another layout of the maps takes streams over and gives them back. Maps change
//! their size. The process dies during each of these.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use steer_tests::eventually::eventually;
use steer_tests::require;
use steer_tests::steer::{Attach, binary_with_failpoints, binary_with_other_layout};
use steer_tests::topology::Topology;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::bed::{Bed, HANG, runtime};
use crate::traffic::{self, Traffic};

/// The long form has 5,000 streams and dozens of changes, the short form has one change and the
/// change back.
fn size() -> (u32, usize) {
    if require::long() { (5000, 30) } else { (200, 2) }
}

fn other_layout() -> Option<PathBuf> {
    let binary = binary_with_other_layout();
    if binary.is_none() {
        require::skip("needs a steer with the feature other-layout, which `cargo xtask test` builds");
    }
    binary
}

/// A stream with full traffic in both directions until `stop`. Returns the stream when all bytes
/// have come back, and the bytes of both directions.
async fn bulk(front: SocketAddr, stop: &AtomicBool) -> (TcpStream, u64) {
    const LEN: usize = 64 * 1024;
    let block = |index: u64| index.to_be_bytes().repeat(LEN / 8);
    let mut stream = traffic::open(front).await.unwrap();
    let (mut reader, mut writer) = stream.split();
    // How many blocks the writer has sent, and whether that is all.
    let sent = Cell::new((0, false));
    let write = async {
        while let (index, false) = sent.get() {
            sent.set((index + 1, stop.load(Ordering::Relaxed)));
            timeout(HANG, writer.write_all(&block(index))).await.expect("a write hangs").unwrap();
        }
    };
    let read = async {
        let (mut came, mut got) = (0, vec![0; LEN]);
        while sent.get() != (came, true) {
            timeout(HANG, reader.read_exact(&mut got)).await.expect("a read hangs").unwrap();
            assert!(got == block(came), "block {came} comes back as another");
            came += 1;
        }
    };
    tokio::join!(write, read);
    (stream, sent.get().0 * 2 * LEN as u64)
}

/// Runs `work` while two more streams have full traffic. Returns their bytes, and the streams,
/// which are still open.
fn with_bulk(bed: &mut Bed<'_>, work: impl FnOnce(&mut Bed<'_>)) -> (u64, Vec<TcpStream>) {
    let stop = AtomicBool::new(false);
    let (topology, front, rows) = (bed.topology, bed.front, bed.rows().len());
    thread::scope(|scope| {
        let clients = scope.spawn(|| {
            let both = || runtime().block_on(async { tokio::join!(bulk(front, &stop), bulk(front, &stop)) });
            topology.clients.run(both).unwrap()
        });
        let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let spliced = || Ok((bed.spliced() == rows + 2).then_some(()));
            eventually("full streams on the packet path", HANG, spliced).unwrap();
            work(bed);
        }));
        stop.store(true, Ordering::Relaxed);
        let (one, other) = clients.join().unwrap();
        worked.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (one.1 + other.1, vec![one.0, other.0])
    })
}

fn expect_all_there(bed: &Bed<'_>, traffic: &Traffic, streams: usize) {
    let rows = bed.rows();
    assert_eq!(rows.len(), streams);
    assert!(rows.iter().all(|row| row["path"] == "packet"));
    assert_eq!(bed.metric("steer_packet_streams", &[("kind", "used")]), streams as f64);
    let before = traffic.messages.load(Ordering::Relaxed);
    let moves = || Ok((traffic.messages.load(Ordering::Relaxed) > before + 20).then_some(()));
    eventually("messages", HANG, moves).unwrap();
}

/// The bytes that `/flows` has counted for each direction, by client.
fn counts(bed: &Bed<'_>) -> BTreeMap<String, [u64; 2]> {
    let keys = ["bytes_to_upstream", "bytes_to_downstream"];
    let bytes = |row: &Value| keys.map(|key| row[key].as_u64().unwrap());
    bed.rows().iter().map(|row| (row["client"].to_string(), bytes(row))).collect()
}

/// Waits until `/flows` has counted bytes of every stream again.
fn expect_belief(bed: &Bed<'_>) {
    let before = counts(bed);
    let grown = || {
        let now = counts(bed);
        let has_grown =
            |(client, [up, down]): (&String, &[u64; 2])| now[client][0] > *up && now[client][1] > *down;
        Ok(before.iter().all(has_grown).then_some(()))
    };
    eventually("bytes of every stream", HANG, grown).unwrap();
}

/// Pauses the traffic and waits until `/flows` has counted all its bytes and `more`. For a stream
/// in full flow, a packet that is counted at the moment its record is copied may be missing, or may
/// count twice. That is a few packets in all.
fn expect_bytes(bed: &Bed<'_>, traffic: &Traffic, more: u64) {
    traffic.pause();
    let count = || counts(bed).values().flatten().sum::<u64>();
    let expected = || traffic.bytes.load(Ordering::Relaxed) + more;
    let error = if more == 0 { 0 } else { 8 * (64 << 10) };
    eventually("all bytes counted", HANG, || Ok((count().abs_diff(expected()) <= error).then_some(())))
        .unwrap_or_else(|error| panic!("{error}: {} of {}", count(), expected()));
}

/// Changes from one build to the other and back, again and again, under load.
fn back_and_forth(mut bed: Bed<'_>, signal: libc::c_int) {
    let Some(other) = other_layout() else { return };
    let own = bed.binary();
    let (streams, changes) = size();
    bed.under_traffic(streams, |bed, traffic| {
        let (bytes, full) = with_bulk(bed, |bed| {
            for change in 0..changes {
                thread::sleep(Duration::from_millis(300));
                bed.steer.stop(signal).unwrap();
                bed.steer.start_again_as(if change % 2 == 0 { &other } else { &own }).unwrap();
                expect_all_there(bed, traffic, streams as usize + 2);
                assert!(bed.steer.process().tail().contains("took streams to new maps"));
            }
            expect_belief(bed);
        });
        expect_bytes(bed, traffic, bytes);
        drop(full);
    });
    bed.expect_no_stream();
}

#[test]
fn a_build_with_another_layout_takes_over_after_a_kill_and_gives_back() {
    if !require::root() {
        return;
    }
    for attach in Attach::all() {
        let topology = Topology::new(1).unwrap();
        back_and_forth(Bed::start_attaching(attach, &topology, &[]), libc::SIGKILL);
    }
}

#[test]
fn a_build_with_another_layout_takes_over_after_a_stop_over_ipv6() {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    back_and_forth(Bed::start_ipv6(&topology, &[]), libc::SIGTERM);
}

#[test]
fn streams_that_ended_under_another_build_are_over() {
    if !require::root() {
        return;
    }
    let Some(other) = other_layout() else { return };
    let topology = Topology::new(1).unwrap();
    let mut bed = Bed::start(&topology, &[]);
    bed.under_traffic(50, |bed, _| {
        bed.steer.stop(libc::SIGKILL).unwrap();
    });
    bed.steer.start_again_as(&other).unwrap();
    bed.expect_no_stream();
    assert_eq!(bed.metric("steer_streams_adopted_total", &[]), 0.0);
    // The directory has only what every start makes.
    assert_eq!(std::fs::read_dir(bed.pins()).unwrap().count(), 1);
}

#[test]
fn a_death_in_the_middle_of_a_take_over_loses_nothing() {
    if !require::root() {
        return;
    }
    let (Some(other), Some(dies)) = (other_layout(), binary_with_failpoints()) else {
        return require::skip("needs a steer with fail points, which `cargo xtask test` builds");
    };
    for attach in Attach::all() {
        dies_at_each_step(attach, &other, &dies);
    }
}

fn dies_at_each_step(attach: Attach, other: &Path, dies: &Path) {
    let topology = Topology::new(1).unwrap();
    let mut bed = Bed::start_attaching(attach, &topology, &[]);
    let own = bed.binary();
    bed.under_traffic(50, |bed, traffic| {
        let (bytes, full) = with_bulk(bed, |bed| {
            for (index, step) in ["copied", "named", "first link", "switched"].into_iter().enumerate() {
                // The next process may be of the build before the change, or of the build that has
                // died.
                let both = [other, &own];
                let nexts = if require::long() { &both[..] } else { &both[index % 2..][..1] };
                for next in nexts {
                    bed.steer.stop(libc::SIGKILL).unwrap();
                    bed.steer.start_again_as(other).unwrap();
                    bed.steer.stop(libc::SIGKILL).unwrap();
                    assert!(bed.steer.start_again_to_die_at(step, dies).is_err(), "{step}");
                    thread::sleep(Duration::from_millis(200));
                    bed.steer.start_again_as(next).unwrap();
                    expect_all_there(bed, traffic, 52);
                    expect_belief(bed);
                    assert_eq!(std::fs::read_dir(bed.pins()).unwrap().count(), 1, "{step}");
                }
            }
        });
        expect_bytes(bed, traffic, bytes);
        drop(full);
    });
    bed.expect_no_stream();
}

#[test]
fn maps_get_another_size_with_streams_in_them() {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let mut bed = Bed::start(&topology, &["max_streams: 1000"]);
    bed.under_traffic(60, |bed, traffic| {
        // The last size has no room for all streams.
        for (wanted, limit) in [(5000, 5000.0), (200, 200.0), (20, 200.0)] {
            bed.configure(&[&format!("max_streams: {wanted}")]);
            bed.steer.restart(libc::SIGKILL).unwrap();
            expect_all_there(bed, traffic, 60);
            assert_eq!(bed.metric("steer_packet_streams", &[("kind", "limit")]), limit);
        }
        expect_bytes(bed, traffic, 0);
    });
    bed.expect_no_stream();
}
