//! The SYN of a connection that is to have no timestamps.

use proxy_common::flow::Direction;
use proxy_common::stat::Stat;

use crate::support::lab::{Hook, Input, Lab, SYN_MARK, Verdict, in_namespace};
use crate::support::packet::{ACK, CWR, ECE, FIN, Packet, RST, SYN, options};
use crate::support::session::{Family, LOOPBACK, Session};
use crate::table::check_counts;

const MSS: [u8; 4] = [2, 4, 5, 180];
const SACK_PERMITTED: [u8; 2] = [4, 2];
const NOPS: [u8; 2] = [1, 1];
const SCALE: [u8; 4] = [1, 3, 3, 10];

/// The SYN of Linux, with these two bytes before the timestamps.
fn syn(family: Family, before: [u8; 2]) -> Packet {
    let options = [&MSS, &before[..], &options::bare_timestamps(0x1234_5678, 0), &SCALE].concat();
    Packet { flags: SYN, ack: 0, options, ..Session::new(family).own_packet(Direction::ToUpstream) }
}

fn marked(packet: &Packet) -> Input {
    Input { frame: packet.to_bytes(), mark: SYN_MARK, ..Input::default() }
}

/// Runs a packet of the local stack, and compares the counters. Returns the packet that left.
fn leaves(lab: &mut Lab, input: &Input, counts: &[Stat]) -> Vec<u8> {
    let before = lab.stats();
    let output = lab.run(Hook::Egress, input);
    check_counts(lab, &before, counts);
    assert_eq!((output.verdict, output.mark), (Verdict::Pass, input.mark));
    output.frame
}

#[test]
fn a_marked_syn_leaves_without_timestamps() {
    in_namespace(|lab| {
        for family in Family::BOTH {
            for before in [SACK_PERMITTED, NOPS] {
                for more in [0, ECE | CWR] {
                    let packet = Packet { flags: SYN | more, ..syn(family, before) };
                    // `parse` checks the checksums.
                    let left = Packet::parse(&leaves(lab, &marked(&packet), &[Stat::SynPlain]));
                    let options = [&MSS, &before[..], &[1; 10], &SCALE].concat();
                    assert_eq!(left, Packet { options, ..packet });
                }
            }
            // The kernel writes a repeated SYN anew. But a second program finds nothing to do.
            let plain = leaves(lab, &marked(&syn(family, NOPS)), &[Stat::SynPlain]);
            let again = Input { frame: plain.clone(), ..marked(&syn(family, NOPS)) };
            assert_eq!(leaves(lab, &again, &[]), plain);
        }
    });
}

#[test]
fn everything_else_leaves_as_it_is() {
    in_namespace(|lab| {
        for family in Family::BOTH {
            let syn = syn(family, SACK_PERMITTED);
            let timestamps = options::bare_timestamps(1, 0);
            let with = |options: &[&[u8]]| Packet { options: options.concat(), ..syn.clone() };
            let flags = |flags: u8| Packet { flags, ..syn.clone() };
            let packets = [
                flags(SYN | ACK),
                flags(SYN | RST),
                flags(SYN | FIN),
                flags(ACK),
                flags(0),
                with(&[]),
                with(&[&MSS, &SCALE]),
                with(&[&MSS, &SACK_PERMITTED, &NOPS, &SCALE]),
                // In another place, and malformed.
                with(&[&timestamps, &SACK_PERMITTED, &MSS]),
                with(&[&SCALE, &SACK_PERMITTED, &timestamps]),
                with(&[&MSS, &SACK_PERMITTED, &[8, 9], &timestamps[2..]]),
                with(&[&MSS, &[4, 3], &timestamps]),
                with(&[&[2, 0, 5, 180], &SACK_PERMITTED, &timestamps]),
            ];
            for packet in &packets {
                let input = marked(packet);
                assert_eq!(leaves(lab, &input, &[]), input.frame, "{packet:?}");
            }
            let marked = marked(&syn);
            for other in [
                Input { mark: 0, ..marked.clone() },
                Input { mark: SYN_MARK + 1, ..marked.clone() },
                // Of another host, which was forwarded.
                Input { ingress_ifindex: LOOPBACK, ..marked.clone() },
            ] {
                assert_eq!(leaves(lab, &other, &[]), other.frame);
            }
            if family == Family::V4 {
                let odd = Packet { ip_options: vec![1; 4], ..syn.clone() };
                let input = Input { frame: odd.to_bytes(), ..marked.clone() };
                assert_eq!(leaves(lab, &input, &[]), input.frame);
            }
            // The header says that there are more options than bytes.
            let mut frame = Packet { options: MSS.to_vec(), ..syn.clone() }.to_bytes();
            let offset = frame.len() - 4 - 8;
            frame[offset] = 0xa0;
            let input = Input { frame, ..marked };
            assert_eq!(leaves(lab, &input, &[]), input.frame);
        }
    });
}
