//! ICMP errors about packets that were spliced.
//!
//! A router that cannot forward a packet which the proxy sent on for a peer (the *sender*) tells
//! the proxy so, and quotes the packet's beginning. Only the sender can do anything about it (send
//! smaller packets, most of all), so the error has to reach it, and has to quote the packet as the
//! sender had sent it.
//!
//! Two flows have names here. The quoted packet belongs to the *sent* flow; the other flow of the
//! stream is the *back* flow. The back flow's packets arrive from the host to which the quoted
//! packet was sent, and leave towards the sender, as the error must. So the quote with source and
//! destination exchanged is the back flow's key, and the error needs the same new addresses as the
//! back flow's packets.
//!
//! The new source of the error is not the router's address but the proxy's own, which is where the
//! sender believes the other end of its connection to be. A router's address may be private, would
//! tell clients how the network behind the proxy is built, and would be dropped by reverse-path
//! filters wherever the proxy is not a router in the sender's eyes; receivers identify the
//! connection by the quote alone (RFC 1122 section 4.2.3.9). A NAT does the same for errors from
//! its inner side (RFC 5508 section 4.2).

use bytemuck::{Pod, Zeroable};

use super::checksum::Difference;
use super::headers::{HeaderChange, Ip, Ipv4, Ipv6, Tcp};
use crate::flow::SharedFixed;

/// The header of an ICMP or ICMPv6 error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Icmp {
    /// Type of the message. ICMP and ICMPv6 have numbers of their own.
    pub kind: u8,
    /// The cause, within the type.
    pub code: u8,
    /// Internet checksum of the message, wire order; in ICMPv6 of a pseudo header as well.
    pub check: u16,
    /// Depends on kind and code; the MTU, for one. Wire order.
    pub rest: u32,
}

/// What ICMP adds to an IP version.
pub trait IcmpIp: Ip {
    /// Whether ICMP follows at once: no options or extension headers, not a fragment.
    fn is_plain_icmp(&self) -> bool;
    /// Whether this type of message is an error of which the sender of a packet must be told.
    fn is_error(kind: u8) -> bool;
    /// How ICMP's checksum changes when the IP header before it and the quoted IP header change.
    fn covered(outer: &HeaderChange, quoted: &HeaderChange) -> Difference;
}

/// The first bytes of an ICMP error, as they lie in the packet.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct IcmpError<I: IcmpIp> {
    /// The IP header of the error itself: from the router or host that reports, to the proxy.
    pub ip: I,
    /// The header of the message.
    pub icmp: Icmp,
    /// The quoted IP header, as the packet left the proxy.
    pub quoted: I,
    /// The quoted TCP header. If the error does not quote the whole header, only ports and `seq`
    /// are valid.
    pub tcp: Tcp,
}

impl<I: IcmpIp> IcmpError<I> {
    /// Bytes of an error that quotes the whole TCP header (without options).
    pub const LONG: usize = size_of::<Self>();
    /// Bytes that every error about a TCP packet has: it need not quote more of TCP than ports and
    /// `seq` (RFC 792).
    pub const SHORT: usize = Self::LONG - Tcp::LEN + 8;

    /// An error to be filled from a packet.
    #[inline(always)]
    pub fn zeroed() -> Self {
        Self { ip: I::zeroed(), icmp: Icmp::zeroed(), quoted: I::zeroed(), tcp: Tcp::zeroed() }
    }

    /// Whether this is an unfragmented error, without IP options, about an unfragmented TCP packet.
    /// Looks at no more than [`Self::SHORT`] bytes.
    #[inline(always)]
    pub fn is_about_tcp(&self) -> bool {
        self.ip.is_plain_icmp()
            && I::is_error(self.icmp.kind)
            && self.quoted.is_plain_tcp()
            && (Self::SHORT..=usize::from(u16::MAX)).contains(&self.len())
    }

    /// Whether the packet goes on to [`Self::LONG`] bytes.
    #[inline(always)]
    pub fn quotes_tcp_header(&self) -> bool {
        self.len() >= Self::LONG
    }

    /// The length of the packet by its IP header, since an Ethernet frame may be longer.
    /// Meaningless if the header says zero.
    #[inline(always)]
    fn len(&self) -> usize {
        I::LEN + self.ip.segment_len(0) as usize
    }

    /// The key of the back flow.
    #[inline(always)]
    pub fn key(&self) -> I::Key {
        self.quoted.answer_key(self.tcp.ports)
    }

    /// Sequence number of the quoted packet, as it left the proxy.
    #[inline(always)]
    pub fn quoted_seq(&self) -> u32 {
        u32::from_be(self.tcp.seq)
    }

    /// Turns the error into one for the sender: addressed to it, and with the quote as it had sent
    /// the packet.
    ///
    /// ICMP type, code, MTU and the rest of the quote (window, options, payload) stay; the length
    /// of a packet does not change when it is spliced, so the MTU is right for the sender too. All
    /// checksums are adjusted by what changed: one that was wrong stays wrong.
    #[inline(always)]
    pub fn translate(&mut self, sent: &SharedFixed, back: &SharedFixed) {
        let outer = self.ip.readdress(&back.to_source, &back.to_destination, false);
        let quoted = self.quoted.readdress(&back.to_destination, &back.to_source, false);
        let mut covered = I::covered(&outer, &quoted);
        covered.add(self.translate_tcp(quoted.pseudo, sent, back));
        self.icmp.check = covered.apply(self.icmp.check);
    }

    /// Returns what it does to the sum over the TCP header; `pseudo` was done to its pseudo header.
    #[inline(always)]
    fn translate_tcp(&mut self, pseudo: Difference, sent: &SharedFixed, back: &SharedFixed) -> Difference {
        let old = self.tcp;
        self.tcp.ports = back.to_ports.get().rotate_left(16);
        self.tcp.seq = u32::from_be(old.seq).wrapping_sub(sent.seq_delta.get()).to_be();
        let mut header = Difference::default();
        header.replace(old.ports, self.tcp.ports);
        header.replace(old.seq, self.tcp.seq);
        if self.quotes_tcp_header() {
            self.tcp.ack = u32::from_be(old.ack).wrapping_sub(sent.ack_delta.get()).to_be();
            header.replace(old.ack, self.tcp.ack);
            let mut all = header;
            all.add(pseudo);
            self.tcp.check = all.apply(old.check);
            header.replace(old.check.into(), self.tcp.check.into());
        }
        header
    }
}

impl IcmpIp for Ipv4 {
    #[inline(always)]
    fn is_plain_icmp(&self) -> bool {
        /// More fragments, or an offset.
        const FRAGMENT: u16 = 0x3fff_u16.to_be();
        self.version_and_length == 0x45 && self.protocol == Self::ICMP && self.fragment & FRAGMENT == 0
    }

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // Destination unreachable (fragmentation needed is one of its codes), time exceeded,
        // parameter problem.
        matches!(kind, 3 | 11 | 12)
    }

    #[inline(always)]
    fn covered(_outer: &HeaderChange, quoted: &HeaderChange) -> Difference {
        // ICMP has no pseudo header, and the checksum of the quoted header compensates the change
        // of that header.
        quoted.header
    }
}

impl IcmpIp for Ipv6 {
    #[inline(always)]
    fn is_plain_icmp(&self) -> bool {
        u32::from_be(self.version_class_label) >> 28 == 6 && self.next_header == Self::ICMP
    }

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // Destination unreachable, packet too big, time exceeded, parameter problem.
        matches!(kind, 1..=4)
    }

    #[inline(always)]
    fn covered(outer: &HeaderChange, quoted: &HeaderChange) -> Difference {
        let mut covered = outer.pseudo;
        covered.add(quoted.pseudo);
        covered.add(quoted.header);
        covered
    }
}

/// Whether a packet with this sequence number can be on its way (RFC 5927 section 4.1: `una <= seq
/// < next`, in sequence space). Somebody who cannot see the packets of the connection cannot guess
/// such a number. On an idle connection there is none.
#[inline(always)]
pub const fn is_outstanding(seq: u32, una: u32, next: u32) -> bool {
    let outstanding = next.wrapping_sub(una);
    (outstanding as i32) > 0 && seq.wrapping_sub(una) < outstanding
}

const _: () = {
    assert!(IcmpError::<Ipv4>::LONG == 68 && IcmpError::<Ipv4>::SHORT == 56);
    assert!(IcmpError::<Ipv6>::LONG == 108 && IcmpError::<Ipv6>::SHORT == 96);
};

#[cfg(test)]
mod tests;
