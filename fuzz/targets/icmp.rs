//! ICMP errors about spliced packets. The translation keeps a correct checksum correct and a wrong
//! one wrong. It changes only the fields that have to change.
#![no_main]

use bytemuck::{Pod, Zeroable, bytes_of};
use libfuzzer_sys::fuzz_target;
use proxy_common::flow::DirFixed;
use proxy_common::packet::headers::{HOP_LIMIT, Ipv4, Ipv6, Tcp};
use proxy_common::packet::icmp::{Icmp, IcmpError, IcmpIp};
use proxy_common::shared::Share as _;
use steer_fuzz::{put, sum, take};

/// The front of an input. The bytes of the ICMP error follow.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Numbers {
    /// Bit 0: IPv6. Bit 1: leave the error as the fuzzer made it. Without bit 1 it becomes an error
    /// about TCP.
    kind: u32,
    seq_delta: u32,
    ack_delta: u32,
    to_ports: u32,
    to_source: [u32; 4],
    to_destination: [u32; 4],
}

/// What the model needs to know of an IP version.
trait Model: IcmpIp {
    /// The offsets of the hop limit, of the header's checksum (if there is one) and of the
    /// addresses.
    const HOPS: usize;
    const CHECK: Option<usize>;
    const ADDRESSES: usize;

    /// `bytes` begin with the IP header of a packet of `len` bytes. Makes it a header for
    /// `protocol`.
    fn set(bytes: &mut [u8], protocol: u8, len: usize);
}

impl Model for Ipv4 {
    const HOPS: usize = 8;
    const CHECK: Option<usize> = Some(10);
    const ADDRESSES: usize = 12;

    fn set(bytes: &mut [u8], protocol: u8, len: usize) {
        bytes[0] = 0x45;
        bytes[2..4].copy_from_slice(&(len as u16).to_be_bytes());
        bytes[6..8].copy_from_slice(&[0x40, 0]);
        bytes[9] = protocol;
    }
}

impl Model for Ipv6 {
    const HOPS: usize = 7;
    const CHECK: Option<usize> = None;
    const ADDRESSES: usize = 8;

    fn set(bytes: &mut [u8], protocol: u8, len: usize) {
        bytes[0] = 0x60 | bytes[0] & 0xf;
        bytes[4..6].copy_from_slice(&(len as u16 - 40).to_be_bytes());
        bytes[6] = protocol;
    }
}

/// The sums that the checksums cover. A correct checksum makes its sum zero.
#[derive(Debug, PartialEq, Eq)]
struct Sums {
    outer: Option<u32>,
    icmp: u32,
    quoted: Option<u32>,
    /// Over the quoted part of the segment. `None` if the quote does not reach the checksum.
    tcp: Option<u32>,
}

impl Sums {
    fn of<I: Model>(bytes: &[u8], quotes_tcp_header: bool) -> Self {
        let (ip, icmp) = bytes.split_at(I::LEN);
        let (quoted, tcp) = icmp[8..].split_at(I::LEN);
        let header = |header: &[u8]| I::CHECK.map(|_| sum(header));
        // The rest of a pseudo header (length and protocol) does not change.
        let pseudo = if I::CHECK.is_none() { &ip[I::ADDRESSES..] } else { &[] };
        Self {
            outer: header(ip),
            icmp: sum(&[pseudo, icmp].concat()),
            quoted: header(quoted),
            tcp: quotes_tcp_header.then(|| sum(&[&quoted[I::ADDRESSES..], tcp].concat())),
        }
    }
}

/// Reads the error as the BPF program does: with the TCP header only if the error quotes all of it.
fn load<I: IcmpIp>(bytes: &[u8]) -> Option<IcmpError<I>> {
    let mut rest = bytes;
    let mut error = IcmpError::<I>::zeroed();
    error.ip = take(&mut rest)?;
    error.icmp = take(&mut rest)?;
    error.quoted = take(&mut rest)?;
    let (ports, seq) = (take(&mut rest)?, take(&mut rest)?);
    error.tcp = Tcp { ports, seq, ..Tcp::zeroed() };
    if error.is_about_tcp() && error.quotes_tcp_header() {
        error.tcp = take(&mut bytes.get(IcmpError::<I>::LONG - Tcp::LEN..)?)?;
    }
    Some(error)
}

fn store<I: IcmpIp>(error: &IcmpError<I>, bytes: &mut [u8]) {
    let len = if error.quotes_tcp_header() { IcmpError::<I>::LONG } else { IcmpError::<I>::SHORT };
    let (ip, rest) = bytes[..len].split_at_mut(I::LEN);
    put(ip, &error.ip);
    let (icmp, rest) = rest.split_at_mut(size_of::<Icmp>());
    put(icmp, &error.icmp);
    let (quoted, tcp) = rest.split_at_mut(I::LEN);
    put(quoted, &error.quoted);
    put(tcp, &error.tcp);
}

/// What the error has to become. The checksums are copied from `translated`.
fn expected<I: Model>(bytes: &[u8], translated: &[u8], numbers: &Numbers, is_long: bool) -> Vec<u8> {
    let mut expected = bytes.to_vec();
    let address = (I::LEN - I::ADDRESSES) / 2;
    let (icmp, quoted, tcp) = (I::LEN, I::LEN + 8, I::LEN * 2 + 8);
    let [source, destination] = [&numbers.to_source, &numbers.to_destination].map(bytes_of);
    for (start, first, second) in [(0, source, destination), (quoted, destination, source)] {
        expected[start + I::HOPS] = HOP_LIMIT;
        let addresses = &mut expected[start + I::ADDRESSES..][..address * 2];
        addresses[..address].copy_from_slice(&first[..address]);
        addresses[address..].copy_from_slice(&second[..address]);
    }
    let ports = numbers.to_ports.to_ne_bytes();
    expected[tcp..tcp + 4].copy_from_slice(&[ports[2], ports[3], ports[0], ports[1]]);
    let mut less = |at: usize, delta: u32| {
        let word = &mut expected[at..at + 4];
        let old = u32::from_be_bytes([word[0], word[1], word[2], word[3]]);
        word.copy_from_slice(&old.wrapping_sub(delta).to_be_bytes());
    };
    less(tcp + 4, numbers.seq_delta);
    if is_long {
        less(tcp + 8, numbers.ack_delta);
    }
    let headers = I::CHECK.into_iter().flat_map(|check| [check, quoted + check]);
    for check in headers.chain([icmp + 2]).chain(is_long.then_some(tcp + 16)) {
        expected[check..check + 2].copy_from_slice(&translated[check..check + 2]);
    }
    expected
}

fn check<I: Model>(numbers: &Numbers, bytes: &[u8]) {
    let mut bytes = bytes[..bytes.len().min(1500)].to_vec();
    if bytes.len() < IcmpError::<I>::SHORT {
        return;
    }
    if numbers.kind & 2 == 0 {
        let len = bytes.len();
        I::set(&mut bytes, I::ICMP, len);
        let errors: &[u8] = if I::CHECK.is_some() { &[3, 11, 12] } else { &[1, 2, 3, 4] };
        bytes[I::LEN] = errors[usize::from(bytes[I::LEN]) % errors.len()];
        I::set(&mut bytes[I::LEN + 8..], 6, 1500);
    }
    let Some(mut error) = load::<I>(&bytes) else { return };
    if !error.is_about_tcp() {
        assert!(numbers.kind & 2 != 0, "not taken for an error about TCP: {bytes:02x?}");
        return;
    }
    let is_long = error.quotes_tcp_header();
    let fixed = |seq_delta, ack_delta| DirFixed { seq_delta, ack_delta, ..DirFixed::zeroed() };
    let back = DirFixed {
        to_source: numbers.to_source,
        to_destination: numbers.to_destination,
        to_ports: numbers.to_ports,
        ..fixed(0, 0)
    };
    error.translate(&fixed(numbers.seq_delta, numbers.ack_delta).to_shared(), &back.to_shared());
    let mut translated = bytes.clone();
    store(&error, &mut translated);
    assert_eq!(Sums::of::<I>(&translated, is_long), Sums::of::<I>(&bytes, is_long), "(translated, original)");
    assert_eq!(translated, expected::<I>(&bytes, &translated, numbers, is_long), "(translated, expected)");
}

fuzz_target!(|input: &[u8]| {
    let mut bytes = input;
    let Some(numbers) = take::<Numbers>(&mut bytes) else { return };
    if numbers.kind & 1 == 0 { check::<Ipv4>(&numbers, bytes) } else { check::<Ipv6>(&numbers, bytes) }
});
