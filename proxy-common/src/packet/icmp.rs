//! ICMP errors about packets that were spliced.
//!
//! A router that cannot forward a packet which the proxy sent on for a peer (the *sender*) tells the proxy so, and
//! quotes the packet's beginning. Only the sender can do anything about it (send smaller packets, most
//! of all), so the error has to reach it, and has to quote the packet as the sender had sent it.
//!
//! Three flows' names, seen from the quote: the quoted packet was *sent* by one flow of the session; the *back* flow is the other one.
//! The back flow's packets arrive from the host that the quoted packet was for, and leave towards the
//! sender, as the error must. So the quote, source and destination exchanged, is the back flow's key, and the addresses
//! that the back flow's packets are given are those that the error needs.
//!
//! The new source of the error is not the router's address but the proxy's own, which is where the sender believes
//! the other end of its connection to be. A router's address may be private, would tell clients how the network behind
//! the proxy is built, and would be dropped by reverse-path filters wherever the proxy is not a router in the
//! sender's eyes; receivers identify the connection by the quote alone (RFC 1122 section 4.2.3.9). A NAT does the
//! same for errors from its inner side (RFC 5508 section 4.2).

use bytemuck::Zeroable;

use super::checksum::Difference;
use super::headers::{Ipv4, Ipv6, Tcp, protocol};
use crate::flow::{DirFixed, FlowKey4, FlowKey6};

/// The header of an ICMP or ICMPv6 error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable)]
#[repr(C)]
pub struct Icmp {
    pub kind: u8,
    pub code: u8,
    pub check: u16,
    /// Depends on kind and code; the MTU, for one.
    pub rest: u32,
}

/// What an ICMP error is about: the IP header in front of it, and the one that it quotes.
pub trait IpHeader: Copy + Zeroable {
    /// Key of the flow map.
    type Key;
    /// The number of ICMP in this version.
    const ICMP: u8;

    /// Whether this type of ICMP message is an error that the sender of a packet must be told.
    fn is_error(kind: u8) -> bool;
    /// Of the packet, in bytes, as the header says.
    fn packet_len(&self) -> usize;
    /// The protocol of what follows, if the header is a plain one and the packet is no fragment but,
    /// if `first` is allowed, the first one.
    fn protocol(&self, first: bool) -> Option<u8>;
    /// Replaces the addresses (wire) and adjusts the header's own checksum, if it has one.
    fn set_addresses(&mut self, source: &[u32; 4], destination: &[u32; 4]) -> Replaced;
    /// The key of packets that answer this one.
    fn key_of_answer(&self, ports: u32) -> Self::Key;
    /// What ICMP's checksum covers of the header in front of it.
    fn pseudo_header(replaced: &Replaced) -> Difference;
}

/// What replacing addresses does to sums.
#[derive(Debug, Clone, Copy)]
pub struct Replaced {
    /// Over the addresses: the pseudo header of TCP.
    addresses: Difference,
    /// Over the whole IP header.
    header: Difference,
}

/// The first bytes of an ICMP error, as they lie in the packet.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct IcmpError<Ip: IpHeader> {
    pub ip: Ip,
    pub icmp: Icmp,
    pub quoted: Ip,
    /// All but ports and `seq` is zero if the error quotes less than the whole of it.
    pub tcp: Tcp,
}

impl<Ip: IpHeader> IcmpError<Ip> {
    /// Bytes of one that quotes the whole TCP header (without options).
    pub const LONG: usize = size_of::<Self>();
    /// Bytes that every error about a TCP packet has: it need not quote more of TCP than ports and `seq` (RFC 792).
    pub const SHORT: usize = Self::LONG - Tcp::LEN + 8;

    /// To be filled from a packet.
    #[inline(always)]
    pub fn zeroed() -> Self {
        let (icmp, tcp) = (Icmp::zeroed(), Tcp::zeroed());
        Self { ip: Ip::zeroed(), icmp, quoted: Ip::zeroed(), tcp }
    }

    /// Whether this is an unfragmented ICMP error, without IP options, about a TCP packet (or its first
    /// fragment). Looks at no more than [`Self::SHORT`] bytes.
    #[inline(always)]
    pub fn is_about_tcp(&self) -> bool {
        self.ip.protocol(false) == Some(Ip::ICMP)
            && self.ip.packet_len() >= Self::SHORT
            && Ip::is_error(self.icmp.kind)
            && self.quoted.protocol(true) == Some(protocol::TCP)
    }

    /// Whether the packet goes on to [`Self::LONG`] bytes. By the IP header, since an Ethernet frame may be longer.
    #[inline(always)]
    pub fn quotes_tcp_header(&self) -> bool {
        self.ip.packet_len() >= Self::LONG
    }

    /// The key of the back flow.
    #[inline(always)]
    pub fn key(&self) -> Ip::Key {
        self.quoted.key_of_answer(exchanged(self.tcp.ports))
    }

    /// Sequence number of the quoted packet.
    #[inline(always)]
    pub fn quoted_seq(&self) -> u32 {
        u32::from_be(self.tcp.seq)
    }

    /// Turns the error into one for the sender: addressed to it, and with the quote as it had sent the packet.
    ///
    /// ICMP type, code, MTU and the rest of the quote (window, options, payload) stay; the length of a packet does not
    /// change when it is spliced, so the MTU is right for the sender too. All checksums are adjusted by
    /// what changed: one that was wrong stays wrong.
    #[inline(always)]
    pub fn translate(&mut self, sent: &DirFixed, back: &DirFixed) {
        let outer = self.ip.set_addresses(&back.to_source, &back.to_destination);
        let inner = self.quoted.set_addresses(&back.to_destination, &back.to_source);
        let mut icmp = Ip::pseudo_header(&outer);
        icmp.add(inner.header);
        icmp.add(self.translate_tcp(inner.addresses, sent, back));
        self.icmp.check = icmp.apply(self.icmp.check);
    }

    /// Returns what it does to the sum of the TCP header, given what was done to its pseudo header.
    #[inline(always)]
    fn translate_tcp(&mut self, pseudo: Difference, sent: &DirFixed, back: &DirFixed) -> Difference {
        let before = self.tcp;
        self.tcp.ports = exchanged(back.to_ports);
        self.tcp.seq = minus(before.seq, sent.seq_delta);
        let mut header = Difference::default();
        header.replace(before.ports, self.tcp.ports);
        header.replace(before.seq, self.tcp.seq);
        if self.quotes_tcp_header() {
            self.tcp.ack = minus(before.ack, sent.ack_delta);
            header.replace(before.ack, self.tcp.ack);
            let mut all = header;
            all.add(pseudo);
            self.tcp.check = all.apply(before.check);
            header.replace(before.check.into(), self.tcp.check.into());
        }
        header
    }
}

impl IpHeader for Ipv4 {
    type Key = FlowKey4;
    const ICMP: u8 = protocol::ICMP;

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // Destination unreachable (fragmentation needed is one of its codes), time exceeded, parameter problem.
        matches!(kind, 3 | 11 | 12)
    }

    #[inline(always)]
    fn packet_len(&self) -> usize {
        u16::from_be(self.total_length).into()
    }

    #[inline(always)]
    fn protocol(&self, first: bool) -> Option<u8> {
        const VERSION_4_NO_OPTIONS: u8 = 0x45;
        const OFFSET: u16 = 0x1fff;
        const MORE: u16 = 0x2000;
        let forbidden = if first { OFFSET } else { OFFSET | MORE };
        let is_plain = self.version_and_length == VERSION_4_NO_OPTIONS;
        (is_plain && self.fragment & forbidden.to_be() == 0).then_some(self.protocol)
    }

    #[inline(always)]
    fn set_addresses(&mut self, source: &[u32; 4], destination: &[u32; 4]) -> Replaced {
        let mut addresses = Difference::default();
        addresses.replace(self.source, source[0]);
        addresses.replace(self.destination, destination[0]);
        let check = addresses.apply(self.check);
        let mut header = addresses;
        header.replace(self.check.into(), check.into());
        (self.source, self.destination, self.check) = (source[0], destination[0], check);
        Replaced { addresses, header }
    }

    #[inline(always)]
    fn key_of_answer(&self, ports: u32) -> FlowKey4 {
        FlowKey4 { source: self.destination, destination: self.source, ports }
    }

    #[inline(always)]
    fn pseudo_header(_replaced: &Replaced) -> Difference {
        Difference::default()
    }
}

impl IpHeader for Ipv6 {
    type Key = FlowKey6;
    const ICMP: u8 = protocol::ICMPV6;

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // Destination unreachable, packet too big, time exceeded, parameter problem.
        matches!(kind, 1..=4)
    }

    #[inline(always)]
    fn packet_len(&self) -> usize {
        size_of::<Self>() + usize::from(u16::from_be(self.payload_length))
    }

    #[inline(always)]
    fn protocol(&self, _first: bool) -> Option<u8> {
        // Fragments have a header of their own.
        let version = u32::from_be(self.version_class_label) >> 28;
        (version == 6).then_some(self.next_header)
    }

    #[inline(always)]
    fn set_addresses(&mut self, source: &[u32; 4], destination: &[u32; 4]) -> Replaced {
        let mut addresses = Difference::default();
        for i in 0..4 {
            addresses.replace(self.source[i], source[i]);
            addresses.replace(self.destination[i], destination[i]);
        }
        (self.source, self.destination) = (*source, *destination);
        Replaced { addresses, header: addresses }
    }

    #[inline(always)]
    fn key_of_answer(&self, ports: u32) -> FlowKey6 {
        FlowKey6 { source: self.destination, destination: self.source, ports }
    }

    #[inline(always)]
    fn pseudo_header(replaced: &Replaced) -> Difference {
        replaced.addresses
    }
}

/// Whether a packet with this sequence number can be on its way (RFC 5927 section 4.1: `una <= seq < next`, in sequence
/// space). Nobody who cannot see the connection's packets guesses it, and on an idle connection there is none.
#[inline(always)]
pub const fn is_outstanding(seq: u32, una: u32, next: u32) -> bool {
    let outstanding = next.wrapping_sub(una);
    (outstanding as i32) > 0 && seq.wrapping_sub(una) < outstanding
}

/// Ports (wire), source and destination exchanged.
#[inline(always)]
const fn exchanged(ports: u32) -> u32 {
    ports.rotate_left(16)
}

/// Of a number that is wire.
#[inline(always)]
const fn minus(number: u32, delta: u32) -> u32 {
    u32::from_be(number).wrapping_sub(delta).to_be()
}

const _: () = {
    assert!(IcmpError::<Ipv4>::LONG == 68 && IcmpError::<Ipv4>::SHORT == 56);
    assert!(IcmpError::<Ipv6>::LONG == 108 && IcmpError::<Ipv6>::SHORT == 96);
};

#[cfg(test)]
mod tests;
