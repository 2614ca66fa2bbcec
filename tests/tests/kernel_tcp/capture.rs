//! Reads the TCP segments on the wire of a namespace with a packet socket.

use std::io::Read as _;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

/// The fields that the tests compare, in host order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    pub(crate) payload: u32,
    pub(crate) timestamps: Option<(u32, u32)>,
}

impl Seen {
    pub(crate) const FIN: u8 = 1;
    pub(crate) const SYN: u8 = 2;

    /// The sequence number after the segment.
    pub(crate) fn end(&self) -> u32 {
        let flags = u32::from(self.flags & (Self::SYN | Self::FIN)).count_ones();
        self.seq.wrapping_add(self.payload + flags)
    }
}

/// Captures everything that passes the interfaces of the namespace in which it was opened, in both
/// directions.
pub(crate) struct Capture(Socket);

impl Capture {
    pub(crate) fn open() -> Self {
        let everything = i32::from((libc::ETH_P_ALL as u16).to_be());
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(everything))).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self(socket)
    }

    /// Waits `patience`, then returns the segments that came since the last call.
    pub(crate) fn after(&mut self, patience: Duration) -> Vec<Seen> {
        let deadline = Instant::now() + patience;
        let mut seen = Vec::new();
        let mut frame = vec![0; 128 << 10];
        while Instant::now() < deadline {
            match self.0.read(&mut frame) {
                Ok(len) => seen.extend(parse(&frame[..len])),
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        seen
    }
}

/// `None` if the frame is not TCP.
fn parse(frame: &[u8]) -> Option<Seen> {
    let (ethernet, ip) = frame.split_at_checked(14)?;
    let (source, destination, header, total) = match ethernet[12..] {
        [0x08, 0x00] if ip[9] == 6 => {
            let address = |at: usize| <[u8; 4]>::try_from(&ip[at..at + 4]).unwrap().into();
            (address(12), address(16), usize::from(ip[0] & 15) * 4, be16(ip, 2))
        }
        [0x86, 0xdd] if ip[6] == 6 => {
            let address = |at: usize| <[u8; 16]>::try_from(&ip[at..at + 16]).unwrap().into();
            (address(8), address(24), 40, be16(ip, 4) + 40)
        }
        _ => return None,
    };
    let tcp = &ip[header..];
    let length = usize::from(tcp[12] >> 4) * 4;
    Some(Seen {
        source: SocketAddr::new(source, be16(tcp, 0)),
        destination: SocketAddr::new(destination, be16(tcp, 2)),
        seq: be32(tcp, 4),
        ack: be32(tcp, 8),
        flags: tcp[13],
        payload: u32::from(total) - (header + length) as u32,
        timestamps: timestamps(&tcp[20..length]),
    })
}

fn timestamps(mut options: &[u8]) -> Option<(u32, u32)> {
    loop {
        options = match options {
            [8, 10, ..] => return Some((be32(options, 2), be32(options, 6))),
            [1, rest @ ..] => rest,
            [_, len, ..] => &options[usize::from(*len)..],
            _ => return None,
        };
    }
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}
