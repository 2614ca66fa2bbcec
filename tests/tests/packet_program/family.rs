//! Packets between an IPv4 peer and an IPv6 peer.

use proxy_common::flow::{Direction, output};

use crate::forward::{LENGTHS, NUMBERS, STRIPPED, WINDOWS};
use crate::support::lab::{Hook, Input, Lab, Verdict, in_namespace};
use crate::support::packet::Packet;
use crate::support::session::{Family, Session};
use crate::table::{Expect, Row, SPLICED, check_counts, check_row};

const PAIRS: [[Family; 2]; 2] = [[Family::V4, Family::V6], [Family::V6, Family::V4]];

/// Tries every row between both pairs, in both directions.
fn check(lab: &mut Lab, rows: &[Row]) {
    for row in rows {
        for [client, endpoint] in PAIRS {
            for direction in Direction::BOTH {
                eprintln!("{} ({client:?} to {endpoint:?}, {direction:?})", row.name);
                check_row(lab, row, Session::between(client, endpoint), direction);
            }
        }
    }
}

#[test]
fn plain_packets_change_their_ip_version_and_nothing_else() {
    in_namespace(|lab| {
        for rows in [NUMBERS, WINDOWS, STRIPPED, LENGTHS, SIZES] {
            check(lab, rows);
        }
    });
}

const SIZES: &[Row] = &[
    Row { name: "the largest packet that may be cut", packet: |p, _| p.payload = vec![9; 1220], ..SPLICED },
    Row { name: "a packet that must not be cut", packet: |p, _| p.payload = vec![9; 1221], ..SPLICED },
    Row { name: "the last hop", packet: |p, _| p.ttl = 1, ..SPLICED },
    Row {
        name: "to a local peer: MAC addresses as on loopback",
        session: |s, d| s.flow(d).fixed.output = output::OTHER_FAMILY_LOOPBACK,
        packet: |p, _| p.payload = vec![1; 100],
        expect: Expect::Rewritten(|p| p.macs = [0; 12]),
        ..SPLICED
    },
];

#[test]
fn a_packet_that_goes_to_the_other_version_and_back_is_what_it_was() {
    in_namespace(|lab| {
        let session = Session::there_and_back();
        lab.open(&session);
        let packet =
            Packet { id: 0, payload: vec![1; 1428], ttl: 64, ..session.packet(Direction::ToUpstream) };
        let input = Input { frame: packet.to_bytes(), ..Input::default() };
        let [there, back] = [1, 2].map(|runs| lab.try_run(Hook::Ingress, &input, runs, 0).unwrap().frame);
        assert!(Packet::parse(&there).source.is_ipv6());
        assert_eq!(Packet::parse(&back), packet);
    });
}

/// The local stack then ends the stream.
#[test]
fn pieces_go_to_the_local_stack() {
    in_namespace(|lab| {
        for [client, endpoint] in PAIRS {
            let session = Session::between(client, endpoint);
            let mut packet = session.packet(Direction::ToUpstream);
            packet.fragment = if client == Family::V4 { 0x2000 } else { 1 };
            packet.payload = vec![1; 64];
            let input = Input { frame: packet.to_bytes(), ..Input::default() };
            lab.clear();
            lab.open(&session);
            let counted = lab.stats();
            let output = lab.run(Hook::Ingress, &input);
            assert_eq!((output.verdict, output.frame), (Verdict::Pass, input.frame));
            check_counts(lab, &counted, &[]);
        }
    });
}
