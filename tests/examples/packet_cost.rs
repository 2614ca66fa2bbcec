//! Measures the cost of the packet splice's BPF programs per packet with `BPF_PROG_TEST_RUN`. The
//! result is the best of some runs of a million packets each. It includes the cost of the test run
//! itself, which `egress, not marked` shows. Also measures one tick of the timer that expires
//! streams. Needs root and the BPF object:
//!
//! ```text
//! cargo run --release -p steer-tests --example packet_cost [PART-OF-A-NAME]
//! ```
#![allow(clippy::unwrap_used, reason = "a tool for developers")]

#[allow(dead_code, reason = "shared with the tests, which need more of it")]
#[path = "../tests/packet_program/support/mod.rs"]
mod support;

use proxy_common::expiry::{Expiry, RECORDS_A_TICK};
use proxy_common::flow::Direction;
use support::lab::{Hook, Input, Lab, in_namespace, in_namespace_with};
use support::packet::{Packet, options};
use support::session::{Family, IDENTITY_TIMESTAMPS, Session};

const RUNS: usize = 5;
const PACKETS: u32 = 1_000_000;
const DIRECTION: Direction = Direction::ToUpstream;

fn main() {
    in_namespace(|lab| {
        println!("{:<40} {:>8} {:>8}", "nanoseconds per packet", "IPv4", "IPv6");
        let timestamps = || options::timestamps(IDENTITY_TIMESTAMPS.0, IDENTITY_TIMESTAMPS.1);
        type Change = Box<dyn Fn(&mut Packet)>;
        let hits: [(&str, Change); 5] = [
            (
                "hit, 64 bytes, timestamps",
                Box::new(move |p| (p.options, p.payload) = (timestamps(), vec![1; 64])),
            ),
            (
                "hit, 1448 bytes, timestamps",
                Box::new(move |p| (p.options, p.payload) = (timestamps(), vec![1; 1448])),
            ),
            (
                "hit, no payload, timestamps, 2 SACK",
                Box::new(move |p| p.options = [timestamps(), options::sack(&[(1, 2), (3, 4)])].concat()),
            ),
            ("hit, no options", Box::new(|_| {})),
            (
                "hit, timestamps in an unusual place",
                Box::new(|p| {
                    p.options =
                        [options::bare_timestamps(IDENTITY_TIMESTAMPS.0, IDENTITY_TIMESTAMPS.1), vec![1, 1]]
                            .concat()
                }),
            ),
        ];
        for (name, change) in hits {
            report(lab, Hook::Ingress, name, |session| {
                let mut packet = session.packet(DIRECTION);
                change(&mut packet);
                packet
            });
        }
        report_there_and_back(lab, &timestamps());
        report(lab, Hook::Ingress, "miss", |session| {
            let mut packet = session.packet(DIRECTION);
            packet.source.set_port(1);
            packet
        });
        report(lab, Hook::Egress, "egress, not marked", |session| session.own_packet(DIRECTION));
    });
    in_namespace_with(LAP, |lab| {
        println!("{:<40} {:>8}", "microseconds per tick of the timer", "");
        let due = Expiry { heartbeat_ns: 1, gone_after_ns: 1, orphan_timeout_ns: u64::MAX, linger_ns: 1 };
        look(lab, "a process lives", Expiry { gone_after_ns: u64::MAX, ..due });
        look(lab, "no process, free records", due);
        let session = Session::new(Family::V4);
        (0..LAP).for_each(|index| lab.set_record(index, &session.record));
        look(lab, "no process, living streams", due);
    });
    in_namespace_with(RECORDS_A_TICK, give_up);
}

/// So many records that few of them fit into the cache.
const LAP: u32 = 16 * RECORDS_A_TICK;
const LOOKS: u32 = 1600;

/// Every stream that a tick examines is given up in that tick.
fn give_up(lab: &mut Lab) {
    let due = Expiry { heartbeat_ns: 1, gone_after_ns: 1, orphan_timeout_ns: 1, linger_ns: 1 };
    let took = (0..RUNS).map(|_| {
        lab.set_expiry(Expiry { heartbeat_ns: 0, ..due });
        (0..RECORDS_A_TICK).for_each(|index| lab.open(&Session::numbered(Family::V4, index)));
        lab.set_expiry(due);
        let input = Input { frame: vec![0; 14], ..Input::default() };
        // One of the two ticks begins with the first record.
        (0..2).map(|_| lab.try_run(Hook::Expire, &input, 1, 0).unwrap().nanoseconds).max().unwrap()
    });
    println!("{:<40} {:>8.1}", "no process, streams given up", f64::from(took.min().unwrap()) / 1000.0);
}

fn look(lab: &mut Lab, name: &str, expiry: Expiry) {
    lab.set_expiry(expiry);
    let input = Input { frame: vec![0; 14], ..Input::default() };
    let run = |_| lab.try_run(Hook::Expire, &input, LOOKS, 0).unwrap().nanoseconds;
    let best = (0..RUNS).map(run).min().unwrap();
    println!("{name:<40} {:>8.1}", f64::from(best) / 1000.0);
}

/// The mean of both directions.
fn report_there_and_back(lab: &mut Lab, timestamps: &[u8]) {
    let session = Session::there_and_back();
    for payload in [64, 1428] {
        lab.clear();
        lab.open(&session);
        let packet =
            Packet { options: timestamps.to_vec(), payload: vec![1; payload], ..session.packet(DIRECTION) };
        let input = Input { frame: packet.to_bytes(), ..Input::default() };
        let run = |_| lab.try_run(Hook::Ingress, &input, PACKETS, 0).unwrap().nanoseconds;
        let best = (0..RUNS).map(run).min().unwrap();
        println!("{:<40} {best:>8}", format!("hit, other family, {payload} bytes"));
    }
}

fn report(lab: &mut Lab, hook: Hook, name: &str, packet: impl Fn(&Session) -> Packet) {
    if std::env::args().nth(1).is_some_and(|part| !name.contains(&part)) {
        return;
    }
    let [v4, v6] = Family::BOTH.map(|family| {
        // Each run gets the packet that the run before left. With the identity session that packet
        // does not change.
        let session = Session::identity(family);
        lab.clear();
        lab.open(&session);
        let input = Input { frame: packet(&session).to_bytes(), ..Input::default() };
        let run = |_| lab.try_run(hook, &input, PACKETS, 0).unwrap().nanoseconds;
        (0..RUNS).map(run).min().unwrap()
    });
    println!("{name:<40} {v4:>8} {v6:>8}");
}
