//! Forged TCP segments, from a host that may send anything.

use std::net::{IpAddr, SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};
use steer_tests::netns::NetNs;

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const PSH: u8 = 8;
pub(crate) const ACK: u8 = 16;

/// A segment that is to be forged.
#[derive(Debug, Clone)]
pub(crate) struct Segment {
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    /// TSval and TSecr. `None`: the segment does not have the option.
    pub(crate) timestamps: Option<(u32, u32)>,
    pub(crate) payload: Vec<u8>,
}

/// A raw socket.
pub(crate) struct Forger(Socket);

impl Forger {
    pub(crate) fn new(host: &NetNs, like: SocketAddr) -> Self {
        let raw = Protocol::from(libc::IPPROTO_RAW);
        let socket = host.run(|| Socket::new(Domain::for_address(like), Type::RAW, Some(raw)));
        Self(socket.unwrap().unwrap())
    }

    pub(crate) fn send(&self, segment: &Segment) {
        // For a raw IPv6 socket, the port is a protocol number.
        let to = SocketAddr::new(segment.to.ip(), 0);
        if let Err(error) = self.0.send_to(&packet(segment), &to.into()) {
            assert_eq!(error.raw_os_error(), Some(libc::ENOBUFS), "{error}");
        }
    }
}

fn packet(segment: &Segment) -> Vec<u8> {
    let tcp = tcp(segment);
    let length = u16::try_from(tcp.len()).unwrap();
    let mut packet = match segment.from {
        SocketAddr::V4(_) => {
            // Version, length, DF, TTL, protocol. The kernel adds the checksum.
            let mut header = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0];
            header[2..4].copy_from_slice(&(length + 20).to_be_bytes());
            header
        }
        SocketAddr::V6(_) => {
            let mut header = vec![0x60, 0, 0, 0, 0, 0, 6, 64];
            header[4..6].copy_from_slice(&length.to_be_bytes());
            header
        }
    };
    packet.extend(octets(segment.from.ip()));
    packet.extend(octets(segment.to.ip()));
    packet.extend(tcp);
    packet
}

fn tcp(segment: &Segment) -> Vec<u8> {
    let mut tcp = Vec::new();
    tcp.extend(segment.from.port().to_be_bytes());
    tcp.extend(segment.to.port().to_be_bytes());
    tcp.extend(segment.seq.to_be_bytes());
    tcp.extend(segment.ack.to_be_bytes());
    let words = if segment.timestamps.is_some() { 8 } else { 5 };
    tcp.extend([words << 4, segment.flags]);
    tcp.extend(segment.window.to_be_bytes());
    tcp.extend([0; 4]);
    if let Some((value, echo)) = segment.timestamps {
        tcp.extend([1, 1, 8, 10]);
        tcp.extend(value.to_be_bytes());
        tcp.extend(echo.to_be_bytes());
    }
    tcp.extend(&segment.payload);

    let mut pseudo = octets(segment.from.ip());
    pseudo.extend(octets(segment.to.ip()));
    pseudo.extend([0, 6]);
    pseudo.extend(u16::try_from(tcp.len()).unwrap().to_be_bytes());
    let checksum = !folded(sum(&pseudo) + sum(&tcp));
    tcp[16..18].copy_from_slice(&checksum.to_be_bytes());
    tcp
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum()
}

fn folded(mut sum: u32) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
