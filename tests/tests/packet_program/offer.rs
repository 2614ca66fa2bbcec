//! The SYN of a client that connects where clients are to have no timestamps.

use std::net::SocketAddr;

use proxy_common::flow::{Direction, event, state};
use proxy_common::stat::Stat;

use crate::support::lab::{Hook, Input, Lab, Verdict, in_namespace};
use crate::support::packet::{ACK, CWR, ECE, FIN, Packet, RST, SYN, options};
use crate::support::session::{Family, Session};
use crate::table::check_counts;

const MSS: [u8; 4] = [2, 4, 5, 180];
const SACK_PERMITTED: [u8; 2] = [4, 2];
const NOPS: [u8; 2] = [1, 1];
const SCALE: [u8; 4] = [1, 3, 3, 10];
/// An option of 14 bytes that nobody knows.
const UNKNOWN: [u8; 14] = [254, 14, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0];

fn offer() -> Vec<u8> {
    options::bare_timestamps(0x1234_5678, 0)
}

type Options = &'static [&'static [u8]];

/// Options before the offer, and after it.
const ORDERS: [(Options, Options); 7] = [
    // Linux, macOS, Windows and FreeBSD.
    (&[&MSS, &SACK_PERMITTED], &[&SCALE]),
    (&[&MSS, &SCALE, &NOPS], &[&SACK_PERMITTED, &[0, 0]]),
    (&[&MSS, &SCALE, &SACK_PERMITTED], &[]),
    // Alone, at an odd place, and at the end.
    (&[], &[&NOPS]),
    (&[&[1]], &[&[1]]),
    (&[&[1], &MSS], &[&[1]]),
    (&[&MSS, &UNKNOWN, &[1; 12]], &[]),
];

fn syn(session: &Session, options: &[&[u8]]) -> Packet {
    let options = options.concat();
    Packet { flags: SYN, ack: 0, options, ..session.packet(Direction::ToUpstream) }
}

fn input(packet: &Packet) -> Input {
    Input { frame: packet.to_bytes(), ..Input::default() }
}

/// Runs a packet that arrives, and compares the counters. Returns the packet that passes. The
/// kernel compares its sum over the packet with the one that the program has left.
fn passes(lab: &Lab, input: &Input, counts: &[Stat]) -> Vec<u8> {
    let before = lab.stats();
    let output = lab.run_summed(Hook::Ingress, input).unwrap();
    check_counts(lab, &before, counts);
    assert_eq!(output.verdict, Verdict::Pass);
    output.frame
}

#[test]
fn a_syn_loses_its_timestamps_in_every_order_of_options() {
    in_namespace(|lab| {
        for family in Family::BOTH {
            let session = Session::new(family);
            lab.take_timestamps(session.front, u64::MAX);
            for (before, after) in ORDERS {
                let options = |middle: &[u8]| [&before.concat(), middle, &after.concat()].concat();
                for (more, payload) in [(0, &b""[..]), (ECE | CWR, b""), (0, b"early data")] {
                    let with = |middle: &[u8]| Packet {
                        flags: SYN | more,
                        payload: payload.to_vec(),
                        ..syn(&session, &[&options(middle)])
                    };
                    let sent = input(&with(&offer()));
                    // `parse` checks the checksums.
                    let got = passes(lab, &sent, &[Stat::SynPlainIn]);
                    assert_eq!(Packet::parse(&got), with(&[1; 10]));
                    // A second program, or an interface below, finds nothing to do.
                    let again = Input { frame: got.clone(), ..Input::default() };
                    assert_eq!(passes(lab, &again, &[]), got);
                }
            }
        }
    });
}

#[test]
fn other_destinations_keep_their_timestamps() {
    in_namespace(|lab| {
        for family in Family::BOTH {
            let session = Session::new(family);
            let packet = input(&syn(&session, &[&MSS, &SACK_PERMITTED, &offer(), &SCALE]));
            assert_eq!(passes(lab, &packet, &[]), packet.frame);
            let front = session.front;
            lab.take_timestamps(SocketAddr::new(front.ip(), front.port() ^ 1), u64::MAX);
            lab.take_timestamps(SocketAddr::new(session.back.ip(), front.port()), u64::MAX);
            assert_eq!(passes(lab, &packet, &[]), packet.frame);
            // What is over, is over.
            lab.take_timestamps(front, 1);
            assert_eq!(passes(lab, &packet, &[]), packet.frame);
            lab.take_timestamps(front, u64::MAX);
            passes(lab, &packet, &[Stat::SynPlainIn]);
        }
    });
}

#[test]
fn what_is_no_offer_passes_as_it_is() {
    in_namespace(|lab| {
        for family in Family::BOTH {
            let session = Session::new(family);
            lab.take_timestamps(session.front, u64::MAX);
            let usual = syn(&session, &[&MSS, &SACK_PERMITTED, &offer(), &SCALE]);
            let with = |options: &[&[u8]]| syn(&session, options);
            let flags = |flags: u8| Packet { flags, ..usual.clone() };
            let packets = [
                flags(SYN | ACK),
                flags(SYN | RST),
                flags(SYN | FIN),
                flags(ACK),
                flags(0),
                with(&[]),
                with(&[&MSS, &SCALE]),
                // After the end, and malformed.
                with(&[&[0, 0], &offer()]),
                with(&[&MSS, &SACK_PERMITTED, &[8, 9], &offer()[2..]]),
                with(&[&[2, 0, 5, 180], &SACK_PERMITTED, &offer()]),
                with(&[&[2, 1, 5, 180], &SACK_PERMITTED, &offer()]),
                with(&[&[2, 40, 5, 180], &SACK_PERMITTED, &offer()]),
                with(&[&MSS, &SCALE, &offer()[..8]]),
                // In the body of another option.
                with(&[&UNKNOWN, &NOPS]),
            ];
            for packet in &packets {
                let input = input(packet);
                assert_eq!(passes(lab, &input, &[]), input.frame, "{packet:?}");
            }
            if family == Family::V4 {
                let odd = input(&Packet { ip_options: vec![1; 4], ..usual.clone() });
                assert_eq!(passes(lab, &odd, &[]), odd.frame);
            }
            // The header says that there are more options than bytes.
            let mut frame = Packet { options: MSS.to_vec(), payload: Vec::new(), ..usual }.to_bytes();
            let offset = frame.len() - 4 - 8;
            frame[offset] = 0xa0;
            let cut = Input { frame, ..Input::default() };
            let output = lab.run(Hook::Ingress, &cut);
            assert_eq!((output.verdict, output.frame), (Verdict::Pass, cut.frame));
        }
    });
}

/// The new connection of a client that uses its port again.
#[test]
fn a_syn_that_takes_the_tuple_of_a_stream_keeps_its_timestamps() {
    in_namespace(|lab| {
        for family in Family::BOTH {
            let mut session = Session::new(family);
            session.record.state = state::FINISHED;
            lab.clear();
            lab.open(&session);
            lab.take_timestamps(session.front, u64::MAX);
            let packet = input(&syn(&session, &[&MSS, &SACK_PERMITTED, &offer(), &SCALE]));
            assert_eq!(passes(lab, &packet, &[Stat::Reused]), packet.frame);
            assert!(lab.events().iter().any(|event| event.kind == event::REUSED));
            // The tuple is free now.
            passes(lab, &packet, &[Stat::SynPlainIn]);
        }
    });
}
