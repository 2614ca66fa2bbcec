//! Layouts of the headers, as they stand in a packet: every integer is wire order, as a native load
//! reads it.
//!
//! Whole words where `network-types` has arrays of bytes: LLVM loads those byte by byte when it
//! compiles for BPF, and this is what every packet passes through. That both have the same layout
//! is checked below.

use core::mem::offset_of;

use bytemuck::{Pod, Zeroable};
use network_types::eth::{EthHdr, EtherType};
use network_types::ip::{IpProto, Ipv4Hdr, Ipv6Hdr};
use network_types::tcp::TcpHdr;

use crate::flow::{FlowKey4, FlowKey6, SharedAddress};
use crate::no_stamps::LocalEnd;
use crate::packet::checksum::Difference;

/// Ethernet II.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Ethernet {
    /// MAC address of the receiver.
    pub destination: [u16; 3],
    /// MAC address of the sender.
    pub source: [u16; 3],
    /// EtherType of what follows: [`Self::IPV4`], [`Self::IPV6`], or another protocol.
    pub kind: u16,
}

impl Ethernet {
    /// Bytes of the header: 14.
    pub const LEN: usize = size_of::<Self>();
    /// `kind` of IPv4: 0x0800 in wire order.
    pub const IPV4: u16 = EtherType::Ipv4 as u16;
    /// `kind` of IPv6: 0x86dd in wire order.
    pub const IPV6: u16 = EtherType::Ipv6 as u16;
}

/// IPv4 without options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Ipv4 {
    /// Version (upper four bits, 4), length of the header in words of four bytes (lower four bits).
    /// 0x45 in a header without options.
    pub version_and_length: u8,
    /// DSCP (upper six bits, RFC 2474) and ECN (lower two bits, RFC 3168).
    pub traffic_class: u8,
    /// Bytes of the packet from this header on. 0: the length does not fit into the field, as in
    /// BIG TCP.
    pub total_length: u16,
    /// The same number in all fragments of one packet (RFC 791).
    pub identification: u16,
    /// Three flags (the last one: more fragments follow), and the place of a fragment in units of
    /// eight bytes (13 bits).
    pub fragment: u16,
    /// How many hops the packet may still take. A forwarded packet leaves with [`HOP_LIMIT`].
    pub ttl: u8,
    /// What follows the header: one of [`mod@protocol`], or another protocol.
    pub protocol: u8,
    /// Internet checksum of this header (RFC 1071).
    pub check: u16,
    /// Address of the sender.
    pub source: u32,
    /// Address of the receiver.
    pub destination: u32,
}

/// IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Ipv6 {
    /// Version (4 bits), traffic class (8), flow label (20).
    pub version_class_label: u32,
    /// Bytes after this header, extension headers included. 0: the length does not fit into the
    /// field, as in BIG TCP.
    pub payload_length: u16,
    /// What follows this header: one of [`mod@protocol`], an extension header, or another protocol.
    pub next_header: u8,
    /// How many hops the packet may still take. A forwarded packet leaves with [`HOP_LIMIT`].
    pub hop_limit: u8,
    /// Address of the sender.
    pub source: [u32; 4],
    /// Address of the receiver.
    pub destination: [u32; 4],
}

/// TCP without options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Tcp {
    /// Source port first.
    pub ports: u32,
    /// Sequence number of the first byte of payload; of a SYN, if the segment has one.
    pub seq: u32,
    /// The sequence number that the sender expects next. Valid with [`tcp_flags::ACK`].
    pub ack: u32,
    /// Length of the header in its upper four bits, in words.
    pub offset: u8,
    /// [`tcp_flags`].
    pub flags: u8,
    /// How much more the sender can take: bytes, shifted right by the sender's window scale (RFC
    /// 7323). Not shifted in a SYN.
    pub window: u16,
    /// Internet checksum of the pseudo header, this header with its options, and the payload.
    pub check: u16,
    /// Distance from `seq` to the end of urgent data, if there is any. Forwarded as it is.
    pub urgent: u16,
}

impl Tcp {
    /// Bytes of the header without options: 20.
    pub const LEN: usize = size_of::<Self>();
    /// Where `check` stands.
    pub const CHECK: usize = offset_of!(Self, check);

    /// Bytes of the header with its options: 0 to 60, valid if at least 20.
    #[inline(always)]
    pub const fn header_len(&self) -> u32 {
        (self.offset >> 4) as u32 * 4
    }
}

/// Bits of [`Tcp::flags`].
pub mod tcp_flags {
    /// The sender has no more data. A FIN takes one sequence number, after the payload.
    pub const FIN: u8 = 0x01;
    /// Opens a connection. A SYN takes one sequence number, before the payload.
    pub const SYN: u8 = 0x02;
    /// Ends the connection at once.
    pub const RST: u8 = 0x04;
    /// The receiver should pass the data on to its application now.
    pub const PSH: u8 = 0x08;
    /// [`Tcp::ack`](super::Tcp::ack) is valid.
    pub const ACK: u8 = 0x10;
    /// The sender has received a mark of congestion (RFC 3168). In a SYN: the sender can use ECN.
    pub const ECE: u8 = 0x40;
    /// The sender has slowed down, as ECE asks (RFC 3168). In a SYN, with ECE: an offer of ECN.
    pub const CWR: u8 = 0x80;
}

/// `protocol` or `next_header`.
pub mod protocol {
    use super::IpProto;

    /// ICMP for IPv4: 1 (RFC 792).
    pub const ICMP: u8 = IpProto::Icmp as u8;
    /// TCP: 6 (RFC 9293).
    pub const TCP: u8 = IpProto::Tcp as u8;
    /// ICMP for IPv6: 58 (RFC 4443).
    pub const ICMPV6: u8 = IpProto::Ipv6Icmp as u8;
}

/// Checks that each field is at the same place as in `network-types`.
macro_rules! assert_same_layout {
    ($own:ty, $other:ty: $($field:ident = $name:ident),+) => {
        const _: () = {
            assert!(size_of::<$own>() == size_of::<$other>());
            $(assert!(offset_of!($own, $field) == offset_of!($other, $name));)+
        };
    };
}

assert_same_layout!(Ethernet, EthHdr: destination = dst_addr, source = src_addr, kind = ether_type);
assert_same_layout!(
    Ipv4, Ipv4Hdr: version_and_length = vihl, traffic_class = tos, total_length = tot_len, identification = id,
    fragment = frags, ttl = ttl, protocol = proto, check = check, source = src_addr, destination = dst_addr
);
assert_same_layout!(
    Ipv6, Ipv6Hdr: version_class_label = vcf, payload_length = payload_len, next_header = next_hdr,
    hop_limit = hop_limit, source = src_addr, destination = dst_addr
);
assert_same_layout!(
    Tcp, TcpHdr: ports = source, seq = seq, ack = ack_seq, offset = _bitfield_1, window = window, check = check,
    urgent = urg_ptr
);

/// The hop limit of the packets that leave. It is that of a connection of the local stack, since a
/// packet may have used up its own hop limit on the way here.
pub const HOP_LIMIT: u8 = 64;

/// Explicit congestion notification in the traffic class.
const ECN: u8 = 0b11;

/// What a change of an IP header means for the checksums.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HeaderChange {
    /// The change of TCP's pseudo header.
    pub pseudo: Difference,
    /// The change of the sum over the whole packet that no checksum in the packet compensates.
    pub header: Difference,
    /// A mark was cleared.
    pub ecn_stripped: bool,
}

/// What the programs need of both versions of IP.
pub trait Ip: Pod {
    /// [`Ethernet::kind`].
    const KIND: u16;
    /// Without options.
    const LEN: usize = size_of::<Self>();
    /// The protocol number of its control messages.
    const ICMP: u8;
    /// The key of this version's flow map: [`FlowKey4`] or [`FlowKey6`].
    type Key: Copy;

    /// The protocol of what follows the IP header.
    fn protocol(&self) -> u8;

    /// Whether TCP follows at once: no options or extension headers, not a fragment.
    fn is_plain_tcp(&self) -> bool;

    /// Whether this header says that the packet is a fragment. (IPv6 says so in a header of its
    /// own.)
    fn is_piece(&self) -> bool;

    /// Bytes of TCP header and payload, if the packet has `len` bytes from the IP header on,
    /// padding included (BIG TCP says zero in the header). Meaningless for a malformed packet.
    fn segment_len(&self, len: u32) -> u32;

    /// How a change affects the sum over the whole packet, after TCP's checksum was corrected for
    /// [`HeaderChange::pseudo`].
    fn of_whole_packet(change: &HeaderChange) -> Difference;

    /// Shortens the packet to a segment of `len` bytes that is not a fragment.
    fn set_segment_len(&mut self, len: u16) -> HeaderChange;

    /// The key of the flow to which the packet belongs if it arrives.
    fn key(&self, ports: u32) -> Self::Key;

    /// The key of the flow to which an answer would belong.
    fn answer_key(&self, ports: u32) -> Self::Key;

    /// Where the packet goes if it arrives here.
    fn local_end(&self, ports: u32) -> LocalEnd;

    /// The sum over the pseudo header of a segment of `len` bytes.
    fn pseudo_sum(&self, len: u16) -> u64;

    /// From the proxy's tuple towards one peer to that towards the other (the addresses are those
    /// of a record), with a fresh hop limit.
    fn readdress(
        &mut self,
        source: &SharedAddress,
        destination: &SharedAddress,
        strip_ecn: bool,
    ) -> HeaderChange;
}

/// The second one of two ports, both in wire order.
#[inline(always)]
const fn destination_port(ports: u32) -> u16 {
    let [_, _, high, low] = ports.to_ne_bytes();
    u16::from_ne_bytes([high, low])
}

impl Ip for Ipv4 {
    const KIND: u16 = Ethernet::IPV4;
    const ICMP: u8 = protocol::ICMP;
    type Key = FlowKey4;

    #[inline(always)]
    fn protocol(&self) -> u8 {
        self.protocol
    }

    #[inline(always)]
    fn is_plain_tcp(&self) -> bool {
        self.version_and_length == 0x45 && self.protocol == protocol::TCP && !self.is_piece()
    }

    #[inline(always)]
    fn is_piece(&self) -> bool {
        /// More fragments, or an offset.
        const FRAGMENT: u16 = 0x3fff_u16.to_be();
        self.fragment & FRAGMENT != 0
    }

    #[inline(always)]
    fn segment_len(&self, len: u32) -> u32 {
        match u16::from_be(self.total_length) {
            0 => len,
            total => u32::from(total),
        }
        .wrapping_sub(Self::LEN as u32)
    }

    #[inline(always)]
    fn of_whole_packet(change: &HeaderChange) -> Difference {
        // Two checksums were corrected for the same addresses.
        change.pseudo.negative()
    }

    #[inline(always)]
    fn set_segment_len(&mut self, len: u16) -> HeaderChange {
        const DONT_FRAGMENT: u16 = 0x4000_u16.to_be();
        let old = *self;
        self.total_length = (Self::LEN as u16 + len).to_be();
        self.fragment &= DONT_FRAGMENT;
        let mut change = Difference::default();
        change.replace(old.total_length.into(), self.total_length.into());
        change.replace(old.fragment.into(), self.fragment.into());
        self.check = change.apply(self.check);
        HeaderChange::default()
    }

    #[inline(always)]
    fn key(&self, ports: u32) -> FlowKey4 {
        FlowKey4 { source: self.source, destination: self.destination, ports }
    }

    #[inline(always)]
    fn answer_key(&self, ports: u32) -> FlowKey4 {
        FlowKey4 { source: self.destination, destination: self.source, ports: ports.rotate_left(16) }
    }

    #[inline(always)]
    fn local_end(&self, ports: u32) -> LocalEnd {
        LocalEnd { address: [self.destination, 0, 0, 0], port: destination_port(ports), kind: Self::KIND }
    }

    #[inline(always)]
    fn pseudo_sum(&self, len: u16) -> u64 {
        let protocol = u16::from(protocol::TCP).to_be();
        u64::from(self.source) + u64::from(self.destination) + u64::from(protocol) + u64::from(len.to_be())
    }

    #[inline(always)]
    fn readdress(
        &mut self,
        source: &SharedAddress,
        destination: &SharedAddress,
        strip_ecn: bool,
    ) -> HeaderChange {
        let mut pseudo = Difference::default();
        let (source, destination) = (source[0].get(), destination[0].get());
        pseudo.replace(self.source, source);
        pseudo.replace(self.destination, destination);
        self.source = source;
        self.destination = destination;

        let mut header = pseudo;
        header.replace(u16::from_ne_bytes([self.ttl, 0]).into(), u16::from_ne_bytes([HOP_LIMIT, 0]).into());
        self.ttl = HOP_LIMIT;
        let ecn_stripped = strip_ecn && self.traffic_class & ECN != 0;
        if ecn_stripped {
            let class = self.traffic_class & !ECN;
            header.replace(
                u16::from_ne_bytes([0, self.traffic_class]).into(),
                u16::from_ne_bytes([0, class]).into(),
            );
            self.traffic_class = class;
        }
        self.check = header.apply(self.check);
        // The header's own checksum compensates every change.
        HeaderChange { pseudo, header: Difference::default(), ecn_stripped }
    }
}

impl Ip for Ipv6 {
    const KIND: u16 = Ethernet::IPV6;
    const ICMP: u8 = protocol::ICMPV6;
    type Key = FlowKey6;

    #[inline(always)]
    fn protocol(&self) -> u8 {
        self.next_header
    }

    #[inline(always)]
    fn is_plain_tcp(&self) -> bool {
        const VERSION: u32 = 0xf000_0000_u32.to_be();
        self.next_header == protocol::TCP && self.version_class_label & VERSION == 0x6000_0000_u32.to_be()
    }

    #[inline(always)]
    fn is_piece(&self) -> bool {
        false
    }

    #[inline(always)]
    fn segment_len(&self, len: u32) -> u32 {
        match u16::from_be(self.payload_length) {
            0 => len.wrapping_sub(Self::LEN as u32),
            payload => u32::from(payload),
        }
    }

    #[inline(always)]
    fn of_whole_packet(change: &HeaderChange) -> Difference {
        change.header
    }

    #[inline(always)]
    fn set_segment_len(&mut self, len: u16) -> HeaderChange {
        let mut header = Difference::default();
        header.replace(self.payload_length.into(), len.to_be().into());
        self.payload_length = len.to_be();
        HeaderChange { header, ..HeaderChange::default() }
    }

    #[inline(always)]
    fn key(&self, ports: u32) -> FlowKey6 {
        FlowKey6 { source: self.source, destination: self.destination, ports }
    }

    #[inline(always)]
    fn answer_key(&self, ports: u32) -> FlowKey6 {
        FlowKey6 { source: self.destination, destination: self.source, ports: ports.rotate_left(16) }
    }

    #[inline(always)]
    fn local_end(&self, ports: u32) -> LocalEnd {
        LocalEnd { address: self.destination, port: destination_port(ports), kind: Self::KIND }
    }

    #[inline(always)]
    fn pseudo_sum(&self, len: u16) -> u64 {
        let mut sum = u64::from(u16::from(protocol::TCP).to_be()) + u64::from(len.to_be());
        for i in 0..4 {
            sum += u64::from(self.source[i]) + u64::from(self.destination[i]);
        }
        sum
    }

    #[inline(always)]
    fn readdress(
        &mut self,
        source: &SharedAddress,
        destination: &SharedAddress,
        strip_ecn: bool,
    ) -> HeaderChange {
        const ECN_BITS: u32 = ((ECN as u32) << 20).to_be();
        let mut pseudo = Difference::default();
        // Word by word: of an array LLVM makes a call that copies bytes.
        for i in 0..4 {
            let (source, destination) = (source[i].get(), destination[i].get());
            pseudo.replace(self.source[i], source);
            pseudo.replace(self.destination[i], destination);
            self.source[i] = source;
            self.destination[i] = destination;
        }

        // TCP's checksum compensates the change of the addresses, but not these changes.
        let mut header = Difference::default();
        if self.hop_limit != HOP_LIMIT {
            header.replace(
                u16::from_ne_bytes([0, self.hop_limit]).into(),
                u16::from_ne_bytes([0, HOP_LIMIT]).into(),
            );
            self.hop_limit = HOP_LIMIT;
        }
        let ecn_stripped = strip_ecn && self.version_class_label & ECN_BITS != 0;
        if ecn_stripped {
            header.replace(self.version_class_label, self.version_class_label & !ECN_BITS);
            self.version_class_label &= !ECN_BITS;
        }
        HeaderChange { pseudo, header, ecn_stripped }
    }
}
