//! Packets in pieces.

use proxy_common::flow::{event, state};
use proxy_common::stat::Stat;

use crate::odd::{
    FRAGMENT, HOP_BY_HOP, TCP, data, each, extension, input, is_v4, open, sum_up_v4, tcp, with_extra,
};
use crate::support::lab::{Hook, Lab, Output, Verdict};
use crate::support::packet::{ACK, ETHERNET, FIN, Packet, checksum, u16_at};
use crate::support::session::{Family, Session};
use crate::table::{believed, check_counts, check_record};

/// The pieces of a plain frame. All but the last have `size` bytes of TCP (a multiple of eight).
fn pieces(frame: &[u8], size: usize, id: u32) -> Vec<Vec<u8>> {
    let (head, segment) = frame.split_at(tcp(frame));
    let count = segment.len().div_ceil(size);
    let piece = |(index, part): (usize, &[u8])| {
        let (offset, more) = (index * size, index + 1 < count);
        let mut piece = [head, part].concat();
        if is_v4(frame) {
            let place = (offset / 8) as u16 | if more { 0x2000 } else { 0 };
            piece[ETHERNET + 2..ETHERNET + 4].copy_from_slice(&(20 + part.len() as u16).to_be_bytes());
            piece[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&(id as u16).to_be_bytes());
            piece[ETHERNET + 6..ETHERNET + 8].copy_from_slice(&place.to_be_bytes());
            sum_up_v4(&mut piece);
            piece
        } else {
            piece[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&(part.len() as u16).to_be_bytes());
            let place = offset as u16 | u16::from(more);
            let header = [&[TCP, 0], &place.to_be_bytes()[..], &id.to_be_bytes()].concat();
            with_extra(&piece, FRAGMENT, &header)
        }
    };
    segment.chunks(size).enumerate().map(piece).collect()
}

/// Puts pieces together, in order. Asserts that they fit, that their IP checksums are correct, and
/// that they have one identification.
fn whole(pieces: &[Vec<u8>]) -> Vec<u8> {
    let v4 = is_v4(&pieces[0]);
    let header = if v4 { 20 } else { 48 };
    let mut segment = Vec::new();
    let mut ids = Vec::new();
    for (index, piece) in pieces.iter().enumerate() {
        let ip = &piece[ETHERNET..];
        let (offset, more) = if v4 {
            assert_eq!((ip[0], checksum(&ip[..20])), (0x45, 0));
            ids.push(u32::from(u16_at(ip, 4)));
            (usize::from(u16_at(ip, 6) & 0x1fff) * 8, ip[6] & 0x20 != 0)
        } else {
            assert_eq!((ip[6], ip[40], ip[41]), (FRAGMENT, TCP, 0));
            ids.push(u32::from_be_bytes(ip[44..48].try_into().unwrap()));
            (usize::from(u16_at(ip, 42) & 0xfff8), ip[43] & 1 == 1)
        };
        let length = usize::from(if v4 { u16_at(ip, 2) } else { u16_at(ip, 4) + 40 });
        assert_eq!((offset, more, length), (segment.len(), index + 1 < pieces.len(), ip.len()));
        segment.extend(&ip[header..]);
    }
    assert!(ids.windows(2).all(|pair| pair[0] == pair[1]), "{ids:?}");
    let mut frame = [&pieces[0][..tcp(&pieces[0])], &segment].concat();
    let ip = &mut frame[ETHERNET..];
    if v4 {
        ip[6..8].fill(0);
        ip[2..4].copy_from_slice(&(20 + segment.len() as u16).to_be_bytes());
        sum_up_v4(&mut frame);
    } else {
        ip[6] = TCP;
        ip[4..6].copy_from_slice(&(segment.len() as u16).to_be_bytes());
    }
    frame
}

/// Runs the pieces of one packet in the given order, and returns the outputs.
fn run_all(lab: &Lab, frames: &[Vec<u8>], order: &[usize]) -> Vec<Output> {
    order.iter().map(|index| lab.run_summed(Hook::Ingress, &input(&frames[*index])).unwrap()).collect()
}

#[test]
fn the_pieces_of_a_packet_are_forwarded_and_fit_together() {
    each(|lab, family, direction| {
        for size in [64, 248, 400] {
            for state in [state::SPLICED, state::HAND_OVER, state::FINISHED] {
                let mut session = Session::new(family);
                session.record.state = state;
                let packet = Packet { fragment: 0, ..data(&session, direction) };
                let arriving = pieces(&packet.to_bytes(), size, 0x0102_0304);
                let mut order: Vec<_> = (0..arriving.len()).collect();
                // Pieces after the first may overtake each other.
                order[1..].reverse();
                let before = open(lab, &session);
                let outputs = run_all(lab, &arriving, &order);
                assert!(outputs.iter().all(|output| output.verdict == Verdict::Redirect));
                let mut left: Vec<_> = outputs.into_iter().map(|output| output.frame).collect();
                left[1..].reverse();
                let found = Packet::parse(&whole(&left));
                let expected = session.rewritten(direction, &packet);
                assert_eq!(found, Packet { id: found.id, ..expected });
                let mut counts = vec![Stat::Fragment; arriving.len()];
                counts.push(Stat::Spliced);
                check_counts(lab, &before, &counts);
                let live = lab.record(session.index).flows[direction as usize].live;
                let before = session.record.flows[direction as usize].live;
                assert_eq!(live.seq_end, before.seq_end.wrapping_add(packet.payload.len() as u32));
                assert_eq!(live.bytes, packet.payload.len() as u64);
            }
        }
    });
}

/// Each host counts its own packets, so two hosts may choose the same identification. The proxy
/// sends their packets on with one source address.
#[test]
fn packets_of_one_identification_leave_with_two_and_a_repeated_piece_with_its_own() {
    each(|lab, family, direction| {
        let session = Session::new(family);
        let packet = Packet { fragment: 0, ..data(&session, direction) };
        let id = |frame: &[u8]| match family {
            Family::V4 => frame[ETHERNET + 4..ETHERNET + 6].to_vec(),
            Family::V6 => frame[ETHERNET + 44..ETHERNET + 48].to_vec(),
        };
        open(lab, &session);
        let arriving = pieces(&packet.to_bytes(), 248, 7);
        let ids: Vec<_> =
            run_all(lab, &arriving, &[0, 1, 0, 2, 1]).iter().map(|output| id(&output.frame)).collect();
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        // A new identification may equal the old one by chance (1 in 65,536), but not three times.
        let is_other = (1..4).any(|packets| {
            let next = Packet { seq: packet.seq.wrapping_add(packets * 700), ..packet.clone() };
            let output = &run_all(lab, &pieces(&next.to_bytes(), 248, 7), &[0])[0];
            id(&output.frame) != ids[0]
        });
        assert!(is_other, "{ids:?}");
    });
}

/// The whole packet has a checksum and a FIN. Its first piece alone has neither.
#[test]
fn a_fin_in_pieces_counts_when_the_last_piece_has_come() {
    each(|lab, family, direction| {
        let session = Session::new(family);
        let packet = Packet { flags: FIN | ACK, fragment: 0, ..data(&session, direction) };
        open(lab, &session);
        // The packet comes twice, as a repeated packet does.
        for id in [31, 32] {
            let arriving = pieces(&packet.to_bytes(), 248, id);
            let before = lab.stats();
            let order: Vec<_> = (0..arriving.len()).collect();
            let outputs = run_all(lab, &arriving, &order);
            assert!(outputs.iter().all(|output| output.verdict == Verdict::Redirect));
            let mut counts = vec![Stat::Fragment; arriving.len()];
            counts.push(Stat::Spliced);
            check_counts(lab, &before, &counts);
            let mut expected = session.record;
            believed(&mut expected, direction, &packet);
            expected.flows[direction as usize].live.packets =
                arriving.len() as u64 * if id == 31 { 1 } else { 2 };
            check_record(lab.record(session.index), expected);
        }
        let kinds: Vec<_> = lab.events().iter().map(|event| event.kind).collect();
        assert_eq!(kinds, [event::FIN]);
    });
}

/// The sender has guessed the tuple and roughly one number, but not the other number.
#[test]
fn pieces_that_cannot_be_the_peers_are_sent_on_and_change_nothing() {
    each(|lab, family, direction| {
        let session = Session::new(family);
        let mut packet = Packet { flags: FIN | ACK, fragment: 0, ..data(&session, direction) };
        packet.ack = packet.ack.wrapping_add(1 << 30);
        open(lab, &session);
        let outputs = run_all(lab, &pieces(&packet.to_bytes(), 400, 41), &[0, 1]);
        assert!(outputs.iter().all(|output| output.verdict == Verdict::Redirect));
        let mut expected = session.record;
        expected.flows[direction as usize].live.packets += 2;
        check_record(lab.record(session.index), expected);
        assert_eq!(lab.events(), []);
    });
}

#[test]
fn a_piece_of_an_earlier_session_is_not_of_the_one_that_has_its_record_now() {
    each(|lab, family, direction| {
        let mut session = Session::new(family);
        let arriving = pieces(&Packet { fragment: 0, ..data(&session, direction) }.to_bytes(), 400, 51);
        open(lab, &session);
        run_all(lab, &arriving[..1], &[0]);
        session.record.generation += 1;
        open(lab, &session);
        let output = lab.run(Hook::Ingress, &input(&arriving[1]));
        assert_eq!((output.verdict, &output.frame), (Verdict::Pass, &arriving[1]));
        check_record(lab.record(session.index), session.record);
    });
}

#[test]
fn pieces_with_options_are_forwarded_without_them() {
    each(|lab, family, direction| {
        let session = Session::new(family);
        let packet = Packet { fragment: 0, ..data(&session, direction) };
        let arriving = pieces(&packet.to_bytes(), 248, 77);
        let with_options = |piece: &Vec<u8>| match family {
            Family::V4 => with_extra(piece, TCP, &[1; 8]),
            // The options are before the fragment header.
            Family::V6 => with_extra(piece, HOP_BY_HOP, &extension(FRAGMENT, 1, [1, 4])),
        };
        let odd: Vec<_> = arriving.iter().map(with_options).collect();
        open(lab, &session);
        let order: Vec<_> = (0..odd.len()).collect();
        let left: Vec<_> = run_all(lab, &odd, &order).into_iter().map(|output| output.frame).collect();
        let found = Packet::parse(&whole(&left));
        assert_eq!(found, Packet { id: found.id, ..session.rewritten(direction, &packet) });
    });
}

#[test]
fn a_piece_before_the_first_is_lost_once_and_the_second_time_all_come_to_the_stack() {
    each(|lab, family, direction| {
        let session = Session::new(family);
        let mut packet = Packet { fragment: 0, ..data(&session, direction) };
        // The programs remember the last packet of this kind, so each family sends another one.
        packet.seq = packet.seq.wrapping_add(if family == Family::V4 { 0 } else { 1 });
        open(lab, &session);
        // The sender repeats the packet with another identification.
        for (id, first) in [(501, Verdict::Redirect), (502, Verdict::Pass)] {
            let before = lab.stats();
            let arriving = pieces(&packet.to_bytes(), 400, id);
            let outputs = run_all(lab, &arriving, &[1, 0]);
            assert_eq!((outputs[0].verdict, &outputs[0].frame), (Verdict::Pass, &arriving[1]));
            assert_eq!(outputs[1].verdict, first);
            let forwarded: &[_] = &[Stat::FragmentEarly, Stat::Fragment, Stat::Spliced];
            check_counts(lab, &before, if first == Verdict::Redirect { forwarded } else { &forwarded[..1] });
        }
        // In the right order, the same packet always passes.
        let arriving = pieces(&packet.to_bytes(), 400, 503);
        let outputs = run_all(lab, &arriving, &[0, 1]);
        assert!(outputs.iter().all(|output| output.verdict == Verdict::Redirect));
    });
}

#[test]
fn pieces_of_others_pass_untouched() {
    each(|lab, family, direction| {
        let session = Session::new(family);
        let mut stranger = Packet { fragment: 0, ..data(&session, direction) };
        stranger.source.set_port(1);
        open(lab, &session);
        let arriving = pieces(&stranger.to_bytes(), 248, 900);
        for piece in &arriving {
            let output = lab.run(Hook::Ingress, &input(piece));
            assert_eq!((output.verdict, &output.frame), (Verdict::Pass, piece));
        }
        // A stream has used the same identification before.
        let own = pieces(&Packet { fragment: 0, ..data(&session, direction) }.to_bytes(), 248, 901);
        run_all(lab, &own, &[0, 1]);
        for piece in &pieces(&stranger.to_bytes(), 248, 901) {
            let output = lab.run(Hook::Ingress, &input(piece));
            assert_eq!((output.verdict, &output.frame), (Verdict::Pass, piece));
        }
        // A first piece that ends within the TCP header.
        let tiny = pieces(&Packet { fragment: 0, ..data(&session, direction) }.to_bytes(), 24, 902);
        let output = lab.run(Hook::Ingress, &input(&tiny[0]));
        assert_eq!((output.verdict, &output.frame), (Verdict::Pass, &tiny[0]));
    });
}
