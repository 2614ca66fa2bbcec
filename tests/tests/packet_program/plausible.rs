//! Which numbers are plausible. A packet with other numbers is forwarded as well, because the other
//! peer judges it. But it changes nothing in the record.

use proxy_common::flow::{Direction, state};
use proxy_common::stat::Stat;

use crate::support::lab::{Hook, Input, Verdict, in_namespace};
use crate::support::packet::{ACK, FIN, Packet, RST, options};
use crate::support::session::{Family, Session};
use crate::table::{DOUBTED, Row, SPLICED, check, check_record};

/// The smallest window within which numbers are plausible.
const LEAST: u32 = 1 << 16;

#[test]
fn sequence_numbers() {
    in_namespace(|lab| check(lab, SEQUENCE));
}

const SEQUENCE: &[Row] = &[
    Row {
        name: "the end of the window",
        packet: |p, _| {
            p.seq = p.seq.wrapping_add(LEAST - 100);
            p.payload = vec![1; 100];
        },
        ..SPLICED
    },
    Row {
        name: "beyond the window",
        packet: |p, _| {
            p.seq = p.seq.wrapping_add(LEAST - 90);
            p.payload = vec![1; 100];
        },
        ..DOUBTED
    },
    Row {
        name: "one window back",
        packet: |p, _| {
            p.seq = p.seq.wrapping_sub(LEAST);
            p.payload = vec![1; 100];
        },
        ..SPLICED
    },
    Row {
        name: "more than one window back",
        packet: |p, _| {
            p.seq = p.seq.wrapping_sub(LEAST + 3);
            p.payload = vec![1; 100];
        },
        ..DOUBTED
    },
    Row {
        name: "a window that is scaled",
        session: |s, d| {
            let other = s.flow(d.opposite());
            (other.live.window_max, other.fixed.window_left) = (2000, 7);
        },
        packet: |p, _| {
            p.seq = p.seq.wrapping_add(2000 << 7).wrapping_sub(100);
            p.payload = vec![1; 100];
        },
        ..SPLICED
    },
    Row {
        name: "beyond a window that is scaled",
        session: |s, d| {
            let other = s.flow(d.opposite());
            (other.live.window_max, other.fixed.window_left) = (2000, 7);
        },
        packet: |p, _| {
            p.seq = p.seq.wrapping_add(2000 << 7).wrapping_sub(90);
            p.payload = vec![1; 100];
        },
        ..DOUBTED
    },
    Row { name: "half the space away", packet: |p, _| p.seq ^= 1 << 31, ..DOUBTED },
    Row {
        name: "without an acknowledgement",
        packet: |p, _| {
            p.flags = 0;
            p.payload = vec![1; 5];
        },
        ..DOUBTED
    },
];

#[test]
fn acknowledgement_numbers() {
    in_namespace(|lab| check(lab, ACKNOWLEDGEMENT));
}

const ACKNOWLEDGEMENT: &[Row] = &[
    Row {
        name: "far ahead of what was sent",
        packet: |p, _| p.ack = p.ack.wrapping_add(LEAST + 1),
        ..DOUBTED
    },
    Row { name: "far back", packet: |p, _| p.ack = p.ack.wrapping_sub(LEAST + 1), ..DOUBTED },
    Row { name: "half the space away", packet: |p, _| p.ack ^= 1 << 31, ..DOUBTED },
];

/// In a hand-over the local socket has sent and acknowledged bytes that the program did not see.
#[test]
fn in_a_hand_over_the_local_socket_counts() {
    in_namespace(|lab| check(lab, HAND_OVER));
}

const HAND_OVER: &[Row] = &[
    Row {
        name: "an acknowledgement of the local socket's bytes",
        session: |s, d| {
            s.record.state = state::HAND_OVER;
            let live = &mut s.flow(d).live;
            live.own_end = live.own_end.wrapping_add(10_000);
        },
        packet: |p, _| p.ack = p.ack.wrapping_add(10_000),
        ..SPLICED
    },
    Row {
        name: "bytes after those that the local socket has taken",
        session: |s, d| {
            s.record.state = state::HAND_OVER;
            let live = &mut s.flow(d).live;
            live.seq_end = live.seq_end.wrapping_add(50_000);
        },
        packet: |p, _| {
            p.seq = p.seq.wrapping_add(40_000);
            p.payload = vec![2; 1000];
        },
        ..SPLICED
    },
];

/// A forger knows addresses and ports, but not the numbers. A hundred packets of each kind change
/// nothing in the record except for the count of packets.
#[test]
fn forged_packets_change_nothing() {
    const FORGED: u32 = 100;
    in_namespace(|lab| {
        for family in Family::BOTH {
            for direction in Direction::BOTH {
                let session = Session::new(family);
                lab.clear();
                lab.open(&session);
                let before = lab.stats();
                for i in 0..FORGED {
                    let away = (1 << 17) + i * 0x0280_0001;
                    let honest = Packet { options: options::timestamps(i, i), ..session.packet(direction) };
                    let seq = honest.seq.wrapping_add(away);
                    for packet in [
                        Packet { seq, payload: vec![1; 400], ..honest.clone() },
                        Packet { seq, flags: ACK | FIN, ..honest.clone() },
                        Packet { seq, flags: RST, ..honest.clone() },
                        Packet { seq, flags: RST | ACK, ..honest.clone() },
                        Packet {
                            ack: honest.ack.wrapping_add(away),
                            payload: vec![1; 400],
                            ..honest.clone()
                        },
                        Packet { ack: honest.ack.wrapping_add(away), flags: ACK | FIN, ..honest.clone() },
                    ] {
                        let output =
                            lab.run(Hook::Ingress, &Input { frame: packet.to_bytes(), ..Input::default() });
                        assert_eq!(output.verdict, Verdict::Redirect);
                        assert_eq!(Packet::parse(&output.frame), session.rewritten(direction, &packet));
                    }
                }
                let mut expected = session.record;
                expected.flows[direction as usize].live.packets = 6 * u64::from(FORGED);
                check_record(lab.record(session.index), expected);
                assert_eq!(lab.events(), []);
                let count = |stat: Stat| lab.stats()[stat.number() as usize] - before[stat.number() as usize];
                assert_eq!(count(Stat::Implausible) + count(Stat::RstUnproven), 6 * u64::from(FORGED));
            }
        }
    });
}
