//! TCP packets in an Ethernet frame: made with correct checksums, and parsed again.

use std::net::{IpAddr, SocketAddr};

pub(crate) const ETHERNET: usize = 14;
/// The MAC addresses before the EtherType. The destination is loopback's, the device that packets
/// arrive on in a test run.
pub(crate) const MACS: [u8; 12] = [0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 2];

pub(crate) const FIN: u8 = 0x01;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const PSH: u8 = 0x08;
pub(crate) const URG: u8 = 0x20;
pub(crate) const ACK: u8 = 0x10;
pub(crate) const ECE: u8 = 0x40;
pub(crate) const CWR: u8 = 0x80;

/// Both addresses are of one family. Numbers are in host order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Packet {
    pub(crate) macs: [u8; 12],
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
    /// DSCP and ECN.
    pub(crate) traffic_class: u8,
    pub(crate) ttl: u8,
    /// IPv4's identification.
    pub(crate) id: u16,
    /// IPv4: flags and offset. IPv6: the same field of a fragment header, which exists if this is
    /// not zero.
    pub(crate) fragment: u16,
    /// Only for IPv4. The length is a multiple of four.
    pub(crate) ip_options: Vec<u8>,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    pub(crate) urgent: u16,
    /// The length is a multiple of four, at most 40.
    pub(crate) options: Vec<u8>,
    pub(crate) payload: Vec<u8>,
    /// Replaces the correct length in the IP header.
    pub(crate) ip_length: Option<u16>,
    /// Bytes after the IP packet: Ethernet's padding.
    pub(crate) trailer: Vec<u8>,
}

impl Packet {
    pub(crate) const DONT_FRAGMENT: u16 = 0x4000;

    pub(crate) fn new(source: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            macs: MACS,
            source,
            destination,
            traffic_class: 0,
            ttl: 64,
            id: 0x1234,
            fragment: if source.is_ipv4() { Self::DONT_FRAGMENT } else { 0 },
            ip_options: Vec::new(),
            seq: 0,
            ack: 0,
            flags: ACK,
            window: 500,
            urgent: 0,
            options: Vec::new(),
            payload: Vec::new(),
            ip_length: None,
            trailer: Vec::new(),
        }
    }

    /// The packet as a frame.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut tcp = self.tcp_header();
        tcp.extend(&self.payload);
        let sum = transport_checksum(self.source.ip(), self.destination.ip(), 6, &tcp);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        let mut frame = self.macs.to_vec();
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                frame.extend([0x08, 0x00]);
                let header_words = 5 + self.ip_options.len() / 4;
                let length = (header_words * 4 + tcp.len()) as u16;
                let mut ip = vec![0x40 | header_words as u8, self.traffic_class];
                ip.extend(self.ip_length.unwrap_or(length).to_be_bytes());
                ip.extend(self.id.to_be_bytes());
                ip.extend(self.fragment.to_be_bytes());
                ip.extend([self.ttl, 6, 0, 0]);
                ip.extend(source.octets());
                ip.extend(destination.octets());
                ip.extend(&self.ip_options);
                let sum = checksum(&ip);
                ip[10..12].copy_from_slice(&sum.to_be_bytes());
                frame.extend(ip);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                frame.extend([0x86, 0xdd, 0x60 | self.traffic_class >> 4, self.traffic_class << 4, 0, 0]);
                let extension: &[u8] = match self.fragment.to_be_bytes() {
                    [0, 0] => &[],
                    [high, low] => &[6, 0, high, low, 0, 0, 0, 1],
                };
                let length = (extension.len() + tcp.len()) as u16;
                frame.extend(self.ip_length.unwrap_or(length).to_be_bytes());
                frame.extend([if extension.is_empty() { 6 } else { 44 }, self.ttl]);
                frame.extend(source.octets());
                frame.extend(destination.octets());
                frame.extend(extension);
            }
            _ => panic!("the addresses are of two families"),
        }
        frame.extend(tcp);
        frame.extend(&self.trailer);
        frame
    }

    fn tcp_header(&self) -> Vec<u8> {
        let mut tcp = Vec::new();
        tcp.extend(self.source.port().to_be_bytes());
        tcp.extend(self.destination.port().to_be_bytes());
        tcp.extend(self.seq.to_be_bytes());
        tcp.extend(self.ack.to_be_bytes());
        tcp.extend([((5 + self.options.len() / 4) << 4) as u8, self.flags]);
        tcp.extend(self.window.to_be_bytes());
        tcp.extend([0, 0]);
        tcp.extend(self.urgent.to_be_bytes());
        tcp.extend(&self.options);
        tcp
    }

    /// Parses a frame that holds a whole TCP packet without extension headers, and checks its
    /// checksums.
    ///
    /// # Panics
    /// If the frame holds something else, or a checksum is wrong.
    pub(crate) fn parse(frame: &[u8]) -> Self {
        let is_ipv4 = frame[12..14] == [0x08, 0x00];
        let ip = &frame[ETHERNET..];
        let ip_header = if is_ipv4 { usize::from(ip[0] & 0xf) * 4 } else { 40 };
        let ip_length = if is_ipv4 { u16_at(ip, 2) } else { u16_at(ip, 4) };
        let length = match ip_length {
            0 => ip.len(),
            length if is_ipv4 => usize::from(length),
            length => usize::from(length) + 40,
        };
        let (source, destination) = addresses(ip, is_ipv4);
        let tcp = &ip[ip_header..length];
        let tcp_header = usize::from(tcp[12] >> 4) * 4;
        assert_eq!(ip[if is_ipv4 { 9 } else { 6 }], 6, "not TCP");
        if is_ipv4 {
            assert_eq!(checksum(&ip[..ip_header]), 0, "checksum of the IP header");
        }
        assert_eq!(transport_checksum(source, destination, 6, tcp), 0, "checksum of the TCP segment");
        Self {
            macs: frame[..12].try_into().unwrap(),
            source: SocketAddr::new(source, u16_at(tcp, 0)),
            destination: SocketAddr::new(destination, u16_at(tcp, 2)),
            traffic_class: if is_ipv4 { ip[1] } else { ip[0] << 4 | ip[1] >> 4 },
            ttl: ip[if is_ipv4 { 8 } else { 7 }],
            id: if is_ipv4 { u16_at(ip, 4) } else { 0x1234 },
            fragment: if is_ipv4 { u16_at(ip, 6) } else { 0 },
            ip_options: if is_ipv4 { ip[20..ip_header].to_vec() } else { Vec::new() },
            seq: u32_at(tcp, 4),
            ack: u32_at(tcp, 8),
            flags: tcp[13],
            window: u16_at(tcp, 14),
            urgent: u16_at(tcp, 18),
            options: tcp[20..tcp_header].to_vec(),
            payload: tcp[tcp_header..].to_vec(),
            ip_length: (ip_length == 0).then_some(0),
            trailer: ip[length..].to_vec(),
        }
    }
}

/// The addresses of the IP header at the start of `ip`.
pub(crate) fn addresses(ip: &[u8], is_ipv4: bool) -> (IpAddr, IpAddr) {
    if is_ipv4 {
        let at = |offset: usize| IpAddr::from(<[u8; 4]>::try_from(&ip[offset..offset + 4]).unwrap());
        (at(12), at(16))
    } else {
        let at = |offset: usize| IpAddr::from(<[u8; 16]>::try_from(&ip[offset..offset + 16]).unwrap());
        (at(8), at(24))
    }
}

pub(crate) fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_be_bytes(bytes[offset..offset + 2].try_into().unwrap())
}

pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_be_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

/// The checksum of RFC 1071, computed in the slow and obvious way. Over data with a correct
/// checksum the result is 0.
pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The checksum with the pseudo header of TCP or ICMPv6.
pub(crate) fn transport_checksum(source: IpAddr, destination: IpAddr, protocol: u8, segment: &[u8]) -> u16 {
    let mut bytes = Vec::new();
    for address in [source, destination] {
        match address {
            IpAddr::V4(address) => bytes.extend(address.octets()),
            IpAddr::V6(address) => bytes.extend(address.octets()),
        }
    }
    bytes.extend((segment.len() as u32).to_be_bytes());
    bytes.extend([0, 0, 0, protocol]);
    bytes.extend(segment);
    checksum(&bytes)
}

/// TCP options in the layouts that Linux sends, and in others.
pub(crate) mod options {
    /// `NOP NOP TS`: the place where Linux puts timestamps.
    pub(crate) fn timestamps(value: u32, echo: u32) -> Vec<u8> {
        [vec![1, 1], bare_timestamps(value, echo)].concat()
    }

    /// The option alone, ten bytes.
    pub(crate) fn bare_timestamps(value: u32, echo: u32) -> Vec<u8> {
        [&[8, 10][..], &value.to_be_bytes(), &echo.to_be_bytes()].concat()
    }

    /// `NOP NOP SACK`: the place where Linux puts blocks.
    pub(crate) fn sack(blocks: &[(u32, u32)]) -> Vec<u8> {
        [vec![1, 1], bare_sack(blocks)].concat()
    }

    /// The option alone: two bytes, and eight for each block.
    pub(crate) fn bare_sack(blocks: &[(u32, u32)]) -> Vec<u8> {
        let mut bytes = vec![5, (2 + 8 * blocks.len()) as u8];
        for (begin, end) in blocks {
            bytes.extend(begin.to_be_bytes());
            bytes.extend(end.to_be_bytes());
        }
        bytes
    }
}

#[test]
fn a_packet_comes_back_as_it_was_built() {
    for (source, destination) in [("192.0.2.1:1", "192.0.2.2:65535"), ("[2001:db8::1]:1", "[2001:db8::2]:2")]
    {
        let mut packet = Packet::new(source.parse().unwrap(), destination.parse().unwrap());
        packet.seq = 0xfedc_ba98;
        packet.traffic_class = 0xb9;
        packet.options = options::timestamps(7, 8);
        packet.payload = b"odd".to_vec();
        packet.trailer = vec![0; 3];
        assert_eq!(Packet::parse(&packet.to_bytes()), packet);
    }
}
