//! What the programs of the packet splice cost per packet, by `BPF_PROG_TEST_RUN`: the best of some runs of a million each. The
//! figures include what the test run itself costs, as `egress, not marked` shows. Needs root and the BPF object:
//!
//! ```text
//! cargo run --release -p steer-tests --example packet_cost [PART-OF-A-NAME]
//! ```
#![allow(clippy::unwrap_used, reason = "a tool for developers")]

#[allow(dead_code, reason = "shared with the tests, which need more of it")]
#[path = "../tests/packet_program/support/mod.rs"]
mod support;

use proxy_common::flow::Direction;
use support::lab::{Hook, Input, Lab, in_namespace};
use support::packet::{Packet, options};
use support::session::{Family, Session};

const RUNS: usize = 5;
const PACKETS: u32 = 1_000_000;
const DIRECTION: Direction = Direction::ToUpstream;

fn main() {
    in_namespace(|lab| {
        println!("{:<40} {:>8} {:>8}", "nanoseconds per packet", "IPv4", "IPv6");
        let timestamps = || options::timestamps(1, 2);
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
                Box::new(|p| p.options = [options::bare_timestamps(1, 2), vec![1, 1]].concat()),
            ),
        ];
        for (name, change) in hits {
            report(lab, Hook::Ingress, name, |session| {
                let mut packet = session.packet(DIRECTION);
                change(&mut packet);
                packet
            });
        }
        report(lab, Hook::Ingress, "miss", |session| {
            let mut packet = session.packet(DIRECTION);
            packet.source.set_port(1);
            packet
        });
        report(lab, Hook::Egress, "egress, not marked", |session| session.own_packet(DIRECTION));
    });
}

fn report(lab: &mut Lab, hook: Hook, name: &str, packet: impl Fn(&Session) -> Packet) {
    if std::env::args().nth(1).is_some_and(|part| !name.contains(&part)) {
        return;
    }
    let [v4, v6] = Family::BOTH.map(|family| {
        // What one run leaves is the next one's packet.
        let session = Session::identity(family);
        lab.clear();
        lab.open(&session);
        let input = Input { frame: packet(&session).to_bytes(), ..Input::default() };
        let run = |_| lab.try_run(hook, &input, PACKETS, 0).unwrap().nanoseconds;
        (0..RUNS).map(run).min().unwrap()
    });
    println!("{name:<40} {v4:>8} {v6:>8}");
}
