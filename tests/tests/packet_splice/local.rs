//! Peers on the proxy's own host.

use std::net::SocketAddr;

use steer_tests::require;
use steer_tests::topology::Topology;

use crate::net::{ENDPOINT_PORT, FRONT_PORT, Family, Net, Path, Setup};

/// Streams between these addresses, with the client on the proxy's host or on its own host. They
/// are spliced, or relayed because a peer is local. They carry messages and bulk in both cases.
fn expect(path: Path, front: &str, endpoint: &str, client_is_local: bool) {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let mut setup = Setup::new(Path::Packet, Family::V4);
    setup.front = SocketAddr::new(front.parse().unwrap(), FRONT_PORT);
    setup.endpoint = SocketAddr::new(endpoint.parse().unwrap(), ENDPOINT_PORT);
    let mut net = Net::start(&topology, setup);
    if client_is_local {
        net = net.with_clients_beside_the_proxy();
    }
    for _ in 0..5 {
        let mut stream = net.open();
        match path {
            Path::Packet => net.expect_path(&stream, Path::Packet),
            Path::Relay => net.expect_relayed(&stream, "local_hop"),
        }
        for _ in 0..200 {
            stream.echo();
        }
        stream.bulk(32 << 20);
    }
    net.expect_nothing_left();
}

#[test]
fn an_endpoint_on_loopback_is_spliced() {
    expect(Path::Packet, "10.71.0.1", "127.0.0.1", false);
    expect(Path::Packet, "fd71::1", "::1", false);
    expect(Path::Packet, "fd71::1", "127.0.0.1", false);
    expect(Path::Packet, "10.71.0.1", "::1", false);
}

#[test]
fn a_client_and_an_endpoint_on_loopback_are_spliced() {
    expect(Path::Packet, "127.0.0.1", "127.0.0.1", true);
    expect(Path::Packet, "::1", "::1", true);
}

#[test]
fn a_client_on_the_hosts_own_address_is_spliced() {
    expect(Path::Packet, "10.71.0.1", "10.71.1.2", true);
    expect(Path::Packet, "fd71::1", "fd71:0:0:1::2", true);
}

#[test]
fn other_local_peers_are_relayed() {
    expect(Path::Relay, "10.71.0.1", "127.0.0.1", true);
    expect(Path::Relay, "127.0.0.1", "10.71.1.2", true);
    expect(Path::Relay, "fd71::1", "::1", true);
    expect(Path::Relay, "::1", "fd71:0:0:1::2", true);
}
