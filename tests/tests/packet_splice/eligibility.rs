//! Which connections are spliced, depending on what their ends have negotiated. Spliced streams
//! carry bulk.

use steer_tests::netns::NetNs;
use steer_tests::require;
use steer_tests::topology::Topology;

use crate::net::{Family, Net, Path, Setup, at_once};

const BULK: usize = 16 << 20;

/// In a network that `prepare` has changed, streams are spliced, or relayed for `reason`. They
/// carry bulk in both cases.
fn expect(reason: Option<&str>, prepare: impl Fn(&Topology) + Sync) {
    if !require::root() {
        return;
    }
    at_once(Family::BOTH, |family| {
        let topology = Topology::new(1).unwrap();
        prepare(&topology);
        let net = Net::start(&topology, Setup::new(Path::Packet, family));
        for _ in 0..3 {
            let mut stream = net.open();
            match reason {
                None => net.expect_path(&stream, Path::Packet),
                Some(reason) => net.expect_relayed(&stream, reason),
            }
            stream.bulk(BULK);
        }
        net.expect_nothing_left();
    });
}

#[test]
fn clients_with_a_smaller_mtu_are_spliced() {
    expect(None, |topology| {
        topology.clients.ip(&["link", "set", "eth0", "mtu", "1400"]).unwrap();
    });
}

/// As an endpoint behind a tunnel that the proxy does not know of.
fn with_narrow_endpoint(topology: &Topology) {
    topology.endpoints[0].ip(&["link", "set", "eth0", "mtu", "1280"]).unwrap();
}

#[test]
fn endpoints_with_a_smaller_mtu_are_spliced_from_the_second_stream_on() {
    if !require::root() {
        return;
    }
    at_once(Family::BOTH, |family| {
        let topology = Topology::new(1).unwrap();
        with_narrow_endpoint(&topology);
        let net = Net::start(&topology, Setup::new(Path::Packet, family));
        let mut first = net.open();
        net.expect_relayed(&first, "mss");
        first.bulk(BULK);
        for _ in 0..3 {
            let mut stream = net.open();
            net.expect_path(&stream, Path::Packet);
            stream.bulk(BULK);
        }
        drop(first);
        net.expect_nothing_left();
    });
}

#[test]
fn an_mss_in_the_configuration_is_what_all_clients_are_told() {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    with_narrow_endpoint(&topology);
    let net = Net::start(&topology, Setup::new(Path::Packet, Family::V4).with("mss: 1400"));
    for _ in 0..2 {
        let mut stream = net.open();
        net.expect_relayed(&stream, "mss");
        stream.bulk(BULK);
    }
    net.expect_nothing_left();
}

#[test]
fn clients_with_jumbo_frames_are_spliced() {
    expect(None, |topology| {
        topology.clients.ip(&["link", "set", "eth0", "mtu", "9000"]).unwrap();
        topology.proxy.ip(&["link", "set", "clients", "mtu", "9000"]).unwrap();
    });
}

#[test]
fn endpoints_with_jumbo_frames_are_spliced() {
    expect(None, |topology| {
        topology.endpoints[0].ip(&["link", "set", "eth0", "mtu", "9000"]).unwrap();
        topology.proxy.ip(&["link", "set", "endpoint0", "mtu", "9000"]).unwrap();
    });
}

#[test]
fn other_options_may_differ() {
    at_once([0, 1], |side| {
        for option in ["net.ipv4.tcp_sack", "net.ipv4.tcp_window_scaling"] {
            expect(None, |topology| ends(topology)[side].sysctl(option, "0").unwrap());
        }
    });
    expect(None, |topology| {
        for end in ends(topology) {
            end.sysctl("net.ipv4.tcp_timestamps", "0").unwrap();
        }
    });
    // ECN on one of the two connections.
    expect(None, |topology| {
        topology.clients.sysctl("net.ipv4.tcp_ecn", "1").unwrap();
        topology.proxy.sysctl("net.ipv4.tcp_ecn", "2").unwrap();
    });
}

fn ends(topology: &Topology) -> [&NetNs; 2] {
    [&topology.clients, &topology.endpoints[0]]
}

/// Packets of up to 64 KiB are not cut on their way.
#[test]
fn super_packets_pass_whole() {
    if !require::root() {
        return;
    }
    for family in [Family::V4, Family::V6] {
        let topology = Topology::new(1).unwrap();
        let net = Net::start(&topology, Setup::new(Path::Packet, family));
        let mut stream = net.carried();
        let before = ends(&topology).map(received);
        stream.bulk(256 << 20);
        let after = ends(&topology).map(received);
        for (name, (before, after)) in ["client", "endpoint"].iter().zip(before.into_iter().zip(after)) {
            let mean = (after.0 - before.0) / (after.1 - before.1);
            eprintln!("{name}: {mean} bytes per received packet");
            assert!(mean > 1500 * 4, "{mean}");
        }
    }
}

/// The bytes and packets that the host's eth0 has received.
fn received(host: &NetNs) -> (u64, u64) {
    let text = host.run(|| std::fs::read_to_string("/proc/thread-self/net/dev").unwrap()).unwrap();
    let line = text.lines().find_map(|line| line.trim().strip_prefix("eth0:")).unwrap();
    let mut numbers = line.split_whitespace().map(|word| word.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}
