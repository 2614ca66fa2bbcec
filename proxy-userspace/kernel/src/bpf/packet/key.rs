//! Addresses as packets and maps hold them, and the keys of the flow maps.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use proxy_common::flow::{Direction, FlowKey4, FlowKey6, Record};

/// The map key of a flow: the addresses and ports of its packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FlowKey {
    V4(FlowKey4),
    V6(FlowKey6),
}

impl FlowKey {
    /// The key of the packets that `peer` sends to `local`. An IPv4-mapped IPv6 address, as a
    /// dual-stack socket gives it, counts as IPv4.
    pub fn new(peer: SocketAddr, local: SocketAddr) -> Self {
        let ports = wire_ports(peer.port(), local.port());
        match (peer.ip().to_canonical(), local.ip().to_canonical()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                Self::V4(FlowKey4 { source: wire4(source), destination: wire4(destination), ports })
            }
            // No packet has addresses of both families; such a key matches none.
            (source, destination) => {
                let [source, destination] = [source, destination].map(|address| match address {
                    IpAddr::V4(address) => wire6(address.to_ipv6_mapped()),
                    IpAddr::V6(address) => wire6(address),
                });
                Self::V6(FlowKey6 { source, destination, ports })
            }
        }
    }

    /// The key of one of a record's flows.
    pub fn of(record: &Record, direction: Direction) -> Self {
        let Ends { local, peer } = Ends::of(record, direction);
        Self::new(peer, local)
    }
}

/// Two ports as a native load of the first four bytes of a TCP header reads them.
pub fn wire_ports(source: u16, destination: u16) -> u32 {
    let [[a, b], [c, d]] = [source, destination].map(u16::to_be_bytes);
    u32::from_ne_bytes([a, b, c, d])
}

/// An address as the fields of [`proxy_common::flow::DirFixed`] have it: IPv4 in the first word.
pub fn wire_address(address: IpAddr) -> [u32; 4] {
    match address.to_canonical() {
        IpAddr::V4(address) => [wire4(address), 0, 0, 0],
        IpAddr::V6(address) => wire6(address),
    }
}

/// The two ends of one of a record's connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// The proxy's end.
    pub local: SocketAddr,
    /// The end of the client or of the endpoint.
    pub peer: SocketAddr,
}

impl Ends {
    /// The ends of the connection *from* whose peer the packets of `direction` come.
    pub fn of(record: &Record, direction: Direction) -> Self {
        // Packets of the opposite direction leave on that connection.
        let fixed = &record.flows[direction.opposite() as usize].fixed;
        let ip = |words: [u32; 4]| match record.family_of(direction) {
            6 => IpAddr::V6(Ipv6Addr::from(bytemuck::cast::<_, [u8; 16]>(words))),
            _ => IpAddr::V4(Ipv4Addr::from(words[0].to_ne_bytes())),
        };
        let [a, b, c, d] = fixed.to_ports.to_ne_bytes();
        Self {
            local: SocketAddr::new(ip(fixed.to_source), u16::from_be_bytes([a, b])),
            peer: SocketAddr::new(ip(fixed.to_destination), u16::from_be_bytes([c, d])),
        }
    }
}

fn wire4(address: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(address.octets())
}

fn wire6(address: Ipv6Addr) -> [u32; 4] {
    bytemuck::cast(address.octets())
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;
    use proxy_common::flow::output;

    use super::*;

    fn socket(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn keys_hold_the_bytes_of_the_packet() {
        let FlowKey::V4(key) = FlowKey::new(socket("10.0.0.1:258"), socket("10.0.0.2:80")) else {
            panic!("no IPv4 key");
        };
        assert_eq!(bytemuck::bytes_of(&key), [10, 0, 0, 1, 10, 0, 0, 2, 1, 2, 0, 80]);
        let FlowKey::V6(key) = FlowKey::new(socket("[fd00::1]:258"), socket("[fd00::2]:80")) else {
            panic!("no IPv6 key");
        };
        let mut bytes = [0; 36];
        (bytes[0], bytes[15], bytes[16], bytes[31]) = (0xfd, 1, 0xfd, 2);
        bytes[32..].copy_from_slice(&[1, 2, 0, 80]);
        assert_eq!(bytemuck::bytes_of(&key), bytes);
    }

    #[test]
    fn addresses_of_records_are_padded() {
        let mapped = wire_address("::ffff:10.0.0.1".parse().unwrap());
        assert_eq!(bytemuck::bytes_of(&mapped)[..8], [10, 0, 0, 1, 0, 0, 0, 0]);
        let v6 = wire_address("fd00::1".parse().unwrap());
        assert_eq!(bytemuck::bytes_of(&v6)[..2], [0xfd, 0]);
    }

    #[test]
    fn mapped_addresses_are_ipv4() {
        let plain = FlowKey::new(socket("10.0.0.1:1"), socket("10.0.0.2:80"));
        let mapped = FlowKey::new(socket("[::ffff:10.0.0.1]:1"), socket("[::ffff:10.0.0.2]:80"));
        assert_eq!(plain, mapped);
    }

    #[test]
    fn a_record_of_two_families_tells_both() {
        let mut record = Record { family: 6, ..Record::zeroed() };
        let ends = [("[2001:db8::9]:80", "[2001:db8::1]:50000"), ("192.0.2.9:20000", "192.0.2.1:3000")];
        let ends = ends.map(|(local, peer)| Ends { local: socket(local), peer: socket(peer) });
        for (ends, direction) in ends.iter().zip(Direction::BOTH) {
            let fixed = &mut record.flows[direction.opposite() as usize].fixed;
            fixed.output = output::OTHER_FAMILY;
            fixed.to_source = wire_address(ends.local.ip());
            fixed.to_destination = wire_address(ends.peer.ip());
            fixed.to_ports = wire_ports(ends.local.port(), ends.peer.port());
        }
        assert_eq!(Direction::BOTH.map(|direction| Ends::of(&record, direction)), ends);
        assert!(matches!(FlowKey::of(&record, Direction::ToUpstream), FlowKey::V6(_)));
        assert!(matches!(FlowKey::of(&record, Direction::ToDownstream), FlowKey::V4(_)));
    }

    #[test]
    fn a_record_tells_the_ends_it_was_made_of() {
        for (family, local, peer) in
            [(4, "192.0.2.9:80", "192.0.2.1:50000"), (6, "[2001:db8::9]:80", "[2001:db8::1]:50000")]
        {
            let ends = Ends { local: socket(local), peer: socket(peer) };
            let mut record = Record { family, ..Record::zeroed() };
            let fixed = &mut record.flows[Direction::ToDownstream as usize].fixed;
            fixed.to_source = wire_address(ends.local.ip());
            fixed.to_destination = wire_address(ends.peer.ip());
            fixed.to_ports = wire_ports(ends.local.port(), ends.peer.port());
            assert_eq!(Ends::of(&record, Direction::ToUpstream), ends);
        }
    }
}
