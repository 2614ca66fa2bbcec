//! TCP segments that no socket of the kernel sends: probes and resets for spliced streams.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};

use bytemuck::Zeroable as _;
use proxy_common::packet::checksum;
use proxy_common::packet::headers::{HOP_LIMIT, Ip, Ipv4, Ipv6, Tcp, protocol};
use proxy_common::packet::options::TimestampsOption;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// Of an IPv4 packet that no router may cut.
const DONT_FRAGMENT: u16 = 0x4000;

/// A segment without payload. Host order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Both of one family; IPv4-mapped addresses count as IPv4. The source need not be an address
    /// of this host.
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// As they stand in the header, which has a byte for the flags:
    /// [`proxy_common::packet::headers::tcp_flags`].
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    /// The header's field, hence not scaled.
    pub window: u16,
    /// TSval and TSecr.
    pub timestamps: Option<(u32, u32)>,
}

/// Sends segments by the routing tables, like the kernel's own segments.
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
        // A socket of this protocol only sends, and takes packets with their IP header. A socket of
        // IPPROTO_TCP would get a copy of every segment that arrives.
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
    /// The addresses are of different families, or there is no way (or no room in the queue) to the
    /// destination.
    pub fn send(&self, segment: Segment) -> io::Result<()> {
        let packet = segment.packet()?;
        // The kernel would take a port for a protocol (rawv6_sendmsg).
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
        let timestamps = self.timestamps_option();
        let options = timestamps.as_ref().map_or(&[][..], bytemuck::bytes_of);
        let len = (Tcp::LEN + options.len()) as u16;
        match (self.source.ip().to_canonical(), self.destination.ip().to_canonical()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let header = Ipv4 {
                    version_and_length: 0x45,
                    total_length: (Ipv4::LEN as u16 + len).to_be(),
                    fragment: DONT_FRAGMENT.to_be(),
                    ttl: HOP_LIMIT,
                    protocol: protocol::TCP,
                    source: u32::from_ne_bytes(source.octets()),
                    destination: u32::from_ne_bytes(destination.octets()),
                    // The kernel fills in the identification and the header's checksum.
                    ..Ipv4::zeroed()
                };
                Ok(self.after(&header, options))
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let header = Ipv6 {
                    version_class_label: 0x6000_0000_u32.to_be(),
                    payload_length: len.to_be(),
                    next_header: protocol::TCP,
                    hop_limit: HOP_LIMIT,
                    source: bytemuck::cast(source.octets()),
                    destination: bytemuck::cast(destination.octets()),
                };
                Ok(self.after(&header, options))
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// `ip`, and then the segment with `options`.
    fn after(&self, ip: &impl Ip, options: &[u8]) -> Vec<u8> {
        let len = Tcp::LEN + options.len();
        let [[a, b], [c, d]] = [self.source, self.destination].map(|end| end.port().to_be_bytes());
        let mut tcp = Tcp {
            ports: u32::from_ne_bytes([a, b, c, d]),
            seq: self.seq.to_be(),
            ack: self.ack.to_be(),
            offset: (len as u8 / 4) << 4,
            flags: self.flags,
            window: self.window.to_be(),
            check: 0,
            urgent: 0,
        };
        let sum = ip.pseudo_sum(len as u16) + sum(bytemuck::bytes_of(&tcp)) + sum(options);
        tcp.check = checksum::finish(sum);
        [bytemuck::bytes_of(ip), bytemuck::bytes_of(&tcp), options].concat()
    }

    fn timestamps_option(&self) -> Option<TimestampsOption> {
        let (value, echo) = self.timestamps?;
        Some(TimestampsOption { head: TimestampsOption::HEAD, value: value.to_be(), echo: echo.to_be() })
    }
}

/// Of 16-bit words, as [`checksum`] adds them; `bytes` is of even length.
fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks_exact(2).map(|pair| u64::from(u16::from_ne_bytes([pair[0], pair[1]]))).sum()
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
        let len = (packet.len() - tcp) as u16;
        let pseudo_header = [&packet[addresses..tcp], &len.to_be_bytes(), &[0, protocol::TCP]].concat();
        assert_eq!(checksum::finish(sum(&pseudo_header) + sum(&packet[tcp..])), 0, "{packet:02x?}");
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
