//! Translated errors must be those that would have been made for the packet as its sender had sent
//! it.

extern crate std;

use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::flow::{DirFixed, FlowKey4, FlowKey6};
use crate::packet::headers::{HOP_LIMIT, protocol};
use crate::shared::Share as _;

/// An error and the packet that it quotes, as values.
#[derive(Debug, Clone)]
struct Parts<const V6: bool> {
    outer: [[u32; 4]; 2],
    kind: [u8; 8],
    hops: u8,
    quoted: [[u32; 4]; 2],
    ports: [u16; 2],
    seq: u32,
    ack: u32,
    /// Of the quoted header after `ack`, without its checksum, then options and payload.
    rest: [u8; 6],
    payload: Vec<u8>,
    /// Bytes of the quoted TCP segment that the error holds.
    quoted_bytes: usize,
}

fn address_bytes<const V6: bool>(addresses: &[[u32; 4]; 2]) -> Vec<u8> {
    let words = if V6 { 4 } else { 1 };
    addresses.iter().flat_map(|address| &address[..words]).flat_map(|word| word.to_ne_bytes()).collect()
}

fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let mut sum = 0u64;
    for pair in bytes.chunks(2) {
        sum += u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn pseudo<const V6: bool>(addresses: &[[u32; 4]; 2], protocol: u8, length: usize) -> Vec<u8> {
    let mut bytes = address_bytes::<V6>(addresses);
    bytes.extend((length as u32).to_be_bytes());
    bytes.extend([0, 0, 0, protocol]);
    bytes
}

fn ip_header<const V6: bool>(addresses: &[[u32; 4]; 2], hops: u8, protocol: u8, length: usize) -> Vec<u8> {
    let mut ip = Vec::new();
    if V6 {
        ip.extend([0x60, 0, 0, 0]);
        ip.extend((length as u16).to_be_bytes());
        ip.extend([protocol, hops]);
        ip.extend(address_bytes::<V6>(addresses));
    } else {
        ip.extend([0x45, 0]);
        ip.extend((length as u16 + 20).to_be_bytes());
        ip.extend([1, 2, 0x40, 0, hops, protocol, 0, 0]);
        ip.extend(address_bytes::<V6>(addresses));
        let sum = checksum(&[&ip]);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    ip
}

impl<const V6: bool> Parts<V6> {
    /// The whole packet, with every checksum computed from scratch.
    fn to_bytes(&self) -> Vec<u8> {
        let mut tcp = Vec::new();
        tcp.extend(self.ports[0].to_be_bytes());
        tcp.extend(self.ports[1].to_be_bytes());
        tcp.extend(self.seq.to_be_bytes());
        tcp.extend(self.ack.to_be_bytes());
        tcp.extend(&self.rest[..4]);
        tcp.extend([0, 0]);
        tcp.extend(&self.rest[4..]);
        tcp.extend(&self.payload);
        let sum = checksum(&[&pseudo::<V6>(&self.quoted, protocol::TCP, tcp.len()), &tcp]);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());

        let mut icmp = self.kind.to_vec();
        icmp.extend(ip_header::<V6>(&self.quoted, self.hops, protocol::TCP, tcp.len()));
        icmp.extend(&tcp[..self.quoted_bytes]);
        let number = if V6 { Ipv6::ICMP } else { Ipv4::ICMP };
        let pseudo = if V6 { pseudo::<V6>(&self.outer, number, icmp.len()) } else { Vec::new() };
        let sum = checksum(&[&pseudo, &icmp]);
        icmp[2..4].copy_from_slice(&sum.to_be_bytes());
        [ip_header::<V6>(&self.outer, self.hops, number, icmp.len()), icmp].concat()
    }
}

/// As the program does it.
fn load<I: IcmpIp>(bytes: &[u8]) -> Option<IcmpError<I>> {
    let mut error = IcmpError::<I>::zeroed();
    let short = fill(&mut error, bytes.get(..IcmpError::<I>::SHORT)?);
    if short.is_about_tcp() && short.quotes_tcp_header() {
        return Some(fill(&mut error, bytes.get(..IcmpError::<I>::LONG)?));
    }
    Some(short)
}

fn fill<I: IcmpIp>(error: &mut IcmpError<I>, bytes: &[u8]) -> IcmpError<I> {
    let (ip, bytes) = bytes.split_at(size_of::<I>());
    let (icmp, bytes) = bytes.split_at(8);
    let (quoted, tcp) = bytes.split_at(size_of::<I>());
    bytemuck::bytes_of_mut(&mut error.ip).copy_from_slice(ip);
    bytemuck::bytes_of_mut(&mut error.icmp).copy_from_slice(icmp);
    bytemuck::bytes_of_mut(&mut error.quoted).copy_from_slice(quoted);
    bytemuck::bytes_of_mut(&mut error.tcp)[..tcp.len()].copy_from_slice(tcp);
    *error
}

fn store<I: IcmpIp>(error: &IcmpError<I>, bytes: &mut [u8]) {
    let [ip, quoted] = [&error.ip, &error.quoted].map(bytemuck::bytes_of);
    let all = [ip, bytemuck::bytes_of(&error.icmp), quoted, bytemuck::bytes_of(&error.tcp)].concat();
    let length = if error.quotes_tcp_header() { IcmpError::<I>::LONG } else { IcmpError::<I>::SHORT };
    bytes[..length].copy_from_slice(&all[..length]);
}

fn fixed(source: [u32; 4], destination: [u32; 4], ports: [u16; 2], seq: u32, ack: u32) -> SharedFixed {
    let ([a, b], [c, d]) = (ports[0].to_be_bytes(), ports[1].to_be_bytes());
    let plain = DirFixed {
        to_source: source,
        to_destination: destination,
        to_ports: u32::from_ne_bytes([a, b, c, d]),
        seq_delta: seq,
        ack_delta: ack,
        ..Zeroable::zeroed()
    };
    plain.to_shared()
}

fn address<const V6: bool>() -> impl Strategy<Value = [u32; 4]> {
    any::<[u32; 4]>().prop_map(|[a, b, c, d]| if V6 { [a, b, c, d] } else { [a, 0, 0, 0] })
}

fn parts<const V6: bool>() -> impl Strategy<Value = Parts<V6>> {
    let kinds: &[[u8; 8]] = if V6 {
        &[
            [1, 0, 0, 0, 0, 0, 0, 0],
            [2, 0, 0, 0, 0, 0, 5, 0],
            [3, 0, 0, 0, 0, 0, 0, 0],
            [4, 1, 0, 0, 0, 0, 0, 6],
        ]
    } else {
        &[
            [3, 4, 0, 0, 0, 0, 5, 0xdc],
            [3, 1, 0, 0, 0, 0, 0, 0],
            [11, 0, 0, 0, 0, 32, 0, 0],
            [12, 0, 0, 0, 1, 0, 0, 0],
        ]
    };
    let payload = prop::collection::vec(any::<u8>(), 0..80);
    (
        (address::<V6>(), address::<V6>(), address::<V6>()),
        prop::sample::select(kinds),
        (any::<[u16; 2]>(), any::<u32>(), any::<u32>(), any::<[u8; 6]>()),
        (payload, prop_oneof![Just(8usize), Just(20), 20..100usize]),
    )
        .prop_map(|((router, proxy, peer), kind, (ports, seq, ack, rest), (payload, quoted))| Parts {
            outer: [router, proxy],
            kind,
            hops: 61,
            quoted: [proxy, peer],
            ports,
            seq,
            ack,
            rest,
            quoted_bytes: quoted.min(20 + payload.len()),
            payload,
        })
}

fn check_translation<I: IcmpIp, const V6: bool>(
    parts: &Parts<V6>,
    ends: [[u32; 4]; 2],
    ports: [u16; 2],
    [seq_delta, ack_delta]: [u32; 2],
) -> Result<(), TestCaseError> {
    let mut bytes = parts.to_bytes();
    let mut error = load::<I>(&bytes).expect("long enough");
    prop_assert!(error.is_about_tcp());
    prop_assert_eq!(error.quoted_seq(), parts.seq);
    let [sender, front] = ends;
    let sent = fixed(parts.quoted[0], parts.quoted[1], parts.ports, seq_delta, ack_delta);
    let back = fixed(front, sender, [ports[1], ports[0]], 0, 0);
    error.translate(&sent, &back);
    store(&error, &mut bytes);
    let mut expected = Parts::<V6> {
        outer: [front, sender],
        hops: HOP_LIMIT,
        quoted: [sender, front],
        ports,
        seq: parts.seq.wrapping_sub(seq_delta),
        ..parts.clone()
    };
    if parts.quoted_bytes >= 20 {
        expected.ack = parts.ack.wrapping_sub(ack_delta);
    }
    prop_assert_eq!(bytes, expected.to_bytes());
    Ok(())
}

proptest! {
    #[test]
    fn the_sender_gets_the_error_that_its_own_packet_would_have_caused(
        parts in parts::<false>(), ends in (address::<false>(), address::<false>()),
        ports in any::<[u16; 2]>(), deltas in any::<[u32; 2]>(),
    ) {
        check_translation::<Ipv4, false>(&parts, [ends.0, ends.1], ports, deltas)?;
    }

    #[test]
    fn and_on_ipv6(
        parts in parts::<true>(), ends in (address::<true>(), address::<true>()),
        ports in any::<[u16; 2]>(), deltas in any::<[u32; 2]>(),
    ) {
        check_translation::<Ipv6, true>(&parts, [ends.0, ends.1], ports, deltas)?;
    }

    #[test]
    fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..140), head in any::<bool>()) {
        let mut bytes = bytes;
        if head && bytes.len() > 10 {
            (bytes[0], bytes[9]) = (0x45, 1);
        }
        let fixed = fixed([1; 4], [2; 4], [3, 4], 5, 6);
        if let Some(mut error) = load::<Ipv4>(&bytes) {
            let _ = (error.is_about_tcp(), error.key(), error.quoted_seq());
            error.translate(&fixed, &fixed);
        }
        if let Some(mut error) = load::<Ipv6>(&bytes) {
            let _ = (error.is_about_tcp(), error.key(), error.quoted_seq());
            error.translate(&fixed, &fixed);
        }
    }
}

fn sample<const V6: bool>(kind: [u8; 8]) -> Parts<V6> {
    let address = |n: u32| if V6 { [n, 0, 0, n] } else { [n, 0, 0, 0] };
    Parts {
        outer: [address(1), address(2)],
        kind,
        hops: 1,
        quoted: [address(2), address(3)],
        ports: [10, 20],
        seq: 1,
        ack: 2,
        rest: [0x50, 0x10, 1, 0, 0, 0],
        payload: Vec::new(),
        quoted_bytes: 8,
    }
}

#[test]
fn the_key_is_that_of_packets_from_the_host_that_the_quote_was_for() {
    let ports = u32::from_ne_bytes([0, 20, 0, 10]);
    let error = load::<Ipv4>(&sample::<false>([3, 4, 0, 0, 0, 0, 5, 0]).to_bytes()).expect("long enough");
    assert_eq!(error.key(), FlowKey4 { source: 3, destination: 2, ports });
    let error = load::<Ipv6>(&sample::<true>([2, 0, 0, 0, 0, 0, 5, 0]).to_bytes()).expect("long enough");
    assert_eq!(error.key(), FlowKey6 { source: [3, 0, 0, 3], destination: [2, 0, 0, 2], ports });
}

#[test]
fn what_is_not_an_error_about_a_tcp_packet_is_left_alone() {
    let about = |icmp: &[u8]| load::<Ipv4>(icmp).is_some_and(|error| error.is_about_tcp());
    let right = sample::<false>([3, 4, 0, 0, 0, 0, 5, 0]).to_bytes();
    assert!(about(&right));
    let changes: &[(usize, u8)] = &[
        (0, 0x46),    // IP options
        (0, 0x65),    // IPv6
        (3, 55),      // too short
        (6, 0x20),    // a first fragment
        (7, 1),       // a later fragment
        (9, 17),      // UDP
        (20, 0),      // echo reply
        (20, 5),      // redirect
        (28, 0x46),   // quoted IP options
        (28 + 7, 1),  // a quoted later fragment
        (28 + 9, 17), // quoted UDP
    ];
    for (at, value) in changes {
        let mut wrong = right.clone();
        wrong[*at] = *value;
        assert!(!about(&wrong), "byte {at} = {value}");
    }
    let about = |icmp: &[u8]| load::<Ipv6>(icmp).is_some_and(|error| error.is_about_tcp());
    let right = sample::<true>([2, 0, 0, 0, 0, 0, 5, 0]).to_bytes();
    assert!(about(&right));
    for (at, value) in
        [(0, 0x45), (5, 55), (6, 44), (6, 6), (40, 0), (40, 128), (40, 137), (48, 0x45), (54, 44)]
    {
        let mut wrong = right.clone();
        wrong[at] = value;
        assert!(!about(&wrong), "byte {at} = {value}");
    }
}

#[test]
fn only_what_is_on_its_way_is_outstanding() {
    assert!(is_outstanding(10, 10, 20) && is_outstanding(19, 10, 20));
    assert!(!is_outstanding(9, 10, 20) && !is_outstanding(20, 10, 20));
    assert!(is_outstanding(3, u32::MAX - 5, 10) && is_outstanding(u32::MAX - 5, u32::MAX - 5, 10));
    assert!(!is_outstanding(u32::MAX - 6, u32::MAX - 5, 10));
    assert!(!is_outstanding(10, 10, 10) && !is_outstanding(15, 20, 10));
}

#[test]
fn a_wrong_checksum_stays_wrong() {
    let mut bytes = sample::<true>([2, 0, 0, 0, 0, 0, 5, 0]).to_bytes();
    bytes[42] ^= 0x40;
    let mut error = load::<Ipv6>(&bytes).expect("long enough");
    let ends = [[7, 0, 0, 7], [8, 0, 0, 8]];
    let sent = fixed([0; 4], [0; 4], [0, 0], 5, 5);
    error.translate(&sent, &fixed(ends[0], ends[1], [1, 2], 0, 0));
    store(&error, &mut bytes);
    let pseudo = pseudo::<true>(&ends, Ipv6::ICMP, bytes.len() - 40);
    assert_ne!(checksum(&[&pseudo, &bytes[40..]]), 0);
}
