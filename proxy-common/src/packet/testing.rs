//! Whole packets for tests: their checksums computed in full, by another way than the code under
//! test.

use bytemuck::{Zeroable as _, bytes_of};
use proptest::prelude::*;

use crate::flow::{Direction, Record, flags, state};
use crate::packet::checksum::Difference;
use crate::packet::headers::{HOP_LIMIT, Ip, Ipv4, Ipv6, Tcp, protocol};
use crate::packet::options::{Translation, Walk};
use crate::packet::rewrite;
use crate::shared::Share as _;

/// IP header, TCP header, options and payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Packet<I> {
    pub(super) ip: I,
    pub(super) tcp: Tcp,
    pub(super) options: Vec<u8>,
    pub(super) payload: Vec<u8>,
}

/// What tests need of IP besides.
pub(super) trait TestIp: Ip + core::fmt::Debug + PartialEq {
    fn arbitrary() -> BoxedStrategy<Self>;
    /// Sets the length and the header's checksum.
    fn seal(&mut self, segment: usize);
    fn header_is_right(&self) -> bool;
    /// Source and destination.
    fn addresses(&self) -> Vec<u8>;
}

impl TestIp for Ipv4 {
    fn arbitrary() -> BoxedStrategy<Self> {
        any::<(u8, u16, bool, u32, u32)>()
            .prop_map(|(traffic_class, identification, dont_fragment, source, destination)| Self {
                version_and_length: 0x45,
                traffic_class,
                identification,
                fragment: if dont_fragment { 0x4000_u16.to_be() } else { 0 },
                ttl: HOP_LIMIT,
                protocol: protocol::TCP,
                source,
                destination,
                ..Self::zeroed()
            })
            .boxed()
    }

    fn seal(&mut self, segment: usize) {
        self.total_length = ((Self::LEN + segment) as u16).to_be();
        self.check = 0;
        self.check = u16::from_ne_bytes(sum(bytes_of(self)).to_be_bytes());
    }

    fn header_is_right(&self) -> bool {
        sum(bytes_of(self)) == 0
    }

    fn addresses(&self) -> Vec<u8> {
        bytes_of(self)[12..].to_vec()
    }
}

impl TestIp for Ipv6 {
    fn arbitrary() -> BoxedStrategy<Self> {
        any::<(u32, [u32; 4], [u32; 4])>()
            .prop_map(|(class_label, source, destination)| Self {
                version_class_label: (class_label >> 4 | 0x6000_0000).to_be(),
                next_header: protocol::TCP,
                hop_limit: HOP_LIMIT,
                source,
                destination,
                ..Self::zeroed()
            })
            .boxed()
    }

    fn seal(&mut self, segment: usize) {
        self.payload_length = (segment as u16).to_be();
    }

    fn header_is_right(&self) -> bool {
        true
    }

    fn addresses(&self) -> Vec<u8> {
        bytes_of(self)[8..].to_vec()
    }
}

/// The internet checksum as RFC 1071 has it, over big-endian words; 0 if the bytes contain a right
/// one.
pub(super) fn sum(bytes: &[u8]) -> u16 {
    let words =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| u32::from(*b)));
    let sum = words.fold(0, |sum: u32, word| (sum + word) % 0xffff);
    // Zero has two forms; there is always a one in what is summed here, so it is the negative one.
    !(if sum == 0 { 0xffff } else { sum as u16 })
}

impl<I: TestIp> Packet<I> {
    pub(super) fn segment(&self) -> Vec<u8> {
        [bytes_of(&self.tcp), &self.options, &self.payload].concat()
    }

    fn with_pseudo_header(&self) -> Vec<u8> {
        let segment = self.segment();
        let rest = [0, 0, 0, protocol::TCP];
        [self.ip.addresses(), (segment.len() as u32).to_be_bytes().to_vec(), rest.to_vec(), segment].concat()
    }

    /// Sets lengths and checksums.
    pub(super) fn seal(&mut self) {
        self.tcp.offset = (((Tcp::LEN + self.options.len()) / 4) << 4) as u8;
        self.ip.seal(Tcp::LEN + self.options.len() + self.payload.len());
        self.tcp.check = 0;
        self.tcp.check = u16::from_ne_bytes(sum(&self.with_pseudo_header()).to_be_bytes());
    }

    pub(super) fn is_right(&self) -> bool {
        self.ip.header_is_right() && sum(&self.with_pseudo_header()) == 0
    }
}

/// Packets without options, with right lengths and checksums.
pub(super) fn packet<I: TestIp>() -> impl Strategy<Value = Packet<I>> {
    let numbers = any::<(u32, u32, u32, u8, u16, u16)>();
    (I::arbitrary(), numbers, prop::collection::vec(any::<u8>(), 0..100)).prop_map(
        |(ip, (ports, seq, ack, flags, window, urgent), payload)| {
            let tcp = Tcp { ports, seq, ack, flags, window, urgent, ..Tcp::zeroed() };
            let mut packet = Packet { ip, tcp, options: Vec::new(), payload };
            packet.seal();
            packet
        },
    )
}

/// Options in every layout, good and bad, padded to whole words.
pub(super) fn options() -> impl Strategy<Value = Vec<u8>> {
    let timestamps = any::<[u8; 8]>().prop_map(|body| [&[8, 10][..], &body].concat());
    let sack = (1..=4_usize, any::<[u8; 32]>())
        .prop_map(|(blocks, body)| [&[5, 2 + 8 * blocks as u8][..], &body[..8 * blocks]].concat());
    let other = prop_oneof![
        Just(vec![1]),
        Just(vec![0]),
        Just(vec![2, 4, 5, 180]),
        Just(vec![3, 3, 7]),
        Just(vec![4, 2]),
        any::<(u8, u8, u8)>().prop_map(|(kind, len, body)| vec![kind, len % 12, body]),
    ];
    let one = prop_oneof![2 => timestamps, 2 => sack, 3 => other];
    prop::collection::vec(one, 0..6).prop_map(|options| {
        let mut bytes = options.concat();
        bytes.truncate(40);
        bytes.resize(bytes.len().next_multiple_of(4), 1);
        bytes
    })
}

/// A stream in which both directions have spliced packets.
pub(super) fn record() -> impl Strategy<Value = Record> {
    let direction = any::<([u32; 4], [u32; 4], u32, u32, u32)>();
    (direction, direction, 0..=14_u8, 0..=14_u8).prop_map(|(up, down, left, right)| {
        let mut record = Record::zeroed();
        record.state = state::SPLICED;
        record.flags = flags::TIMESTAMPS | flags::SACK;
        for ((source, destination, ports, seq_delta, ts_shift), direction) in
            [up, down].into_iter().zip(Direction::BOTH)
        {
            let fixed = &mut record.flows[direction as usize].fixed;
            (fixed.to_source, fixed.to_destination, fixed.to_ports) = (source, destination, ports);
            (fixed.seq_delta, fixed.ts_shift) = (seq_delta, ts_shift.max(1));
            record.flows[direction.opposite() as usize].fixed.ack_delta = seq_delta.wrapping_neg();
        }
        let up = &mut record.flows[0].fixed;
        (up.window_left, up.window_right) = (left, right);
        let down = &mut record.flows[1].fixed;
        (down.window_left, down.window_right) = (right, left);
        record
    })
}

/// Does all that a program does to a packet of the stream's first direction; the checksums by
/// differences.
pub(super) fn forward<I: TestIp>(record: &Record, packet: &mut Packet<I>) {
    let flows = record.flows.to_shared();
    let (to, fixed) = (Translation::of(record.flags, &flows[0], &flows[1]), &flows[0].fixed);
    let strip_ecn = record.flags & flags::STRIP_ECN != 0;
    let mut change = translate_options(&mut packet.options, &to).0;
    change.add(packet.ip.readdress(&fixed.to_source, &fixed.to_destination, strip_ecn).pseudo);
    change.add(rewrite::tcp(&mut packet.tcp, fixed, strip_ecn, state::SPLICED, 0).fields);
    packet.tcp.check = change.apply(packet.tcp.check);
}

/// Translates options of any layout; returns also whether some were blanked.
pub(super) fn translate_options(options: &mut [u8], to: &Translation) -> (Difference, bool) {
    let mut walk = Walk::new(options.len() as u32, *to);
    bytemuck::bytes_of_mut(&mut walk.words)[..options.len()].copy_from_slice(options);
    let old = walk.words;
    for i in 0.. {
        if !walk.step(i) {
            break;
        }
    }
    options.copy_from_slice(&bytes_of(&walk.words)[..options.len()]);
    let mut change = Difference::default();
    for (old, new) in old.iter().zip(&walk.words) {
        change.replace(*old, *new);
    }
    (change, walk.blanked)
}

/// A stream that undoes what this one does to a packet of its first direction.
pub(super) fn inverse<I: TestIp>(record: &Record, packet: &Packet<I>) -> Record {
    let mut inverse = *record;
    for flow in &mut inverse.flows {
        let fixed = &mut flow.fixed;
        fixed.seq_delta = fixed.seq_delta.wrapping_neg();
        fixed.ack_delta = fixed.ack_delta.wrapping_neg();
        fixed.ts_floor = fixed.ts_floor.wrapping_sub(fixed.ts_shift);
        fixed.ts_shift = fixed.ts_shift.wrapping_neg();
        core::mem::swap(&mut fixed.window_left, &mut fixed.window_right);
    }
    let fixed = &mut inverse.flows[0].fixed;
    let addresses = packet.ip.addresses();
    let (source, destination) = addresses.split_at(addresses.len() / 2);
    for (to, from) in [(&mut fixed.to_source, source), (&mut fixed.to_destination, destination)] {
        *to = [0; 4];
        bytemuck::bytes_of_mut(to)[..from.len()].copy_from_slice(from);
    }
    fixed.to_ports = packet.tcp.ports;
    inverse
}
