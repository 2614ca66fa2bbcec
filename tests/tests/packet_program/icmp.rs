//! ICMP errors about packets that the proxy sent on.

use std::net::{IpAddr, SocketAddr};

use proxy_common::flow::{Direction, state};
use proxy_common::stat::Stat;

use crate::support::lab::{Hook, Input, Lab, Verdict, in_namespace};
use crate::support::packet::{ETHERNET, MACS, Packet, addresses, checksum, transport_checksum};
use crate::support::session::{Family, Session};
use crate::table::{check_counts, check_record};

/// An error as it arrives or leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
struct IcmpError {
    source: IpAddr,
    destination: IpAddr,
    hops: u8,
    /// Type and code.
    kind: [u8; 2],
    rest: [u8; 4],
    /// The quoted packet, from its IP header on.
    quote: Vec<u8>,
    /// Extensions (RFC 4884), or nothing.
    behind: Vec<u8>,
}

/// The types and codes that are translated.
fn kinds(family: Family) -> &'static [[u8; 2]] {
    match family {
        Family::V4 => &[[3, 4], [3, 0], [3, 1], [3, 3], [3, 13], [11, 0], [11, 1], [12, 0]],
        Family::V6 => &[[2, 0], [1, 0], [1, 4], [3, 0], [3, 1], [4, 0]],
    }
}

/// Types that a router or the peer sends for other reasons. IPv4: echo reply, source quench,
/// redirect. IPv6: echo reply, neighbour solicitation, redirect.
fn other_kinds(family: Family) -> &'static [[u8; 2]] {
    match family {
        Family::V4 => &[[0, 0], [4, 0], [5, 0], [8, 0]],
        Family::V6 => &[[0, 0], [5, 0], [129, 0], [135, 0], [137, 0]],
    }
}

impl IcmpError {
    /// The error "too big for an MTU of 1400" of a router after the proxy. It quotes `packet` with
    /// `tcp_bytes` bytes of TCP.
    fn about(packet: &Packet, tcp_bytes: usize) -> Self {
        let is_ipv4 = packet.source.is_ipv4();
        let router = if is_ipv4 { "203.0.113.9" } else { "2001:db8:99::9" };
        let frame = packet.to_bytes();
        let tcp = ETHERNET + if is_ipv4 { 20 } else { 40 };
        Self {
            source: router.parse().unwrap(),
            destination: packet.source.ip(),
            hops: 3,
            kind: if is_ipv4 { [3, 4] } else { [2, 0] },
            rest: [0, 0, 5, 120],
            quote: frame[ETHERNET..frame.len().min(tcp + tcp_bytes)].to_vec(),
            behind: Vec::new(),
        }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut icmp = [&self.kind[..], &[0, 0], &self.rest, &self.quote, &self.behind].concat();
        let sum = match self.source {
            IpAddr::V4(_) => checksum(&icmp),
            IpAddr::V6(_) => transport_checksum(self.source, self.destination, 58, &icmp),
        };
        icmp[2..4].copy_from_slice(&sum.to_be_bytes());
        let mut frame = MACS.to_vec();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                frame.extend([8, 0, 0x45, 0xc0]);
                frame.extend((icmp.len() as u16 + 20).to_be_bytes());
                frame.extend([9, 9, 0, 0, self.hops, 1, 0, 0]);
                frame.extend([source.octets(), destination.octets()].concat());
                let sum = checksum(&frame[ETHERNET..]);
                frame[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&sum.to_be_bytes());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                frame.extend((icmp.len() as u16).to_be_bytes());
                frame.extend([58, self.hops]);
                frame.extend([source.octets(), destination.octets()].concat());
            }
            _ => panic!("the addresses are of two families"),
        }
        [frame, icmp].concat()
    }

    /// The same error with another quote, as if the proxy had made it.
    fn turned_into(&self, source: IpAddr, destination: IpAddr, quoted: &Packet) -> Self {
        let quoted = Packet { ttl: 64, ..quoted.clone() };
        let quote = quoted.to_bytes()[ETHERNET..][..self.quote.len()].to_vec();
        Self { source, destination, hops: 64, quote, ..self.clone() }
    }
}

/// A packet of 1000 bytes in `direction` that is not acknowledged yet: as it arrived and as it
/// left.
fn under_way(session: &mut Session, direction: Direction) -> (Packet, Packet) {
    let mut arrived = session.packet(direction);
    arrived.payload = vec![0x5a; 1000];
    // The translation rewrites only the fields that identify the packet.
    let mut left = session.rewritten(direction, &arrived);
    (left.window, left.options) = (arrived.window, arrived.options.clone());
    let live = &mut session.flow(direction).live;
    live.seq_end = live.seq_end.wrapping_add(1000);
    (arrived, left)
}

/// Runs an error through the program. The program must not change the error.
fn check_passed(lab: &mut Lab, session: &Session, frame: Vec<u8>, counts: &[Stat]) {
    lab.clear();
    lab.open(session);
    let before = lab.stats();
    let output = lab.run(Hook::Ingress, &Input { frame: frame.clone(), ..Input::default() });
    assert_eq!(output.verdict, Verdict::Pass);
    assert!(output.frame == frame, "the packet was changed");
    check_counts(lab, &before, counts);
    check_record(lab.record(session.index), session.record);
}

/// Runs an error through the program. The error must reach the sender of `arrived`, and quote
/// `arrived`.
fn check_translated(
    lab: &mut Lab,
    session: &Session,
    direction: Direction,
    error: &IcmpError,
    arrived: &Packet,
) {
    lab.clear();
    lab.open(session);
    let before = lab.stats();
    let input = Input { frame: error.to_bytes(), ..Input::default() };
    let output = lab.run(Hook::Ingress, &input);
    assert_eq!(output.verdict, Verdict::Redirect);
    let (sender, proxy) = session.arrives(direction);
    let expected = error.turned_into(proxy.ip(), sender.ip(), arrived);
    let (source, destination) = addresses(&output.frame[ETHERNET..], sender.is_ipv4());
    assert_eq!((source, destination), (proxy.ip(), sender.ip()));
    assert_eq!(output.frame, expected.to_bytes());
    check_counts(lab, &before, &[Stat::IcmpTranslated]);
    check_record(lab.record(session.index), session.record);
    let summed = lab.run_summed(Hook::Ingress, &input).unwrap();
    assert_eq!(summed.frame, output.frame);
}

fn for_each(test: impl Fn(&mut Lab, Family, Direction) + Send) {
    in_namespace(move |lab| {
        for family in Family::BOTH {
            for direction in Direction::BOTH {
                test(lab, family, direction);
            }
        }
    });
}

#[test]
fn errors_reach_the_sender_with_its_own_packet_in_them() {
    for_each(|lab, family, direction| {
        let mut session = Session::new(family);
        let (arrived, left) = under_way(&mut session, direction);
        for kind in kinds(family) {
            // The shortest quote, a quote without the checksum, the header alone, and the header
            // with payload.
            for quoted in [8, 20, 21, 500] {
                eprintln!("{family:?} {direction:?} {kind:?} {quoted}");
                let error = IcmpError { kind: *kind, ..IcmpError::about(&left, quoted) };
                check_translated(lab, &session, direction, &error, &arrived);
            }
        }
        let extended = IcmpError {
            rest: [0, 32, 0, 0],
            behind: vec![0x20, 0, 0xde, 0xad, 0, 8, 1, 1, 1, 2, 3, 4],
            ..IcmpError::about(&left, 108)
        };
        check_translated(lab, &session, direction, &extended, &arrived);
    });
}

/// Other errors are not for the sender. They stay as they are, and the stack discards them.
#[test]
fn of_errors_of_the_other_ip_version_only_too_big_reaches_the_sender() {
    in_namespace(|lab| {
        for client in Family::BOTH {
            for direction in Direction::BOTH {
                let mut session = Session::between(client, client.other());
                let (arrived, left) = under_way(&mut session, direction);
                for quoted in [8, 20, 500] {
                    eprintln!("{client:?} {direction:?} {quoted}");
                    let error = IcmpError::about(&left, quoted);
                    check_other_family(lab, &session, direction, &error, &arrived, 1400);
                }
                let narrow = IcmpError { rest: [0, 0, 2, 88], ..IcmpError::about(&left, 8) };
                // IPv6 knows no smaller MTU than 1280, and IPv4 cuts its packets.
                let told = if left.source.is_ipv4() { 1260 } else { 600 };
                check_other_family(lab, &session, direction, &narrow, &arrived, told);

                let family = if left.source.is_ipv4() { Family::V4 } else { Family::V6 };
                for kind in &kinds(family)[1..] {
                    let error = IcmpError { kind: *kind, ..IcmpError::about(&left, 8) };
                    check_passed(lab, &session, error.to_bytes(), &[Stat::IcmpPassed]);
                }
            }
        }
    });
}

/// The error must reach the sender of `arrived` as an error about this MTU, in the sender's IP
/// version. `mtu`: in the IP version of the error.
fn check_other_family(
    lab: &mut Lab,
    session: &Session,
    direction: Direction,
    error: &IcmpError,
    arrived: &Packet,
    mtu: u16,
) {
    lab.clear();
    lab.open(session);
    let before = lab.stats();
    let input = Input { frame: error.to_bytes(), ..Input::default() };
    let output = lab.run(Hook::Ingress, &input);
    assert_eq!(output.verdict, Verdict::Redirect);
    check_counts(lab, &before, &[Stat::IcmpTranslated]);
    let (sender, proxy) = session.arrives(direction);
    let is_ipv4 = sender.is_ipv4();
    let quoted = Packet { ttl: 64, id: 0, ..arrived.clone() };
    let [high, low] = if is_ipv4 { mtu - 20 } else { mtu + 20 }.to_be_bytes();
    let expected = IcmpError {
        source: proxy.ip(),
        destination: sender.ip(),
        rest: [0, 0, high, low],
        ..IcmpError::about(&quoted, 8)
    };
    let ip = &output.frame[ETHERNET..];
    let header = if is_ipv4 { 20 } else { 40 };
    assert_eq!(addresses(ip, is_ipv4), (proxy.ip(), sender.ip()));
    assert_eq!(ip[header..], expected.to_bytes()[ETHERNET + header..]);
    if is_ipv4 {
        assert_eq!((checksum(&ip[..header]), ip[8], ip[9]), (0, 64, 1));
    } else {
        assert_eq!((ip[7], ip[6]), (64, 58));
    }
    // When the length changes, the kernel forgets the sum that a network card has made.
}

#[test]
fn a_quote_that_ends_inside_the_tcp_header_is_translated_as_far_as_errors_are_read() {
    for_each(|lab, family, direction| {
        let mut session = Session::new(family);
        let (mut arrived, left) = under_way(&mut session, direction);
        arrived.ack = left.ack;
        let error = IcmpError::about(&left, 14);
        check_translated(lab, &session, direction, &error, &arrived);
    });
}

#[test]
fn only_packets_that_are_under_way_are_believed_to_be_quoted() {
    for_each(|lab, family, direction| {
        let mut session = Session::new(family);
        let (arrived, left) = under_way(&mut session, direction);
        for (offset, believed) in [(0, true), (999, true), (1000, false), (u32::MAX, false), (1 << 31, false)]
        {
            eprintln!("{family:?} {direction:?} {offset}");
            let arrived = Packet { seq: arrived.seq.wrapping_add(offset), ..arrived.clone() };
            let left = Packet { seq: left.seq.wrapping_add(offset), ..left.clone() };
            let error = IcmpError::about(&left, 8);
            if believed {
                check_translated(lab, &session, direction, &error, &arrived);
            } else {
                check_passed(lab, &session, error.to_bytes(), &[Stat::IcmpPassed]);
            }
        }
        // In this session, no packet is under way.
        let idle = Session::new(family);
        check_passed(lab, &idle, IcmpError::about(&left, 8).to_bytes(), &[Stat::IcmpPassed]);
    });
}

#[test]
fn a_hundred_forged_errors_change_nothing() {
    for_each(|lab, family, direction| {
        let mut session = Session::new(family);
        let (_, left) = under_way(&mut session, direction);
        for i in 0..100u32 {
            let seq = left.seq.wrapping_add(1000 + i * 0x0270_0000);
            let forged = IcmpError::about(&Packet { seq, ..left.clone() }, 8);
            check_passed(lab, &session, forged.to_bytes(), &[Stat::IcmpPassed]);
        }
    });
}

#[test]
fn in_a_hand_over_errors_about_the_local_sockets_bytes_pass_to_it() {
    for_each(|lab, family, direction| {
        let mut session = Session::new(family);
        let (mut arrived, left) = under_way(&mut session, direction);
        session.record.state = state::HAND_OVER;
        // The socket towards the next peer has sent 300 of the 1000 bytes.
        session.record.flows[direction.opposite() as usize].live.own_end = left.seq.wrapping_add(300);
        check_passed(lab, &session, IcmpError::about(&left, 8).to_bytes(), &[Stat::IcmpPassed]);
        let at = |packet: &Packet, seq: u32| Packet { seq: packet.seq.wrapping_add(seq), ..packet.clone() };
        check_passed(lab, &session, IcmpError::about(&at(&left, 299), 8).to_bytes(), &[Stat::IcmpPassed]);
        arrived = at(&arrived, 300);
        check_translated(lab, &session, direction, &IcmpError::about(&at(&left, 300), 8), &arrived);
    });
}

#[test]
fn the_state_decides_who_gets_the_error() {
    for_each(|lab, family, direction| {
        for (state, spliced) in [
            (state::OFF, false),
            (state::HAND_OVER, true),
            (state::SPLICED, true),
            (state::FINISHED, true),
            (state::RESET, true),
            (state::DEAD, false),
        ] {
            let mut session = Session::new(family);
            let (arrived, left) = under_way(&mut session, direction);
            session.record.state = state;
            let error = IcmpError::about(&left, 20);
            if spliced {
                check_translated(lab, &session, direction, &error, &arrived);
            } else {
                check_passed(lab, &session, error.to_bytes(), &[Stat::IcmpPassed]);
            }
        }
    });
}

#[test]
fn what_is_not_an_error_about_a_flow_is_untouched() {
    for_each(|lab, family, direction| {
        let mut session = Session::new(family);
        let (_, left) = under_way(&mut session, direction);
        let error = IcmpError::about(&left, 20);
        for kind in other_kinds(family) {
            let other = IcmpError { kind: *kind, ..error.clone() };
            check_passed(lab, &session, other.to_bytes(), &[]);
        }
        let stranger = SocketAddr::new(left.destination.ip(), left.destination.port() + 1);
        let unknown = Packet { destination: stranger, ..left.clone() };
        check_passed(lab, &session, IcmpError::about(&unknown, 20).to_bytes(), &[]);
        // The error quotes a packet from the peer, not to the peer.
        let backwards = Packet { source: left.destination, destination: left.source, ..left.clone() };
        check_passed(lab, &session, IcmpError::about(&backwards, 20).to_bytes(), &[]);
        // The frame is cut anywhere after the IP header (the kernel takes no shorter ones), before
        // the length that the header says.
        let frame = error.to_bytes();
        let ip_header = if family == Family::V4 { 20 } else { 40 };
        for length in ETHERNET + ip_header..frame.len() {
            check_passed(lab, &session, frame[..length].to_vec(), &[]);
        }
        for tcp_bytes in 0..8 {
            check_passed(lab, &session, IcmpError::about(&left, tcp_bytes).to_bytes(), &[]);
        }
    });
}

#[test]
fn options_fragments_and_extension_headers_are_untouched() {
    for_each(|lab, family, direction| {
        let mut session = Session::new(family);
        let (_, left) = under_way(&mut session, direction);
        let frame = IcmpError::about(&left, 20).to_bytes();
        let (outer, quoted) = (ETHERNET, ETHERNET + if family == Family::V4 { 28 } else { 48 });
        let changes: &[(usize, u8)] = match family {
            Family::V4 => &[
                (outer, 0x46),
                (outer + 6, 0x20),
                (outer + 7, 9),
                (quoted, 0x46),
                (quoted + 7, 9),
                (quoted + 9, 17),
            ],
            Family::V6 => {
                &[(outer + 6, 44), (outer + 6, 0), (quoted + 6, 44), (quoted + 6, 17), (quoted, 0x40)]
            }
        };
        for (at, value) in changes {
            let mut frame = frame.clone();
            frame[*at] = *value;
            check_passed(lab, &session, frame, &[]);
        }
    });
}
