//! TCP segments that no socket of the kernel sends: probes and resets for spliced streams.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};

use proxy_common::packet::options::TimestampsOption;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

const TCP_HEADER: usize = 20;
const TIMESTAMPS: usize = size_of::<TimestampsOption>();
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const IPPROTO_TCP: u8 = libc::IPPROTO_TCP as u8;
const HOP_LIMIT: u8 = 64;

/// A segment without payload. Host order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Both of one family; IPv4-mapped addresses count as IPv4. The source need not be an address of this host.
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// As they stand in the header, which has a byte for the flags: [`proxy_common::packet::headers::tcp_flags`].
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    /// The header's field, hence not scaled.
    pub window: u16,
    /// TSval and TSecr.
    pub timestamps: Option<(u32, u32)>,
}

/// Sends segments by the routing tables, as the kernel's own would be.
#[derive(Debug)]
pub struct RawSender {
    v4: Socket,
    /// `None` on a host without IPv6.
    v6: Option<Socket>,
}

impl RawSender {
    /// # Errors
    /// CAP_NET_RAW is missing.
    pub fn new() -> io::Result<Self> {
        // This protocol only sends; one of IPPROTO_TCP would be given a copy of every segment that arrives. It takes
        // packets with their IP header.
        let open = |domain| {
            let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
            socket.set_nonblocking(true)?;
            io::Result::Ok(socket)
        };
        let v6 = match open(Domain::IPV6) {
            Ok(socket) => Some(socket),
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => None,
            Err(error) => return Err(error),
        };
        Ok(Self { v4: open(Domain::IPV4)?, v6 })
    }

    /// Hands the segment to the network once; it may be lost like any other.
    ///
    /// # Errors
    /// The addresses are of different families, or there is no way (or no room in the queue) to the destination.
    pub fn send(&self, segment: Segment) -> io::Result<()> {
        let packet = segment.packet()?;
        // A port would be taken for a protocol (rawv6_sendmsg).
        let (socket, to) = match (segment.destination.ip().to_canonical(), segment.destination) {
            (IpAddr::V6(address), SocketAddr::V6(whole)) => {
                let socket = self.v6.as_ref().ok_or(io::ErrorKind::Unsupported)?;
                (socket, SocketAddrV6::new(address, 0, 0, whole.scope_id()).into())
            }
            (address, _) => (&self.v4, SocketAddr::new(address, 0)),
        };
        socket.send_to(&packet, &SockAddr::from(to)).map(drop)
    }
}

impl Segment {
    /// The segment with its IP header.
    fn packet(&self) -> io::Result<Vec<u8>> {
        let tcp = self.tcp_header();
        let mut packet = Vec::with_capacity(IPV6_HEADER + tcp.len());
        let len = tcp.len() as u16;
        let pseudo_header = match (self.source.ip().to_canonical(), self.destination.ip().to_canonical()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                // The kernel fills in the identification and the header's checksum.
                let total = (IPV4_HEADER as u16 + len).to_be_bytes();
                packet.extend([0x45, 0, total[0], total[1], 0, 0, 0x40, 0, HOP_LIMIT, IPPROTO_TCP, 0, 0]);
                packet.extend(source.octets());
                packet.extend(destination.octets());
                sum(&packet[12..])
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                packet.extend([0x60, 0, 0, 0]);
                packet.extend(len.to_be_bytes());
                packet.extend([IPPROTO_TCP, HOP_LIMIT]);
                packet.extend(source.octets());
                packet.extend(destination.octets());
                sum(&packet[8..])
            }
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        };
        let checksum = fold(pseudo_header + u32::from(IPPROTO_TCP) + u32::from(len) + sum(&tcp));
        let tcp_at = packet.len();
        packet.extend(tcp);
        packet[tcp_at + 16..tcp_at + 18].copy_from_slice(&checksum.to_be_bytes());
        Ok(packet)
    }

    /// Without the checksum.
    fn tcp_header(&self) -> Vec<u8> {
        let len = TCP_HEADER + if self.timestamps.is_some() { TIMESTAMPS } else { 0 };
        let mut header = Vec::with_capacity(len);
        header.extend(self.source.port().to_be_bytes());
        header.extend(self.destination.port().to_be_bytes());
        header.extend(self.seq.to_be_bytes());
        header.extend(self.ack.to_be_bytes());
        // The header's length in words of four bytes, in the upper half.
        header.extend([(len as u8 / 4) << 4, self.flags]);
        header.extend(self.window.to_be_bytes());
        // Checksum and urgent pointer.
        header.extend([0; 4]);
        if let Some((value, echo)) = self.timestamps {
            // NOP NOP, then kind and length.
            header.extend([1, 1, 8, 10]);
            header.extend(value.to_be_bytes());
            header.extend(echo.to_be_bytes());
        }
        header
    }
}

/// Of 16-bit words in network order, with all carries; `bytes` is of even length and below 64 KiB.
fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum()
}

/// The internet checksum (RFC 1071).
fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use proxy_common::packet::headers::tcp_flags;

    use super::*;

    fn segment(source: &str, destination: &str) -> Segment {
        Segment {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            seq: 0x0102_0304,
            ack: 0x0506_0708,
            flags: tcp_flags::ACK,
            window: 0x090a,
            timestamps: Some((11, 12)),
        }
    }

    /// Over what has a right checksum, it is 0.
    fn verify(packet: &[u8], addresses: usize, tcp: usize) {
        let len = (packet.len() - tcp) as u32;
        let total = sum(&packet[addresses..tcp]) + len + u32::from(IPPROTO_TCP) + sum(&packet[tcp..]);
        assert_eq!(fold(total), 0, "{packet:02x?}");
    }

    #[test]
    fn headers_are_those_of_the_rfcs() {
        let packet = segment("10.0.0.1:258", "[::ffff:10.0.0.2]:772").packet().unwrap();
        assert_eq!(packet.len(), 52);
        assert_eq!(packet[..10], [0x45, 0, 0, 52, 0, 0, 0x40, 0, 64, 6]);
        assert_eq!(
            packet[12..36],
            [10, 0, 0, 1, 10, 0, 0, 2, 1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8, 0x80, 0x10, 9, 10]
        );
        assert_eq!(packet[38..], [0, 0, 1, 1, 8, 10, 0, 0, 0, 11, 0, 0, 0, 12]);
        verify(&packet, 12, 20);
        let plain = Segment { timestamps: None, ..segment("[fd00::1]:1", "[fd00::2]:2") };
        let packet = plain.packet().unwrap();
        assert_eq!(packet[..8], [0x60, 0, 0, 0, 0, 20, 6, 64]);
        assert_eq!(packet[52], 0x50);
        verify(&packet, 8, 40);
    }

    #[test]
    fn families_are_not_mixed() {
        assert!(segment("10.0.0.1:1", "[fd00::2]:2").packet().is_err());
    }
}
