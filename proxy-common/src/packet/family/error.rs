//! ICMP errors of one IP version about packets of the other one. Only "packet too big" is
//! translated: without it, a sender would repeat a packet that is too large again and again. Other
//! errors stay with the proxy.

use bytemuck::Zeroable as _;

use super::{GROWTH, OtherFamily, SMALLEST_MTU, check};
use crate::flow::{SharedAddress, SharedFixed, words};
use crate::packet::checksum::finish;
use crate::packet::headers::{HOP_LIMIT, Ip, Ipv4, Ipv6, protocol};
use crate::packet::icmp::{Icmp, IcmpError, IcmpIp};

/// What "packet too big" is in an IP version.
pub trait TooBig: OtherFamily + IcmpIp {
    /// The MTU that an error names, as IPv6 counts it. `None`: the error says something else.
    fn mtu(icmp: &Icmp) -> Option<u32>;
    /// The error about this MTU, as IPv6 counts it.
    fn too_big(mtu: u32) -> Icmp;
    /// The header of a packet of the local stack, with `len` bytes after the header.
    fn header(source: &SharedAddress, destination: &SharedAddress, protocol: u8, len: u16) -> Self;
    /// The sum over the header.
    fn sum(&self) -> u64;
    /// The sum over the pseudo header of ICMP.
    fn icmp_pseudo_sum(&self, len: u16) -> u64;
}

impl TooBig for Ipv4 {
    #[inline(always)]
    fn mtu(icmp: &Icmp) -> Option<u32> {
        let mtu = u32::from_be(icmp.rest) & 0xffff;
        // Very old routers name none.
        let names_mtu = (icmp.kind, icmp.code) == (3, 4) && mtu != 0;
        if !names_mtu {
            return None;
        }
        // A packet of the smallest MTU of IPv6 may be fragmented when it is IPv4.
        let mtu = mtu + GROWTH;
        Some(if mtu < SMALLEST_MTU { SMALLEST_MTU } else { mtu })
    }

    #[inline(always)]
    fn too_big(mtu: u32) -> Icmp {
        let mtu = mtu.saturating_sub(GROWTH);
        let mtu = if mtu > 0xffff { 0xffff } else { mtu };
        Icmp { kind: 3, code: 4, check: 0, rest: mtu.to_be() }
    }

    #[inline(always)]
    fn header(source: &SharedAddress, destination: &SharedAddress, protocol: u8, len: u16) -> Self {
        const DONT_FRAGMENT: u16 = 0x4000_u16.to_be();
        let mut ip = Self {
            version_and_length: 0x45,
            total_length: len.wrapping_add(Self::LEN as u16).to_be(),
            fragment: DONT_FRAGMENT,
            ttl: HOP_LIMIT,
            protocol,
            source: source[0].get(),
            destination: destination[0].get(),
            ..Self::zeroed()
        };
        ip.check = check(&ip);
        ip
    }

    #[inline(always)]
    fn sum(&self) -> u64 {
        // The checksum makes the sum zero, in its negative form.
        0xffff
    }

    #[inline(always)]
    fn icmp_pseudo_sum(&self, _len: u16) -> u64 {
        0
    }
}

impl TooBig for Ipv6 {
    #[inline(always)]
    fn mtu(icmp: &Icmp) -> Option<u32> {
        (icmp.kind == 2).then_some(u32::from_be(icmp.rest))
    }

    #[inline(always)]
    fn too_big(mtu: u32) -> Icmp {
        Icmp { kind: 2, code: 0, check: 0, rest: mtu.to_be() }
    }

    #[inline(always)]
    fn header(source: &SharedAddress, destination: &SharedAddress, protocol: u8, len: u16) -> Self {
        Self {
            version_class_label: 0x6000_0000_u32.to_be(),
            payload_length: len.to_be(),
            next_header: protocol,
            hop_limit: HOP_LIMIT,
            source: words(source),
            destination: words(destination),
        }
    }

    #[inline(always)]
    fn sum(&self) -> u64 {
        let hops = u16::from_ne_bytes([self.next_header, self.hop_limit]);
        addresses_sum(self)
            + u64::from(self.version_class_label)
            + u64::from(self.payload_length)
            + u64::from(hops)
    }

    #[inline(always)]
    fn icmp_pseudo_sum(&self, len: u16) -> u64 {
        addresses_sum(self) + u64::from(len.to_be()) + u64::from(u16::from(protocol::ICMPV6).to_be())
    }
}

#[inline(always)]
fn addresses_sum(ip: &Ipv6) -> u64 {
    let mut sum = 0;
    for i in 0..4 {
        sum += u64::from(ip.source[i]) + u64::from(ip.destination[i]);
    }
    sum
}

/// A whole error that quotes as little as is allowed.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ShortError<I: TooBig> {
    /// From the proxy to the sender of the quoted packet.
    pub ip: I,
    /// Always "packet too big".
    pub icmp: Icmp,
    /// The quoted IP header. Fields that do not identify the packet are not those of the packet.
    pub quoted: I,
    /// The quoted ports, and the sequence number. Wire.
    pub tcp: [u32; 2],
}

impl<I: TooBig> ShortError<I> {
    /// Bytes of the error.
    pub const LEN: usize = size_of::<Self>();
    /// Bytes after the IP header.
    const ICMP_LEN: u16 = (Self::LEN - I::LEN) as u16;
}

impl<I: TooBig<Other: TooBig>> IcmpError<I> {
    /// The error for the sender, whose packets are of the other version. `sent` and `back`: as in
    /// [`IcmpError::translate`]. `None`: the error is not "packet too big".
    #[inline(always)]
    pub fn in_other_family(&self, sent: &SharedFixed, back: &SharedFixed) -> Option<ShortError<I::Other>> {
        let len = ShortError::<I::Other>::ICMP_LEN;
        let mut icmp = I::Other::too_big(I::mtu(&self.icmp)?);
        let ip = I::Other::header(&back.to_source, &back.to_destination, I::Other::ICMP, len);
        let quoted_len = self.quoted.segment_len(0) as u16;
        let quoted = I::Other::header(&back.to_destination, &back.to_source, protocol::TCP, quoted_len);
        let seq = self.quoted_seq().wrapping_sub(sent.seq_delta.get()).to_be();
        let tcp = [back.to_ports.get().rotate_left(16), seq];
        let kind = u16::from_ne_bytes([icmp.kind, icmp.code]);
        let own = u64::from(kind) + u64::from(icmp.rest) + u64::from(tcp[0]) + u64::from(tcp[1]);
        icmp.check = finish(ip.icmp_pseudo_sum(len) + quoted.sum() + own);
        Some(ShortError { ip, icmp, quoted, tcp })
    }
}

const _: () = {
    assert!(ShortError::<Ipv4>::LEN == IcmpError::<Ipv4>::SHORT);
    assert!(ShortError::<Ipv6>::LEN == IcmpError::<Ipv6>::SHORT);
};
