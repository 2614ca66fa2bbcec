//! A packet of one IP version becomes a packet of the other version, as RFC 7915 translates headers.
//!
//! The packet has been rewritten already, as if the version stayed: the header has the first word
//! of each new address, and the checksums fit the header. IPv4 has only this word, and the other
//! words of the header are zero. So TCP's checksum is right for IPv4, and lacks the other words for
//! IPv6.

pub mod error;

use bytemuck::Zeroable as _;

use super::checksum::{Difference, finish};
use super::headers::{Ip, Ipv4, Ipv6, protocol};
use crate::flow::{SharedAddress, words};

/// An IP version whose plain TCP packets can become packets of the other version.
pub trait OtherFamily: Ip {
    /// The other version.
    type Other: Ip;

    /// The header of the same packet in the other version, between these addresses. `gso_size`: if
    /// the packet is a super-packet, the payload of its segments, else 0. `id`: any number, for a
    /// packet that may be fragmented.
    fn in_other_family(
        &self,
        source: &SharedAddress,
        destination: &SharedAddress,
        gso_size: u32,
        id: u16,
    ) -> Self::Other;

    /// What the pseudo header of the rewritten packet lacks in the other version.
    fn lacks(source: &SharedAddress, destination: &SharedAddress) -> Difference;
}

impl OtherFamily for Ipv4 {
    type Other = Ipv6;

    #[inline(always)]
    fn in_other_family(
        &self,
        source: &SharedAddress,
        destination: &SharedAddress,
        _gso_size: u32,
        _id: u16,
    ) -> Ipv6 {
        let payload_length = match u16::from_be(self.total_length) {
            // BIG TCP.
            0 => 0,
            total => total.wrapping_sub(Self::LEN as u16),
        };
        Ipv6 {
            version_class_label: (0x6000_0000 | u32::from(self.traffic_class) << 20).to_be(),
            payload_length: payload_length.to_be(),
            next_header: protocol::TCP,
            hop_limit: self.ttl,
            source: words(source),
            destination: words(destination),
        }
    }

    #[inline(always)]
    fn lacks(source: &SharedAddress, destination: &SharedAddress) -> Difference {
        let mut difference = Difference::default();
        for i in 1..4 {
            difference.replace(0, source[i].get());
            difference.replace(0, destination[i].get());
        }
        difference
    }
}

impl OtherFamily for Ipv6 {
    type Other = Ipv4;

    /// A packet that fits the smallest path of IPv6 may be fragmented: the sender makes no smaller
    /// packets, whatever the path of IPv4 is.
    #[inline(always)]
    fn in_other_family(
        &self,
        source: &SharedAddress,
        destination: &SharedAddress,
        gso_size: u32,
        id: u16,
    ) -> Ipv4 {
        const DONT_FRAGMENT: u16 = 0x4000_u16.to_be();
        let total_length = match u32::from(u16::from_be(self.payload_length)) {
            0 => 0,
            payload => u16::try_from(payload + Ipv4::LEN as u32).unwrap_or(0),
        };
        let largest = match gso_size {
            0 => u32::from(total_length),
            payload => payload + MAX_HEADERS,
        };
        let may_be_cut = total_length != 0 && largest <= SMALLEST_MTU - GROWTH;
        let mut ip = Ipv4 {
            version_and_length: 0x45,
            traffic_class: (u32::from_be(self.version_class_label) >> 20) as u8,
            total_length: total_length.to_be(),
            identification: if may_be_cut { id } else { 0 },
            fragment: if may_be_cut { 0 } else { DONT_FRAGMENT },
            ttl: self.hop_limit,
            protocol: protocol::TCP,
            source: source[0].get(),
            destination: destination[0].get(),
            ..Ipv4::zeroed()
        };
        ip.check = check(&ip);
        ip
    }

    #[inline(always)]
    fn lacks(_source: &SharedAddress, _destination: &SharedAddress) -> Difference {
        Difference::default()
    }
}

/// Every path of IPv6 takes packets of so many bytes (RFC 8200).
pub const SMALLEST_MTU: u32 = 1280;
/// IPv4 without options, TCP with all options.
const MAX_HEADERS: u32 = 20 + 60;
/// By how much a packet grows when it becomes IPv6.
pub const GROWTH: u32 = (size_of::<Ipv6>() - size_of::<Ipv4>()) as u32;

/// The checksum of a header in which the field is zero.
#[inline(always)]
fn check(ip: &Ipv4) -> u16 {
    let words: &[u32; 5] = bytemuck::cast_ref(ip);
    let mut sum = 0;
    for word in words {
        sum += u64::from(*word);
    }
    finish(sum)
}

#[cfg(test)]
mod tests;
