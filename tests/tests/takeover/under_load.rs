//! Several takeovers in a row, under load.

use std::thread;
use std::time::{Duration, Instant};

use steer_tests::require;
use steer_tests::steer::Attach;
use steer_tests::topology::Topology;

use crate::bed::{Bed, Ends, HANG, PACKET, failpoints, v4, v6};
use crate::load::Size;

/// The long form has 20 takeovers with 500 streams.
fn again_and_again(attach: Attach, ends: Ends, times: u32, streams: u32) {
    if !require::root() {
        return;
    }
    let (times, streams) = if require::long() { (20, 500) } else { (times, streams) };
    let size = Size { streams, short_streams: 4, clients: 16 };
    let topology = Topology::new(1).unwrap();
    let mut bed = Bed::start_attaching(attach, &topology, ends, PACKET);
    bed.under_load(size, |bed, load| {
        bed.expect_spliced(streams);
        thread::sleep(Duration::from_millis(500));
        for time in 1..=times {
            let before = load.take_slowest();
            let begin = Instant::now();
            let mut old = bed.steer.take_over().unwrap();
            let took = begin.elapsed();
            thread::sleep(Duration::from_millis(500));
            let at = load.take_slowest();
            bed.expect_spliced(streams);
            assert!(old.wait(HANG).unwrap().success(), "{}", old.tail());
            eprintln!("takeover {time}: {took:?}; slowest first request {before:?} before, {at:?} at it");
        }
    });
    bed.expect_no_stream();
}

#[test]
fn nothing_is_refused_or_lost() {
    again_and_again(Attach::Links, v4(), 4, 100);
}

#[test]
fn nothing_is_refused_or_lost_with_ipv6() {
    again_and_again(Attach::Links, v6(), 1, 20);
}

#[test]
fn nothing_is_refused_or_lost_before_linux_6_6() {
    if failpoints().is_some() {
        again_and_again(Attach::Filters, v4(), 2, 50);
    }
}
