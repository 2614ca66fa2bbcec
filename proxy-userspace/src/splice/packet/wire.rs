//! Addresses as they stand in packets and records: bytes of the wire, read as native integers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use proxy_common::flow::{Conn, Direction};

/// An address in a record's four words.
pub(super) fn address(ip: IpAddr) -> [u32; 4] {
    match ip {
        IpAddr::V4(ip) => [u32::from_ne_bytes(ip.octets()), 0, 0, 0],
        IpAddr::V6(ip) => bytemuck::cast(ip.octets()),
    }
}

/// The first word of a TCP header.
pub(super) fn ports(source: SocketAddr, destination: SocketAddr) -> u32 {
    let ([a, b], [c, d]) = (source.port().to_be_bytes(), destination.port().to_be_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

/// The two ends of one of a record's connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ends {
    pub(super) local: SocketAddr,
    pub(super) peer: SocketAddr,
}

/// The connection *from* whose peer the packets of `direction` come.
pub(super) fn ends(record: &Conn, direction: Direction) -> Ends {
    // What goes the other way leaves on it.
    let fixed = &record.flows[direction.opposite() as usize].fixed;
    let ip = |words: [u32; 4]| match record.family {
        6 => IpAddr::V6(Ipv6Addr::from(bytemuck::cast::<_, [u8; 16]>(words))),
        _ => IpAddr::V4(Ipv4Addr::from(words[0].to_ne_bytes())),
    };
    let [a, b, c, d] = fixed.to_ports.to_ne_bytes();
    Ends {
        local: SocketAddr::new(ip(fixed.to_source), u16::from_be_bytes([a, b])),
        peer: SocketAddr::new(ip(fixed.to_destination), u16::from_be_bytes([c, d])),
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;

    use super::*;

    #[test]
    fn a_record_tells_the_ends_it_was_made_of() {
        for (family, local, peer) in
            [(4, "192.0.2.9:80", "192.0.2.1:50000"), (6, "[2001:db8::9]:80", "[2001:db8::1]:50000")]
        {
            let ends_in = Ends { local: local.parse().unwrap(), peer: peer.parse().unwrap() };
            let mut record = Conn { family, ..Conn::zeroed() };
            let fixed = &mut record.flows[Direction::ToDownstream as usize].fixed;
            fixed.to_source = address(ends_in.local.ip());
            fixed.to_destination = address(ends_in.peer.ip());
            fixed.to_ports = ports(ends_in.local, ends_in.peer);
            assert_eq!(ends(&record, Direction::ToUpstream), ends_in);
        }
    }
}
