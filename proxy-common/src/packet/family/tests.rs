use proptest::prelude::*;

use super::*;
use crate::flow::{DirFixed, Record, flags};
use crate::packet::headers::HOP_LIMIT;
use crate::packet::testing::{Packet, TestIp, forward, packet, record};
use crate::shared::Share as _;

/// The packet as it leaves, by all that the programs do to it.
fn changed<I: TestIp + OtherFamily<Other: TestIp>>(
    record: &Record,
    mut packet: Packet<I>,
    gso_size: u32,
    id: u16,
) -> Packet<I::Other> {
    forward(record, &mut packet);
    let flows = record.flows.to_shared();
    let (source, destination) = (&flows[0].fixed.to_source, &flows[0].fixed.to_destination);
    let ip = packet.ip.in_other_family(source, destination, gso_size, id);
    let Packet { mut tcp, options, payload, .. } = packet;
    tcp.check = I::lacks(source, destination).apply(tcp.check);
    Packet { ip, tcp, options, payload }
}

fn bytes_of(address: [u32; 4]) -> [u8; 16] {
    bytemuck::cast(address)
}

proptest! {
    #[test]
    fn an_ipv4_packet_becomes_a_right_ipv6_packet(record in record(), packet in packet::<Ipv4>()) {
        let fixed = record.flows[0].fixed;
        let (old, len) = (packet.ip, packet.segment().len());
        let new = changed(&record, packet, 0, 0);
        prop_assert!(new.is_right());
        let addresses = [bytes_of(fixed.to_source), bytes_of(fixed.to_destination)].concat();
        prop_assert_eq!(new.ip.addresses(), addresses);
        let first = 0x6000_0000 | u32::from(old.traffic_class) << 20;
        prop_assert_eq!(u32::from_be(new.ip.version_class_label), first);
        prop_assert_eq!(usize::from(u16::from_be(new.ip.payload_length)), len);
        prop_assert_eq!((new.ip.next_header, new.ip.hop_limit), (protocol::TCP, HOP_LIMIT));
    }

    #[test]
    fn an_ipv6_packet_becomes_a_right_ipv4_packet(
        mut record in record(),
        packet in packet::<Ipv6>(),
        id: u16,
        strip: bool,
    ) {
        record.flags |= if strip { flags::STRIP_ECN } else { 0 };
        let fixed = &mut record.flows[0].fixed;
        for address in [&mut fixed.to_source, &mut fixed.to_destination] {
            *address = [address[0], 0, 0, 0];
        }
        let addresses = [bytes_of(fixed.to_source), bytes_of(fixed.to_destination)];
        let (old, len) = (packet.ip, packet.segment().len());
        let new = changed(&record, packet, 0, id);
        prop_assert!(new.is_right());
        prop_assert_eq!(new.ip.addresses(), [&addresses[0][..4], &addresses[1][..4]].concat());
        let class = (u32::from_be(old.version_class_label) >> 20) as u8;
        prop_assert_eq!(new.ip.traffic_class, if strip { class & !3 } else { class });
        prop_assert_eq!(usize::from(u16::from_be(new.ip.total_length)), 20 + len);
        prop_assert_eq!((new.ip.version_and_length, new.ip.protocol), (0x45, protocol::TCP));
        prop_assert_eq!((new.ip.ttl, new.ip.fragment, new.ip.identification), (HOP_LIMIT, 0, id));
    }
}

#[test]
fn only_packets_that_ipv6_cannot_make_smaller_may_be_cut() {
    const DONT_FRAGMENT: u16 = 0x4000_u16.to_be();
    let address = DirFixed::zeroed().to_shared().to_source;
    let fragment = |payload_length: u16, gso_size| {
        let ip = Ipv6 { payload_length: payload_length.to_be(), ..Ipv6::zeroed() };
        let ip = ip.in_other_family(&address, &address, gso_size, 7);
        (ip.fragment, ip.identification, u16::from_be(ip.total_length))
    };
    assert_eq!(fragment(1240, 0), (0, 7, 1260));
    assert_eq!(fragment(1241, 0), (DONT_FRAGMENT, 0, 1261));
    // A super-packet is cut into segments before it leaves.
    assert_eq!(fragment(20_000, 1180), (0, 7, 20_020));
    assert_eq!(fragment(20_000, 1181), (DONT_FRAGMENT, 0, 20_020));
    // BIG TCP has no length, in both versions.
    assert_eq!(fragment(0, 1180), (DONT_FRAGMENT, 0, 0));
    assert_eq!(fragment(65_530, 1180), (DONT_FRAGMENT, 0, 0));
    let ip = Ipv4::zeroed().in_other_family(&address, &address, 0, 0);
    assert_eq!(ip.payload_length, 0);
}
