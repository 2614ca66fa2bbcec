//! A spliced session, and the expected packets. They are computed by plain arithmetic, not by the
//! code under test.

use std::net::{IpAddr, SocketAddr};

use proxy_common::flow::{Direction, Flow, FlowKey4, FlowKey6, Record, flags, output, state};
pub(crate) use steer_tests::topology::Family;

use super::packet::{ACK, CWR, ECE, Packet, SYN};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Key {
    V4(FlowKey4),
    V6(FlowKey6),
}

/// ```text
/// client ── front | steer | back ── endpoint
/// ```
/// Both directions have moved bytes, and all bytes were acknowledged. Sequence numbers wrap soon.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    pub(crate) index: u32,
    pub(crate) client: SocketAddr,
    pub(crate) front: SocketAddr,
    pub(crate) back: SocketAddr,
    pub(crate) endpoint: SocketAddr,
    pub(crate) record: Record,
}

/// The next sequence numbers of the peers in arriving packets.
pub(crate) const CLIENT_NEXT: u32 = 0xffff_ff00;
pub(crate) const ENDPOINT_NEXT: u32 = 0x7fff_fe00;
/// The next sequence numbers that the proxy would have used towards the peers.
pub(crate) const FRONT_NEXT: u32 = 0x1234_5678;
pub(crate) const BACK_NEXT: u32 = 0x0000_0100;
/// The shifts of the client's and of the endpoint's timestamps.
pub(crate) const TS_SHIFTS: [u32; 2] = [0xf000_0000, 0x2000_0001];
/// Below all timestamps of these sessions, but near enough to matter.
pub(crate) const TS_FLOOR: u32 = 0xefff_ff00;
/// TSval and TSecr of a client whose packets [`Session::identity`] leaves as they are.
pub(crate) const IDENTITY_TIMESTAMPS: (u32, u32) = (5, 0);
pub(crate) const GENERATION: u32 = 7;
/// The interface index of loopback in any namespace.
pub(crate) const LOOPBACK: u32 = 1;

impl Session {
    /// In state SPLICED, with timestamps and SACK. Windows need no scaling.
    pub(crate) fn new(family: Family) -> Self {
        Self::between(family, family)
    }

    /// The same between peers of these families.
    pub(crate) fn between(client: Family, endpoint: Family) -> Self {
        let mut session = Self::closed(client, endpoint);
        session.record.state = state::SPLICED;
        session.record.flags = flags::TIMESTAMPS | flags::SACK;
        session.record.generation = GENERATION;
        session.record.family = if client == Family::V4 { 4 } else { 6 };
        let next = [(CLIENT_NEXT, FRONT_NEXT, BACK_NEXT), (ENDPOINT_NEXT, BACK_NEXT, FRONT_NEXT)];
        for (direction, (seq, ack, sent_as)) in Direction::BOTH.into_iter().zip(next) {
            let (source, destination) = session.leaves(direction);
            let flow = session.flow(direction);
            flow.fixed.to_source = wire(source.ip());
            flow.fixed.to_destination = wire(destination.ip());
            flow.fixed.to_ports = wire_ports(source, destination);
            flow.fixed.seq_delta = sent_as.wrapping_sub(seq);
            flow.fixed.ack_delta = next[direction.opposite() as usize].0.wrapping_sub(ack);
            flow.fixed.ts_shift = TS_SHIFTS[direction as usize];
            flow.fixed.ts_floor = TS_FLOOR;
            // The local socket has received a little less.
            flow.fixed.received = seq.wrapping_sub(1000);
            flow.fixed.ifindex = LOOPBACK;
            flow.fixed.output = if client == endpoint { output::NEIGHBOUR } else { output::OTHER_FAMILY };
            flow.live.seq_end = seq;
            flow.live.ack_end = ack;
            flow.live.window = 500;
            flow.live.window_max = 500;
            flow.live.own_end = ack;
        }
        session
    }

    /// The tuples, and an empty record.
    fn closed(client: Family, endpoint: Family) -> Self {
        let at = |family, v4: &str, v6: &str, port| {
            let address = if family == Family::V4 { v4 } else { v6 };
            SocketAddr::new(address.parse().unwrap(), port)
        };
        let near = at(client, "192.0.2.10", "2001:db8:1::10", 50_123);
        let front = at(client, "192.0.2.1", "2001:db8:1::1", 443);
        let back = at(endpoint, "198.51.100.1", "2001:db8:2:ffff::1", 20_007);
        let far = at(endpoint, "198.51.100.20", "2001:db8:2::20", 8080);
        Self { index: 3, client: near, front, back, endpoint: far, record: bytemuck::Zeroable::zeroed() }
    }

    /// The session of record `index`. No other session has its tuple.
    pub(crate) fn numbered(family: Family, index: u32) -> Self {
        let mut session = Self { index, ..Self::new(family) };
        let port = u16::try_from(1024 + index).expect("few records");
        session.client.set_port(port);
        session.back.set_port(port);
        for direction in Direction::BOTH {
            let (source, destination) = session.leaves(direction);
            session.flow(direction).fixed.to_ports = wire_ports(source, destination);
        }
        session
    }

    /// A session that does not change packets, if they have no timestamps, or the timestamps
    /// [`IDENTITY_TIMESTAMPS`].
    pub(crate) fn identity(family: Family) -> Self {
        let mut session = Self::new(family);
        for direction in Direction::BOTH {
            let (source, destination) = session.arrives(direction);
            let fixed = &mut session.flow(direction).fixed;
            fixed.to_source = wire(source.ip());
            fixed.to_destination = wire(destination.ip());
            fixed.to_ports = wire_ports(source, destination);
            (fixed.seq_delta, fixed.ack_delta) = (0, 0);
            // One direction is at its floor. The shift of the other direction is not known.
            let at_floor = direction == Direction::ToUpstream;
            fixed.ts_shift = if at_floor { u32::MAX } else { 0 };
            fixed.ts_floor = IDENTITY_TIMESTAMPS.0;
        }
        session
    }

    /// A session between an IPv4 client and an IPv6 endpoint whose packets come back: what a packet
    /// of one direction becomes is a packet of the other direction. If it has no timestamps, two runs
    /// leave it as it was.
    pub(crate) fn there_and_back() -> Self {
        let mut session = Self::between(Family::V4, Family::V6);
        let live = session.record.flows[0].live;
        for direction in Direction::BOTH {
            let (source, destination) = session.arrives(direction.opposite());
            let flow = session.flow(direction);
            flow.live = live;
            let fixed = &mut flow.fixed;
            fixed.to_source = wire(source.ip());
            fixed.to_destination = wire(destination.ip());
            fixed.to_ports = wire_ports(source, destination);
            (fixed.seq_delta, fixed.ack_delta) = (0, 0);
            fixed.ts_shift = if direction == Direction::ToUpstream { u32::MAX } else { 0 };
            fixed.ts_floor = IDENTITY_TIMESTAMPS.0;
        }
        session
    }

    /// This direction's part of the record.
    pub(crate) fn flow(&mut self, direction: Direction) -> &mut Flow {
        &mut self.record.flows[direction as usize]
    }

    /// Source and destination of arriving packets.
    pub(crate) fn arrives(&self, direction: Direction) -> (SocketAddr, SocketAddr) {
        match direction {
            Direction::ToUpstream => (self.client, self.front),
            Direction::ToDownstream => (self.endpoint, self.back),
        }
    }

    /// Source and destination of rewritten packets.
    pub(crate) fn leaves(&self, direction: Direction) -> (SocketAddr, SocketAddr) {
        match direction {
            Direction::ToUpstream => (self.back, self.endpoint),
            Direction::ToDownstream => (self.front, self.client),
        }
    }

    pub(crate) fn key(&self, direction: Direction) -> Key {
        let (source, destination) = self.arrives(direction);
        let ports = wire_ports(source, destination);
        let (source, destination) = (wire(source.ip()), wire(destination.ip()));
        if self.arrives(direction).0.is_ipv4() {
            Key::V4(FlowKey4 { source: source[0], destination: destination[0], ports })
        } else {
            Key::V6(FlowKey6 { source, destination, ports })
        }
    }

    /// The next empty acknowledgement as it arrives: in order, and of all bytes that were sent.
    pub(crate) fn packet(&self, direction: Direction) -> Packet {
        let (source, destination) = self.arrives(direction);
        let live = &self.record.flows[direction as usize].live;
        Packet { seq: live.seq_end, ack: live.ack_end, ttl: 57, ..Packet::new(source, destination) }
    }

    /// The same packet when the proxy's own socket sends it to the peer that `direction` goes to.
    pub(crate) fn own_packet(&self, direction: Direction) -> Packet {
        let (source, destination) = self.leaves(direction);
        let Packet { seq, ack, .. } = self.rewritten(direction, &self.packet(direction));
        Packet { seq, ack, ..Packet::new(source, destination) }
    }

    /// The packet that `packet` must become.
    pub(crate) fn rewritten(&self, direction: Direction, packet: &Packet) -> Packet {
        let fixed = &self.record.flows[direction as usize].fixed;
        let back = &self.record.flows[direction.opposite() as usize].fixed;
        let (source, destination) = self.leaves(direction);
        let mut out = Packet { source, destination, ttl: 64, ..packet.clone() };
        if source.is_ipv4() != packet.source.is_ipv4() {
            (out.id, out.fragment) = match source.is_ipv4() {
                // What needs the smallest path of IPv6 may be cut, and then has any number.
                true if packet.payload.len() + packet.options.len() + 60 <= 1280 => (0, 0),
                true => (0, Packet::DONT_FRAGMENT),
                false => (Packet::new(source, destination).id, 0),
            };
        }
        out.seq = packet.seq.wrapping_add(fixed.seq_delta);
        // In a hand-over, bytes that the local socket has received are acknowledged, and missing
        // from the window.
        let mut missing = 0;
        if packet.flags & ACK != 0 {
            out.ack = packet.ack.wrapping_add(fixed.ack_delta);
            let lacks = back.received.wrapping_sub(out.ack).cast_signed();
            if self.record.state == state::HAND_OVER && lacks > 0 {
                (out.ack, missing) = (back.received, lacks as u64);
            }
        }
        if packet.flags & SYN == 0 {
            let window = u64::from(packet.window) << fixed.window_left;
            let left = window.saturating_sub(missing);
            let units = (left >> fixed.window_right).max(u64::from(left > 0));
            out.window = units.min(0xffff) as u16;
        }
        if self.record.flags & flags::STRIP_ECN != 0 {
            out.traffic_class &= !3;
            out.flags &= !(ECE | CWR);
        }
        let add = |bytes: &mut [u8], delta: u32| {
            let value = u32::from_be_bytes((&*bytes).try_into().unwrap()).wrapping_add(delta);
            bytes.copy_from_slice(&value.to_be_bytes());
        };
        let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
        let mut at = 0;
        while at < out.options.len() {
            match out.options[at] {
                0 => break,
                1 => {
                    at += 1;
                    continue;
                }
                8 if self.record.flags & flags::TIMESTAMPS != 0 => {
                    add(&mut out.options[at + 2..at + 6], fixed.ts_shift);
                    add(&mut out.options[at + 6..at + 10], back.ts_shift.wrapping_neg());
                    let below = fixed.ts_floor.wrapping_sub(number(&out.options[at + 2..at + 6]));
                    if below < 1 << 18 {
                        add(&mut out.options[at + 2..at + 6], below);
                    }
                }
                5 if self.record.flags & flags::SACK != 0 => {
                    let end = at + usize::from(out.options[at + 1]);
                    for edge in out.options[at + 2..end].chunks_mut(4) {
                        add(edge, fixed.ack_delta);
                    }
                }
                _ => {}
            }
            at += usize::from(out.options[at + 1]);
        }
        out
    }
}

/// An address in the form of the maps.
pub(crate) fn wire(address: IpAddr) -> [u32; 4] {
    let word = |bytes: &[u8]| u32::from_ne_bytes(bytes.try_into().unwrap());
    match address {
        IpAddr::V4(address) => [word(&address.octets()), 0, 0, 0],
        IpAddr::V6(address) => {
            let bytes = address.octets();
            [0, 4, 8, 12].map(|at| word(&bytes[at..at + 4]))
        }
    }
}

fn wire_ports(source: SocketAddr, destination: SocketAddr) -> u32 {
    let ([a, b], [c, d]) = (source.port().to_be_bytes(), destination.port().to_be_bytes());
    u32::from_ne_bytes([a, b, c, d])
}
