//! Streams go on while the process is killed, or stopped, and started again.

use std::thread;
use std::time::{Duration, Instant};

use steer_tests::require;
use steer_tests::topology::Topology;

use crate::bed::{Bed, front, runtime};
use crate::traffic;

/// 5,000 streams and two minutes in the long form.
fn size() -> (u32, Duration) {
    if require::long() { (5000, Duration::from_secs(120)) } else { (250, Duration::from_secs(8)) }
}

fn again_and_again(signal: libc::c_int) {
    if !require::root() {
        return;
    }
    let (streams, duration) = size();
    let topology = Topology::new(1).unwrap();
    let mut bed = Bed::start(&topology, &[]);
    bed.under_traffic(streams, |bed, traffic| {
        let begin = Instant::now();
        let mut times = 0;
        traffic.take_worst();
        while begin.elapsed() < duration {
            thread::sleep(Duration::from_secs(3).min(duration / 4));
            let before = traffic.take_worst();
            let down = Instant::now();
            bed.steer.restart(signal).unwrap();
            let down = down.elapsed();
            thread::sleep(Duration::from_millis(500));
            let at = traffic.take_worst();
            times += 1;
            eprintln!("restart {times}: ready after {down:?}; slowest echo {before:?} before, {at:?} at it");
            assert_eq!(bed.rows().len(), streams as usize);
            for (metric, expected) in [("steer_packet_streams", streams), ("steer_source_ports", streams)] {
                assert_eq!(bed.metric(metric, &[("kind", "used")]), f64::from(expected), "{metric}");
            }
            assert_eq!(bed.metric("steer_streams", &[("path", "packet")]), f64::from(streams));
        }
        let row = &bed.rows()[0];
        assert_eq!((&row["cluster"], &row["path"]), (&"sio".into(), &"packet".into()));
        assert_eq!(row["endpoint"], crate::bed::endpoint().to_string());
        assert!(row["age_seconds"].as_f64().unwrap() >= begin.elapsed().as_secs_f64(), "{row}");
        // New ones come to the process that lives now.
        let fresh = topology.clients.run(|| runtime().block_on(traffic::open(front()))).unwrap();
        drop(fresh.unwrap());
    });
    bed.expect_no_stream();
}

#[test]
fn a_killed_process_loses_no_stream_and_no_byte() {
    again_and_again(libc::SIGKILL);
}

#[test]
fn a_stopped_process_loses_no_stream_and_no_byte() {
    again_and_again(libc::SIGTERM);
}

/// The time in which nobody lives is long, and the streams are closed in it.
#[test]
fn streams_end_while_no_process_lives() {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let mut bed = Bed::start(&topology, &[]);
    bed.under_traffic(100, |bed, _| {
        bed.steer.stop(libc::SIGKILL).unwrap();
        thread::sleep(Duration::from_secs(2));
    });
    bed.steer.start_again().unwrap();
    bed.expect_no_stream();
    assert_eq!(bed.metric("steer_streams_adopted_total", &[]), 0.0, "they were over");
    bed.under_traffic(10, |_, _| {});
    bed.expect_no_stream();
}
