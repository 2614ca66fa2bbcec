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

use crate::flow::{DirFixed, FlowKey4, FlowKey6};

/// A TCP header without options.
const TCP_WORDS: usize = 5;
/// All that a quote must hold of the TCP header (RFC 792): ports and sequence number.
const QUOTED_TCP_WORDS: usize = 2;
const ICMP_WORDS: usize = 2;
/// Of the longer one, IPv6.
const WORDS: usize = 10 + ICMP_WORDS + 10 + TCP_WORDS;
/// Protocol numbers (IPv4), next headers (IPv6).
const ICMP: u8 = 1;
const TCP: u8 = 6;
const ICMPV6: u8 = 58;
/// In the last 16 bits of an IPv4 header's second word.
const MORE_FRAGMENTS_AND_OFFSET: u16 = 0x3fff;
const FRAGMENT_OFFSET: u16 = 0x1fff;

/// The first words of an ICMP error, from its IP header to the end of the quoted TCP header (without options), as
/// they lie in the packet (wire). Those behind the end of the packet are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IcmpError<const V6: bool> {
    words: [u32; WORDS],
}

impl<const V6: bool> IcmpError<V6> {
    const IP_WORDS: usize = if V6 { 10 } else { 5 };
    const QUOTE: usize = Self::IP_WORDS + ICMP_WORDS;
    const QUOTED_TCP: usize = Self::QUOTE + Self::IP_WORDS;
    /// Of the source address in an IP header; the destination's follows.
    const ADDRESSES: usize = if V6 { 2 } else { 3 };
    const ADDRESS_WORDS: usize = if V6 { 4 } else { 1 };
    /// What the ICMP checksum covers begins here (as far as it changes): IPv6 has a pseudo header.
    const CHECKSUMMED: usize = if V6 { Self::ADDRESSES } else { Self::IP_WORDS };

    /// Bytes that every error about a TCP packet has.
    pub const SHORT: usize = (Self::QUOTED_TCP + QUOTED_TCP_WORDS) * 4;
    /// Bytes of one that quotes the whole TCP header.
    pub const LONG: usize = (Self::QUOTED_TCP + TCP_WORDS) * 4;

    pub const fn zeroed() -> Self {
        Self { words: [0; WORDS] }
    }

    /// Where the first [`Self::SHORT`] bytes of the packet go, and to the end of [`Self::LONG`] if
    /// [`Self::quotes_tcp_header`].
    pub const fn words_mut(&mut self) -> &mut [u32; WORDS] {
        &mut self.words
    }

    /// Whether this is an unfragmented ICMP error without IP options, about a first (or the only) fragment of a TCP packet.
    pub fn is_about_tcp(&self) -> bool {
        let icmp_type = self.bytes(Self::IP_WORDS)[0];
        let (outer, is_error, quoted) = if V6 {
            // Destination unreachable, packet too big, time exceeded, parameter problem.
            let is_error = matches!(icmp_type, 1..=4);
            (self.next_header_v6(0) == Some(ICMPV6), is_error, self.next_header_v6(Self::QUOTE))
        } else {
            // Destination unreachable (fragmentation needed is one of its codes), time exceeded, parameter problem.
            let is_error = matches!(icmp_type, 3 | 11 | 12);
            let outer = self.protocol_v4(0, MORE_FRAGMENTS_AND_OFFSET);
            (outer == Some(ICMP), is_error, self.protocol_v4(Self::QUOTE, FRAGMENT_OFFSET))
        };
        outer && is_error && quoted == Some(TCP) && self.length() >= Self::SHORT
    }

    /// Whether the packet goes on to [`Self::LONG`] bytes. By the IP header: an Ethernet frame may be longer.
    pub fn quotes_tcp_header(&self) -> bool {
        self.length() >= Self::LONG
    }

    /// Of the IP packet, as its header says.
    fn length(&self) -> usize {
        if V6 {
            let [high, low, ..] = self.bytes(1);
            Self::IP_WORDS * 4 + usize::from(u16::from_be_bytes([high, low]))
        } else {
            let [.., high, low] = self.bytes(0);
            usize::from(u16::from_be_bytes([high, low]))
        }
    }

    /// The protocol of the IPv4 header at this word, if it has no options and none of `fragment`'s bits.
    fn protocol_v4(&self, header: usize, fragment: u16) -> Option<u8> {
        const VERSION_AND_LENGTH: u8 = 0x45;
        let [.., high, low] = self.bytes(header + 1);
        (self.bytes(header)[0] == VERSION_AND_LENGTH && u16::from_be_bytes([high, low]) & fragment == 0)
            .then_some(self.bytes(header + 2)[1])
    }

    /// The next header of the IPv6 header at this word.
    fn next_header_v6(&self, header: usize) -> Option<u8> {
        (self.bytes(header)[0] >> 4 == 6).then_some(self.bytes(header + 1)[2])
    }

    fn bytes(&self, word: usize) -> [u8; 4] {
        self.words[word].to_ne_bytes()
    }

    /// Sequence number of the quoted packet.
    pub fn quoted_seq(&self) -> u32 {
        u32::from_be(self.words[Self::QUOTED_TCP + 1])
    }

    /// Turns the error into one for the sender: addressed to it, and with the quote as it had sent the packet.
    ///
    /// ICMP type, code, MTU and the rest of the quote (window, options, payload) stay; IP packets are spliced without
    /// changing their length, so the MTU is right for the sender too. All checksums are adjusted by what
    /// changed: one that was wrong stays wrong.
    pub fn translate(&mut self, sent: &DirFixed, back: &DirFixed) {
        let has_tcp_header = self.quotes_tcp_header();
        let icmp_before = sum(&self.words, Self::CHECKSUMMED, WORDS);
        self.set_addresses(0, &back.to_source, &back.to_destination);

        let addresses_before = self.sum_addresses(Self::QUOTE);
        let tcp_before = sum(&self.words, Self::QUOTED_TCP, WORDS);
        self.set_addresses(Self::QUOTE, &back.to_destination, &back.to_source);
        self.words[Self::QUOTED_TCP] = back.to_ports.rotate_left(16);
        self.subtract(Self::QUOTED_TCP + 1, sent.seq_delta);
        if has_tcp_header {
            self.subtract(Self::QUOTED_TCP + 2, sent.ack_delta);
            let after = self.sum_addresses(Self::QUOTE) + sum(&self.words, Self::QUOTED_TCP, WORDS);
            let word = &mut self.words[Self::QUOTED_TCP + 4];
            *word = with_half(*word, 0, adjusted(half(*word, 0), addresses_before + tcp_before, after));
        }

        let icmp_after = sum(&self.words, Self::CHECKSUMMED, WORDS);
        let word = &mut self.words[Self::IP_WORDS];
        *word = with_half(*word, 1, adjusted(half(*word, 1), icmp_before, icmp_after));
    }

    /// Replaces the addresses of the IP header at this word, and adjusts its checksum if it has one.
    fn set_addresses(&mut self, header: usize, source: &[u32; 4], destination: &[u32; 4]) {
        let before = self.sum_addresses(header);
        for i in 0..Self::ADDRESS_WORDS {
            self.words[header + Self::ADDRESSES + i] = source[i];
            self.words[header + Self::ADDRESSES + Self::ADDRESS_WORDS + i] = destination[i];
        }
        if !V6 {
            let after = self.sum_addresses(header);
            let word = &mut self.words[header + 2];
            *word = with_half(*word, 1, adjusted(half(*word, 1), before, after));
        }
    }

    fn sum_addresses(&self, header: usize) -> u64 {
        let begin = header + Self::ADDRESSES;
        sum(&self.words, begin, begin + 2 * Self::ADDRESS_WORDS)
    }

    fn subtract(&mut self, word: usize, delta: u32) {
        self.words[word] = u32::from_be(self.words[word]).wrapping_sub(delta).to_be();
    }
}

impl IcmpError<false> {
    /// The key of the back flow.
    pub fn key(&self) -> FlowKey4 {
        let address = Self::QUOTE + Self::ADDRESSES;
        FlowKey4 {
            source: self.words[address + 1],
            destination: self.words[address],
            ports: self.words[Self::QUOTED_TCP].rotate_left(16),
        }
    }
}

impl IcmpError<true> {
    /// The key of the back flow.
    pub fn key(&self) -> FlowKey6 {
        let address = Self::QUOTE + Self::ADDRESSES;
        let at = |word: usize| [0, 1, 2, 3].map(|i| self.words[word + i]);
        FlowKey6 {
            source: at(address + Self::ADDRESS_WORDS),
            destination: at(address),
            ports: self.words[Self::QUOTED_TCP].rotate_left(16),
        }
    }
}

/// Whether a packet with this sequence number can be on its way (RFC 5927 section 4.1: `una <= seq < next`, in sequence
/// space): nobody who cannot see the connection's packets guesses it, and on an idle connection there is none.
pub fn is_outstanding(seq: u32, una: u32, next: u32) -> bool {
    let outstanding = next.wrapping_sub(una);
    (outstanding as i32) > 0 && seq.wrapping_sub(una) < outstanding
}

/// The words' ones-complement sum, unfolded. Right for either byte order (RFC 1071 section 2).
fn sum(words: &[u32; WORDS], begin: usize, end: usize) -> u64 {
    let mut sum = 0;
    for i in begin..end {
        sum += u64::from(words[i]);
    }
    sum
}

/// A checksum after words whose sum was `before` have become words whose sum is `after` (RFC 1624, equation 3).
fn adjusted(checksum: u16, before: u64, after: u64) -> u16 {
    !fold(u64::from(!checksum) + u64::from(!fold(before)) + u64::from(fold(after)))
}

/// Of less than 2^16 words.
fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// The first (0) or second (1) 16 bits of a word, in the order of the packet.
fn half(word: u32, index: usize) -> u16 {
    let [a, b, c, d] = word.to_ne_bytes();
    u16::from_ne_bytes(if index == 0 { [a, b] } else { [c, d] })
}

fn with_half(word: u32, index: usize, value: u16) -> u32 {
    let [a, b, c, d] = word.to_ne_bytes();
    let [x, y] = value.to_ne_bytes();
    u32::from_ne_bytes(if index == 0 { [x, y, c, d] } else { [a, b, x, y] })
}

#[cfg(test)]
mod tests;
