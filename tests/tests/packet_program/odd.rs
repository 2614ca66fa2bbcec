//! Packets that are not plain: with IP options or extension headers. Also FINs and RSTs with wrong
//! checksums.

use proxy_common::flow::{Direction, event, flags, state};
use proxy_common::stat::Stat;

use crate::support::lab::{Hook, Input, Lab, MARK, Verdict, in_namespace};
use crate::support::packet::{ACK, ETHERNET, FIN, Packet, RST, checksum, options, u16_at};
use crate::support::session::{Family, Session};
use crate::table::{believed, check_counts, check_record};

/// Values of the next-header field.
pub(crate) const HOP_BY_HOP: u8 = 0;
pub(crate) const TCP: u8 = 6;
const ROUTING: u8 = 43;
pub(crate) const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;

pub(crate) fn is_v4(frame: &[u8]) -> bool {
    frame[12..14] == [8, 0]
}

/// The offset of TCP in a plain frame.
pub(crate) fn tcp(frame: &[u8]) -> usize {
    ETHERNET + if is_v4(frame) { 20 } else { 40 }
}

/// Inserts bytes after the IP header of a plain frame, and corrects the header. (IPv6: the bytes
/// begin with a header of kind `first`.)
pub(crate) fn with_extra(frame: &[u8], first: u8, extra: &[u8]) -> Vec<u8> {
    let at = tcp(frame);
    let mut odd = [&frame[..at], extra, &frame[at..]].concat();
    let ip = &mut odd[ETHERNET..];
    if is_v4(frame) {
        ip[0] = 0x45 + (extra.len() / 4) as u8;
        let length = u16_at(ip, 2) + extra.len() as u16;
        ip[2..4].copy_from_slice(&length.to_be_bytes());
    } else {
        let length = u16_at(ip, 4) + extra.len() as u16;
        ip[4..6].copy_from_slice(&length.to_be_bytes());
        ip[6] = first;
    }
    sum_up_v4(&mut odd);
    odd
}

/// Corrects the checksum of an IPv4 header.
pub(crate) fn sum_up_v4(frame: &mut [u8]) {
    if is_v4(frame) {
        let ip = &mut frame[ETHERNET..];
        let len = usize::from(ip[0] & 0xf) * 4;
        ip[10..12].fill(0);
        let sum = checksum(&ip[..len]);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
    }
}

/// An extension header of `words` times eight bytes, followed by `next`.
pub(crate) fn extension(next: u8, words: u8, type_and_left: [u8; 2]) -> Vec<u8> {
    let mut header = vec![1; usize::from(words) * 8];
    header[..4].copy_from_slice(&[next, words - 1, type_and_left[0], type_and_left[1]]);
    header
}

/// What a packet may carry before TCP: options for IPv4. For IPv6 a chain of extension headers,
/// with the kind of its first header.
fn carried(family: Family) -> Vec<(u8, Vec<u8>)> {
    match family {
        Family::V4 => [1, 2, 3, 10].map(|words| (TCP, vec![1; words * 4])).to_vec(),
        Family::V6 => vec![
            (DESTINATION, extension(TCP, 1, [1, 4])),
            (HOP_BY_HOP, extension(TCP, 3, [1, 20])),
            (ROUTING, extension(TCP, 3, [0, 0])),
            (HOP_BY_HOP, [extension(DESTINATION, 1, [1, 4]), extension(TCP, 2, [1, 12])].concat()),
            // A fragment header of a packet in one piece.
            (FRAGMENT, vec![TCP, 0, 0, 0, 1, 2, 3, 4]),
            (HOP_BY_HOP, [extension(FRAGMENT, 1, [1, 4]), vec![TCP, 0, 0, 0, 1, 2, 3, 4]].concat()),
            (DESTINATION, extension(TCP, 250, [1, 4])),
        ],
    }
}

pub(crate) fn data(session: &Session, direction: Direction) -> Packet {
    Packet {
        payload: (0..700).map(|i| i as u8).collect(),
        options: options::timestamps(1, 2),
        ..session.packet(direction)
    }
}

pub(crate) fn input(frame: &[u8]) -> Input {
    Input { frame: frame.to_vec(), ..Input::default() }
}

pub(crate) fn each(mut test: impl FnMut(&mut Lab, Family, Direction) + Send) {
    in_namespace(|lab| {
        for family in Family::BOTH {
            for direction in Direction::BOTH {
                eprintln!("{family:?}, {direction:?}");
                test(lab, family, direction);
            }
        }
    });
}

pub(crate) fn open(lab: &mut Lab, session: &Session) -> Vec<u64> {
    lab.clear();
    lab.open(session);
    lab.stats()
}

#[test]
fn options_and_extension_headers_are_taken_off() {
    each(|lab, family, direction| {
        for (first, extra) in carried(family) {
            let session = Session::new(family);
            let packet = data(&session, direction);
            let odd = input(&with_extra(&packet.to_bytes(), first, &extra));
            let before = open(lab, &session);
            let output = lab.run(Hook::Ingress, &odd);
            assert_eq!(output.verdict, Verdict::Redirect, "{first} {extra:?}");
            assert_eq!(Packet::parse(&output.frame), session.rewritten(direction, &packet));
            check_counts(lab, &before, &[Stat::MadePlain, Stat::Spliced]);
            let mut expected = session.record;
            believed(&mut expected, direction, &packet);
            check_record(lab.record(session.index), expected);
            // The kernel verifies the sum that a network card would have made.
            open(lab, &session);
            let summed = lab.run_summed(Hook::Ingress, &odd).unwrap();
            assert_eq!((summed.verdict, summed.frame), (output.verdict, output.frame));
        }
    });
}

#[test]
fn what_cannot_be_taken_off_comes_to_the_local_stack_as_it_was() {
    each(|lab, family, direction| {
        let session = Session::new(family);
        let plain = data(&session, direction).to_bytes();
        let mut odd = vec![];
        if family == Family::V6 {
            let seven = [HOP_BY_HOP; 7].map(|_| extension(DESTINATION, 1, [1, 4]));
            let mut seven = seven.concat();
            let last = seven.len() - 8;
            seven[last] = TCP;
            odd = vec![
                with_extra(&plain, ROUTING, &extension(TCP, 3, [0, 1])),
                with_extra(&plain, AUTHENTICATION, &extension(TCP, 3, [0, 0])),
                with_extra(&plain, DESTINATION, &extension(17, 1, [1, 4])),
                with_extra(&plain, DESTINATION, &seven),
                // The chain is longer than the packet.
                with_extra(&plain, DESTINATION, &extension(TCP, 1, [1, 4]))
                    .iter()
                    .enumerate()
                    .map(|(i, byte)| if i == 55 { 255 } else { *byte })
                    .collect(),
            ];
        }
        let mut short = with_extra(&plain, TCP, &[1; 4]);
        short[ETHERNET] = if family == Family::V4 { 0x44 } else { 0x70 };
        odd.push(short);
        for frame in odd {
            let before = open(lab, &session);
            let output = lab.run(Hook::Ingress, &input(&frame));
            assert_eq!((output.verdict, output.frame), (Verdict::Pass, frame));
            check_counts(lab, &before, &[]);
        }
    });
}

#[test]
fn odd_packets_of_strangers_and_of_other_states_pass_untouched() {
    each(|lab, family, direction| {
        let session = Session::new(family);
        let given_up = |session: &mut Session| {
            session.record.state = state::RESET;
            session.record.flags |= flags::GIVEN_UP;
        };
        let changes: [&dyn Fn(&mut Session); 3] =
            [&|s| s.record.state = state::OFF, &|s| s.record.state = state::DEAD, &given_up];
        for (first, extra) in carried(family) {
            let odd = with_extra(&data(&session, direction).to_bytes(), first, &extra);
            for change in changes {
                let mut session = session.clone();
                change(&mut session);
                let before = open(lab, &session);
                let output = lab.run(Hook::Ingress, &input(&odd));
                assert_eq!((output.verdict, &output.frame), (Verdict::Pass, &odd));
                check_counts(lab, &before, &[]);
            }
            lab.clear();
            let output = lab.run(Hook::Ingress, &input(&odd));
            assert_eq!((output.verdict, &output.frame), (Verdict::Pass, &odd));
        }
    });
}

#[test]
fn an_end_with_a_wrong_checksum_changes_nothing() {
    each(|lab, family, direction| {
        for flags in [RST, RST | ACK, FIN | ACK] {
            for payload in [0, 1, 512, 1000, 1400] {
                let session = Session::new(family);
                let payload = vec![7; payload];
                let packet = Packet { flags, payload, ..session.packet(direction) };
                let mut frame = packet.to_bytes();
                let at = tcp(&frame) + 16;
                frame[at] ^= 0x10;
                let before = open(lab, &session);
                let output = lab.run(Hook::Ingress, &input(&frame));
                assert_eq!(output.verdict, Verdict::Redirect);
                check_counts(lab, &before, &[Stat::Spliced, Stat::BadChecksum]);
                check_record(lab.record(session.index), session.record);
                assert_eq!(lab.events(), []);
            }
        }
    });
}

#[test]
fn an_end_whose_checksum_a_device_has_to_complete_counts() {
    each(|lab, family, direction| {
        let session = Session::new(family);
        let packet = Packet { flags: RST | ACK, ..session.packet(direction) };
        let mut frame = packet.to_bytes();
        let at = tcp(&frame) + 16;
        // The sum over the pseudo header alone: the complete sum without the segment's own words.
        let segment = [&frame[tcp(&frame)..at], &[0, 0], &frame[at + 2..]].concat();
        let right = u16_at(&frame, at);
        let pseudo = !checksum(&[(!right).to_be_bytes(), checksum(&segment).to_be_bytes()].concat());
        frame[at..at + 2].copy_from_slice(&pseudo.to_be_bytes());
        let before = open(lab, &session);
        lab.run(Hook::Ingress, &input(&frame));
        check_counts(lab, &before, &[Stat::Spliced]);
        assert_eq!(lab.events().first().map(|event| event.kind), Some(event::RESET));
    });
}

/// The local stack answers a packet of the peer that was not spliced.
#[test]
fn a_reset_of_the_stack_with_the_peers_number_gives_the_stream_up() {
    each(|lab, family, direction| {
        let mut session = Session::new(family);
        // A packet is under way to the peer that `direction` goes to.
        session.flow(direction).live.seq_end = session.flow(direction).live.seq_end.wrapping_add(900);
        let back = direction.opposite();
        let acknowledged = session.record.flows[back as usize].live.ack_end;
        let cases = [(0, true), (900, true), (1, false), (899, false), (u32::MAX, false)];
        for (ahead, is_peers) in cases {
            for (state, gives_up) in [(state::SPLICED, is_peers), (state::HAND_OVER, false)] {
                let mut session = session.clone();
                session.record.state = state;
                let seq = acknowledged.wrapping_add(ahead);
                let reset = Packet { flags: RST, seq, ack: 0, window: 0, ..session.own_packet(direction) };
                // A RST of a socket that is being closed.
                open(lab, &session);
                if state == state::SPLICED {
                    let own = Input { mark: MARK, ..input(&reset.to_bytes()) };
                    assert_eq!(lab.run(Hook::Egress, &own).verdict, Verdict::Drop);
                }
                let before = open(lab, &session);
                let output = lab.run(Hook::Egress, &input(&reset.to_bytes()));
                let verdict = if gives_up { Verdict::Pass } else { Verdict::Drop };
                assert_eq!(output.verdict, verdict, "{ahead} {state}");
                check_counts(lab, &before, &[if gives_up { Stat::GivenUp } else { Stat::DropStackRst }]);
                let mut expected = session.record;
                if gives_up {
                    expected.state = state::RESET;
                    expected.flags |= flags::GIVEN_UP | flags::not_carried(back);
                }
                check_record(lab.record(session.index), expected);
                let events: Vec<_> =
                    lab.events().iter().map(|event| (event.kind, event.flow.direction())).collect();
                assert_eq!(events, if gives_up { vec![(event::RESET, back)] } else { vec![] });
            }
        }
        // The answer to a packet without an acknowledgement has an acknowledgement.
        let reset = Packet { flags: RST | ACK, seq: acknowledged, ..session.own_packet(direction) };
        open(lab, &session);
        assert_eq!(lab.run(Hook::Egress, &input(&reset.to_bytes())).verdict, Verdict::Drop);
    });
}
