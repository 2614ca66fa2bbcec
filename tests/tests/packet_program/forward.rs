//! Plain packets of a spliced session.

use proxy_common::flow::{Direction, flags, output};
use proxy_common::stat::Stat;

use crate::support::lab::{Hook, Input, Verdict, in_namespace};
use crate::support::packet::{ACK, CWR, ECE, PSH, Packet, URG, options};
use crate::support::session::{Family, IDENTITY_TIMESTAMPS, Session};
use crate::table::{Expect, Row, SPLICED, check};

#[test]
fn numbers_addresses_and_ports() {
    in_namespace(|lab| check(lab, NUMBERS));
}

pub(crate) const NUMBERS: &[Row] = &[
    Row { name: "a bare acknowledgement", ..SPLICED },
    Row { name: "one byte", packet: |p, _| p.payload = vec![1], ..SPLICED },
    Row { name: "an odd number of bytes", packet: |p, _| p.payload = vec![0xff; 1447], ..SPLICED },
    Row {
        name: "bytes across the wrap",
        packet: |p, _| p.payload = (0..=255).cycle().take(1400).collect(),
        ..SPLICED
    },
    Row {
        name: "bytes up to the last sequence number",
        packet: |p, _| p.payload = vec![3; 0u32.wrapping_sub(p.seq).min(1400) as usize],
        ..SPLICED
    },
    Row {
        name: "an acknowledgement of what the other side sent",
        session: |s, d| {
            let live = &mut s.flow(d.opposite()).live;
            live.seq_end = live.seq_end.wrapping_add(5000);
        },
        packet: |p, _| p.ack = p.ack.wrapping_add(5000),
        ..SPLICED
    },
    Row {
        name: "an acknowledgement of a part",
        session: |s, d| {
            let live = &mut s.flow(d.opposite()).live;
            live.seq_end = live.seq_end.wrapping_add(5000);
        },
        packet: |p, _| p.ack = p.ack.wrapping_add(1234),
        ..SPLICED
    },
    Row { name: "an old acknowledgement", packet: |p, _| p.ack = p.ack.wrapping_sub(900), ..SPLICED },
    Row {
        name: "a retransmission",
        packet: |p, _| {
            p.seq = p.seq.wrapping_sub(1000);
            p.payload = vec![9; 1000];
        },
        ..SPLICED
    },
    Row {
        name: "a retransmission followed by new bytes",
        packet: |p, _| {
            p.seq = p.seq.wrapping_sub(100);
            p.payload = vec![9; 300];
        },
        ..SPLICED
    },
    Row { name: "a keepalive", packet: |p, _| p.seq = p.seq.wrapping_sub(1), ..SPLICED },
    Row {
        name: "a keepalive with a byte",
        packet: |p, _| {
            p.seq = p.seq.wrapping_sub(1);
            p.payload = vec![0];
        },
        ..SPLICED
    },
    Row {
        name: "a segment after a gap",
        packet: |p, _| {
            p.seq = p.seq.wrapping_add(1400);
            p.payload = vec![7; 1400];
        },
        ..SPLICED
    },
    Row {
        name: "PSH and URG",
        packet: |p, _| {
            p.flags = ACK | PSH | URG;
            p.urgent = 9;
            p.payload = vec![7; 10];
        },
        ..SPLICED
    },
    Row { name: "a marked packet of class AF41", packet: |p, _| p.traffic_class = 0x88 | 3, ..SPLICED },
    Row { name: "ECE and CWR", packet: |p, _| p.flags = ACK | ECE | CWR, ..SPLICED },
    Row {
        name: "a fragmentable packet",
        packet: |p, _| {
            if p.source.is_ipv4() {
                p.fragment = 0
            }
        },
        ..SPLICED
    },
];

#[test]
fn windows() {
    in_namespace(|lab| check(lab, WINDOWS));
}

pub(crate) const WINDOWS: &[Row] = &[
    Row { name: "zero", packet: |p, _| p.window = 0, ..SPLICED },
    Row { name: "a larger window", packet: |p, _| p.window = 65_535, ..SPLICED },
    Row {
        name: "to a smaller scale",
        session: |s, d| (s.flow(d).fixed.window_left, s.flow(d).fixed.window_right) = (7, 4),
        packet: |p, _| p.window = 501,
        ..SPLICED
    },
    Row {
        name: "to a smaller scale, clipped",
        session: |s, d| s.flow(d).fixed.window_left = 14,
        packet: |p, _| p.window = 60_000,
        ..SPLICED
    },
    Row {
        name: "to a larger scale, rounded down",
        session: |s, d| s.flow(d).fixed.window_right = 9,
        packet: |p, _| p.window = 1023,
        ..SPLICED
    },
    Row {
        name: "to a larger scale, less than a unit left",
        session: |s, d| s.flow(d).fixed.window_right = 14,
        packet: |p, _| p.window = 16_383,
        ..SPLICED
    },
];

#[test]
fn congestion_marks_are_taken_off_when_the_other_connection_has_none() {
    in_namespace(|lab| check(lab, STRIPPED));
}

pub(crate) const STRIPPED: &[Row] = &[
    Row {
        name: "ECT(0)",
        session: |s, _| s.record.flags |= flags::STRIP_ECN,
        packet: |p, _| p.traffic_class = 0xb8 | 2,
        counts: &[Stat::Spliced, Stat::EcnStripped],
        ..SPLICED
    },
    Row {
        name: "CE, ECE and CWR",
        session: |s, _| s.record.flags |= flags::STRIP_ECN,
        packet: |p, _| {
            p.traffic_class = 3;
            p.flags = ACK | ECE | CWR;
            p.payload = vec![1, 2, 3];
        },
        counts: &[Stat::Spliced, Stat::EcnStripped],
        ..SPLICED
    },
    Row {
        name: "ECE alone",
        session: |s, _| s.record.flags |= flags::STRIP_ECN,
        packet: |p, _| p.flags = ACK | ECE,
        counts: &[Stat::Spliced, Stat::EcnStripped],
        ..SPLICED
    },
    Row {
        name: "nothing to strip",
        session: |s, _| s.record.flags |= flags::STRIP_ECN,
        packet: |p, _| p.traffic_class = 0xfc,
        ..SPLICED
    },
];

#[test]
fn lengths() {
    in_namespace(|lab| check(lab, LENGTHS));
}

pub(crate) const LENGTHS: &[Row] = &[
    Row {
        name: "the padding of a short frame is not payload",
        packet: |p, _| p.trailer = vec![0; 6],
        ..SPLICED
    },
    Row {
        name: "a long trailer is not payload",
        packet: |p, _| {
            p.payload = vec![5; 5];
            p.trailer = vec![0xee; 61];
        },
        ..SPLICED
    },
    Row {
        name: "a super-packet of segments",
        packet: |p, _| p.payload = vec![0x33; 3000],
        input: |i| i.gso_size = 500,
        ..SPLICED
    },
    Row {
        name: "BIG TCP: a super-packet without length",
        packet: |p, _| {
            p.payload = vec![0x33; 3001];
            p.ip_length = Some(0);
            p.options = options::timestamps(1, 2);
        },
        input: |i| i.gso_size = 1000,
        ..SPLICED
    },
];

#[test]
fn ways_out() {
    in_namespace(|lab| check(lab, WAYS_OUT));
}

const WAYS_OUT: &[Row] = &[
    Row {
        name: "to a local peer: MAC addresses as on loopback",
        session: |s, d| s.flow(d).fixed.output = output::LOOPBACK,
        packet: |p, _| p.payload = vec![1; 100],
        expect: Expect::Rewritten(|p| p.macs = [0; 12]),
        ..SPLICED
    },
    Row {
        name: "both peers are local: in place",
        session: |s, d| s.flow(d).fixed.output = output::IN_PLACE,
        packet: |p, _| p.payload = vec![1; 100],
        expect: Expect::InPlace,
        ..SPLICED
    },
];

#[test]
fn a_session_that_changes_nothing_leaves_packets_as_they_are() {
    in_namespace(|lab| {
        for family in Family::BOTH {
            let session = Session::identity(family);
            lab.clear();
            lab.open(&session);
            let packet = Packet {
                ttl: 64,
                options: options::timestamps(IDENTITY_TIMESTAMPS.0, IDENTITY_TIMESTAMPS.1),
                payload: vec![1, 2, 3],
                ..session.packet(Direction::ToUpstream)
            };
            let frame = packet.to_bytes();
            let output = lab.run(Hook::Ingress, &Input { frame: frame.clone(), ..Input::default() });
            assert_eq!((output.verdict, output.frame), (Verdict::Redirect, frame));
        }
    });
}
