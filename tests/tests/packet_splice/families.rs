//! Streams between an IPv4 peer and an IPv6 peer. (The scenarios that run on every path run between
//! them, too.)

use steer_tests::require;
use steer_tests::topology::Topology;

use crate::net::{Family, Net, Path, Setup, at_once, on};

const BULK: usize = 16 << 20;

#[test]
fn streams_between_two_families_are_spliced_and_carry_bulk() {
    at_once(Family::BOTH, |client| {
        on(Setup::of_families(Path::Packet, client, client.other()), |net| {
            for _ in 0..3 {
                let mut stream = net.carried();
                for _ in 0..100 {
                    stream.echo();
                }
                stream.bulk(BULK);
                net.expect_path(&stream, Path::Packet);
            }
            net.expect_nothing_left();
            assert_eq!(net.packets("drop_rewrite"), 0);
        });
    });
}

/// The bytes that the sockets hold at the hand-over, and the packets of the kernel, arrive in order.
#[test]
fn streams_between_two_families_are_handed_over_in_full_flow() {
    at_once(Family::BOTH, |client| {
        on(Setup::of_families(Path::Packet, client, client.other()), |net| {
            for _ in 0..5 {
                let mut stream = net.open();
                stream.bulk(BULK);
                net.expect_path(&stream, Path::Packet);
                stream.bulk(BULK);
            }
            net.expect_nothing_left();
        });
    });
}

/// An endpoint may send what the client has announced, and the other way. Both fit any MTU of the
/// other link.
#[test]
fn segments_fit_the_links_of_both_families() {
    if !require::root() {
        return;
    }
    for (client, mtus) in [(Family::V4, ["1500", "1400"]), (Family::V6, ["1400", "1500"])] {
        let topology = Topology::new(1).unwrap();
        let [near, far] = mtus;
        topology.clients.ip(&["link", "set", "eth0", "mtu", near]).unwrap();
        topology.proxy.ip(&["link", "set", "clients", "mtu", near]).unwrap();
        topology.endpoints[0].ip(&["link", "set", "eth0", "mtu", far]).unwrap();
        topology.proxy.ip(&["link", "set", "endpoint0", "mtu", far]).unwrap();
        let net = Net::start(&topology, Setup::of_families(Path::Packet, client, client.other()));
        let mut stream = net.carried();
        stream.bulk(BULK);
        net.expect_path(&stream, Path::Packet);
    }
}
