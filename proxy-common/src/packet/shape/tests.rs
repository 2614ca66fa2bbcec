use bytemuck::Zeroable as _;

use super::*;
use crate::packet::checksum::finish;

fn v6(next_header: u8) -> Ipv6 {
    Ipv6 { next_header, payload_length: 1000_u16.to_be(), ..Ipv6::zeroed() }
}

/// The shape of a packet whose headers after the IP header are these, at eight bytes each.
fn shape(first: u8, chain: &[Extension]) -> Option<Shape> {
    v6(first).shape(|at| chain.get(at as usize / 8).copied())
}

fn next(next_header: u8) -> Extension {
    Extension { next_header, ..Extension::zeroed() }
}

#[test]
fn surplus_is_what_stands_in_front_of_tcp() {
    use next_header::{DESTINATION, HOP_BY_HOP, ROUTING};
    let whole = |surplus| Some(Shape { surplus, piece: Piece::WHOLE });
    assert_eq!(shape(protocol::TCP, &[]), whole(0));
    for kind in [DESTINATION, HOP_BY_HOP, ROUTING] {
        assert_eq!(shape(kind, &[next(protocol::TCP)]), whole(8));
    }
    let long = Extension { length: 2, ..next(DESTINATION) };
    let chain = [long, next(0), next(0), next(protocol::TCP)];
    assert_eq!(shape(HOP_BY_HOP, &chain), whole(32));
    assert_eq!(shape(HOP_BY_HOP, &chain[..3]), None, "cut");
    assert_eq!(shape(17, &[next(protocol::TCP)]), None, "UDP");
    let left = Extension { place: u16::from_ne_bytes([0, 1]), ..next(protocol::TCP) };
    assert_eq!(shape(ROUTING, &[left]), None, "a router's");
    assert_eq!(shape(DESTINATION, &[next(DESTINATION); 9]), None, "endless");
}

#[test]
fn pieces_keep_their_fragment_header() {
    use next_header::{DESTINATION, FRAGMENT, HOP_BY_HOP};
    let header = |place: u16| Extension { place: place.to_be(), id: 9, ..next(protocol::TCP) };
    let piece = |surplus, offset, more| Some(Shape { surplus, piece: Piece { id: 9, offset, more } });
    assert_eq!(shape(FRAGMENT, &[header(1)]), piece(0, 0, 1));
    assert_eq!(shape(FRAGMENT, &[header(0x0808 | 1)]), piece(0, 0x808, 1));
    assert_eq!(shape(HOP_BY_HOP, &[next(FRAGMENT), header(0x0808)]), piece(8, 0x808, 0));
    // All of a packet in one: no piece.
    assert_eq!(shape(FRAGMENT, &[header(0)]), Some(Shape { surplus: 8, piece: Piece::WHOLE }));
    // What the fragment header hides cannot be taken out.
    assert_eq!(shape(FRAGMENT, &[Extension { next_header: DESTINATION, ..header(1) }]), None);
    let back = Extension::of_piece(&Piece { id: 9, offset: 0x808, more: 1 });
    assert_eq!(back, header(0x0809));
}

#[test]
fn options_of_ipv4_are_surplus() {
    let plain = Ipv4 {
        version_and_length: 0x45,
        protocol: protocol::TCP,
        total_length: 1000_u16.to_be(),
        identification: 0x1234,
        source: 0x0102_0304,
        destination: 0x0506_0708,
        ttl: 9,
        ..Ipv4::zeroed()
    };
    let never = |_| -> Option<Extension> { unreachable!() };
    let odd = |version_and_length| Ipv4 { version_and_length, ..plain };
    let whole = Piece { id: 0x1234, ..Piece::WHOLE };
    assert_eq!(plain.shape(never), Some(Shape { surplus: 0, piece: whole }));
    assert_eq!(odd(0x4f).shape(never), Some(Shape { surplus: 40, piece: whole }));
    assert_eq!(odd(0x44).shape(never), None);
    assert_eq!(odd(0x65).shape(never), None);
    assert_eq!(Ipv4 { protocol: 17, ..plain }.shape(never), None);
    let piece = Ipv4 { fragment: 0x2010_u16.to_be(), ..odd(0x46) };
    let expected = Piece { id: 0x1234, offset: 0x80, more: 1 };
    assert_eq!(piece.shape(never), Some(Shape { surplus: 4, piece: expected }));

    let without = odd(0x46).without(4, false);
    assert_eq!((without.version_and_length, u16::from_be(without.total_length)), (0x45, 996));
    assert_eq!(finish(without.sum()), 0, "its checksum is right");
    let mut renamed = without;
    renamed.set_id(0xbeef);
    assert_eq!((renamed.identification, finish(renamed.sum())), (0xbeef, 0));
}
