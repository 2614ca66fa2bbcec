//! Packets that are not spliced pass unchanged: other packets, other shapes, other states.

use proxy_common::flow::{Direction, flags, state};
use proxy_common::stat::Stat;

use crate::support::lab::{Hook, Input, Verdict, in_namespace};
use crate::support::packet::{ETHERNET, MACS, Packet, options};
use crate::support::session::{Family, Session};
use crate::table::{IGNORED, Row, check, check_counts, check_record};

#[test]
fn states() {
    in_namespace(|lab| check(lab, STATES));
}

const STATES: &[Row] = &[
    Row {
        name: "before the splice",
        session: |s, _| s.record.state = state::OFF,
        counts: &[Stat::PassOff],
        ..IGNORED
    },
    Row {
        name: "after the tuple was taken",
        session: |s, _| s.record.state = state::DEAD,
        counts: &[Stat::PassDead],
        ..IGNORED
    },
    Row {
        name: "after Steer has ended it",
        session: |s, _| {
            s.record.state = state::RESET;
            s.record.flags |= flags::GIVEN_UP;
        },
        counts: &[Stat::PassOff],
        ..IGNORED
    },
];

#[test]
fn strangers() {
    in_namespace(|lab| check(lab, STRANGERS));
}

const STRANGERS: &[Row] = &[
    Row { name: "another source port", packet: |p, _| p.source.set_port(1), ..IGNORED },
    Row { name: "another destination port", packet: |p, _| p.destination.set_port(1), ..IGNORED },
    Row {
        name: "another source",
        packet: |p, _| {
            let ip = p.destination.ip();
            p.source.set_ip(ip);
        },
        ..IGNORED
    },
    Row {
        name: "another destination",
        packet: |p, _| {
            let ip = p.source.ip();
            p.destination.set_ip(ip);
        },
        ..IGNORED
    },
    Row {
        name: "backwards",
        packet: |p, _| (p.source, p.destination) = (p.destination, p.source),
        ..IGNORED
    },
];

#[test]
fn shapes_that_may_be_of_a_flow_and_are_not_rewritten() {
    in_namespace(|lab| check(lab, SHAPES));
}

fn is_v4(input: &Input) -> bool {
    input.frame[12..14] == [8, 0]
}

/// The offset of TCP in the frame.
fn tcp(input: &Input) -> usize {
    ETHERNET + if is_v4(input) { 20 } else { 40 }
}

/// Sets the byte whose upper half is the length of TCP's header in words.
fn set_header_len(input: &mut Input, byte: u8) {
    let at = tcp(input) + 12;
    input.frame[at] = byte;
}

/// Cuts the frame `len` bytes after the start of TCP's header.
fn cut_tcp(input: &mut Input, len: usize) {
    let end = tcp(input) + len;
    input.frame.truncate(end);
}

/// A packet of a flow that passes unchanged.
const ODD: Row = Row { counts: &[Stat::PassShape], ..IGNORED };

const SHAPES: &[Row] = &[
    Row { name: "a TCP header of four words", input: |i| set_header_len(i, 0x40), ..ODD },
    Row { name: "a TCP header of no words", input: |i| set_header_len(i, 0), ..ODD },
    Row { name: "a TCP header beyond the packet", input: |i| set_header_len(i, 0xf0), ..ODD },
    Row {
        name: "a TCP header beyond the packet, inside the frame",
        packet: |p, _| p.trailer = vec![0; 100],
        input: |i| set_header_len(i, 0xf0),
        ..ODD
    },
    Row {
        name: "a packet longer than the frame",
        packet: |p, _| p.payload = vec![1; 500],
        input: |i| i.frame.truncate(400),
        ..ODD
    },
    Row {
        name: "options cut off",
        packet: |p, _| p.options = options::timestamps(1, 2),
        input: |i| cut_tcp(i, 25),
        ..ODD
    },
    Row {
        name: "an IP length shorter than TCP's header",
        input: |i| if is_v4(i) { i.frame[17] = 39 } else { i.frame[19] = 19 },
        ..ODD
    },
    Row { name: "a frame for another MAC address", packet: |p, _| p.macs[5] = 9, ..ODD },
];

/// Without a TCP header at its place, nobody can tell whether the packet belongs to a flow. Such
/// packets are not counted.
#[test]
fn shapes_that_cannot_be_of_a_flow() {
    in_namespace(|lab| check(lab, OTHERS));
}

const OTHERS: &[Row] = &[
    Row { name: "a TCP header that is cut", input: |i| cut_tcp(i, 19), ..IGNORED },
    Row { name: "no TCP header at all", input: |i| cut_tcp(i, 0), ..IGNORED },
    Row { name: "UDP", input: |i| if is_v4(i) { i.frame[23] = 17 } else { i.frame[20] = 17 }, ..IGNORED },
    Row { name: "another version of IP", input: |i| i.frame[14] ^= 0x20, ..IGNORED },
    Row {
        name: "an EtherType of neither",
        input: |i| i.frame[12..14].copy_from_slice(&[0x88, 0xcc]),
        ..IGNORED
    },
];

#[test]
fn a_tagged_frame_is_not_for_us() {
    in_namespace(|lab| {
        for family in Family::BOTH {
            let session = Session::new(family);
            lab.clear();
            lab.open(&session);
            let untagged = session.packet(Direction::ToUpstream).to_bytes();
            let frame = [&untagged[..12], &[0x81, 0, 0, 5], &untagged[12..]].concat();
            let before = lab.stats();
            let output = lab.run(Hook::Ingress, &Input { frame: frame.clone(), ..Input::default() });
            assert_eq!((output.verdict, output.frame), (Verdict::Pass, frame));
            check_counts(lab, &before, &[]);
            check_record(lab.record(session.index), session.record);
        }
    });
}

#[test]
fn an_arp_request_passes() {
    in_namespace(|lab| {
        let frame = [&MACS[..], &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &[0; 40]].concat();
        let output = lab.run(Hook::Ingress, &Input { frame: frame.clone(), ..Input::default() });
        assert_eq!((output.verdict, output.frame), (Verdict::Pass, frame));
    });
}

/// A key may exist for a moment after its record was freed.
#[test]
fn a_key_to_a_record_beyond_the_map_passes() {
    in_namespace(|lab| {
        let mut session = Session::new(Family::V4);
        session.index = crate::support::lab::RECORDS - 1;
        lab.open(&session);
        lab.point_keys_at(&session, crate::support::lab::RECORDS);
        let frame = Packet { payload: vec![1], ..session.packet(Direction::ToUpstream) }.to_bytes();
        let output = lab.run(Hook::Ingress, &Input { frame: frame.clone(), ..Input::default() });
        assert_eq!((output.verdict, output.frame), (Verdict::Pass, frame));
    });
}
