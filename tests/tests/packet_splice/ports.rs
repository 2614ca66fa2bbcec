//! What there is only so much of: source ports and records.

use std::collections::HashSet;
use std::net::{IpAddr, TcpStream};
use std::time::{Duration, Instant};

use steer_tests::eventually::eventually;

use crate::net::{Family, GONE_WITHIN, Net, Path, Setup, at_once, on};
use crate::stream::{Stream, reset};

/// The proxy's address towards the first endpoint, and a second one that the test gives it.
fn sources(family: Family) -> [IpAddr; 2] {
    let sources = match family {
        Family::V4 => ["10.71.1.1", "10.71.1.3"],
        Family::V6 => ["fd71:0:0:1::1", "fd71:0:0:1::3"],
    };
    sources.map(|address| address.parse().unwrap())
}

fn add_second_source(net: &Net<'_>, family: Family) {
    let [_, second] = sources(family);
    match family {
        Family::V4 => net.topology.proxy.ip(&["address", "add", &format!("{second}/24"), "dev", "endpoint0"]),
        Family::V6 => {
            net.topology.proxy.ip(&["address", "add", &format!("{second}/64"), "dev", "endpoint0", "nodad"])
        }
    }
    .unwrap();
}

#[test]
fn when_the_ports_are_used_up_streams_are_relayed() {
    at_once(Family::BOTH, |family| {
        let mut setup = Setup::new(Path::Packet, family).with("source_ports: [20000-20001]");
        setup.source_addresses = sources(family).to_vec();
        on(setup, |net| {
            add_second_source(net, family);
            let mut streams: Vec<Stream> = (0..4).map(|_| net.carried()).collect();
            let used: HashSet<_> = streams.iter().map(|stream| stream.source).collect();
            assert_eq!(used.len(), 4, "{used:?}");
            let allowed = |ip, port| sources(family).contains(&ip) && [20000, 20001].contains(&port);
            assert!(used.iter().all(|source| allowed(source.ip(), source.port())), "{used:?}");

            let mut fifth = net.open();
            net.expect_relayed(&fifth, "no_source_port");
            fifth.bulk(1 << 20);
            streams.iter_mut().for_each(|stream| stream.bulk(1 << 18));

            drop(streams.pop());
            let used = || net.steer.metric("steer_source_ports", &[("kind", "used")]).unwrap();
            eventually("returned port", GONE_WITHIN, || Ok((used() == 3.0).then_some(()))).unwrap();
            streams.push(net.carried());
            drop((streams, fifth));
            net.expect_nothing_left();
        });
    });
}

/// The rest of the host gets none of the streams' ports, even if they are taken from its own range.
#[test]
fn connections_of_the_host_never_take_a_streams_port() {
    for family in [Family::V4, Family::V6] {
        let topology = steer_tests::topology::Topology::new(1).unwrap();
        topology.proxy.sysctl("net.ipv4.ip_local_port_range", "20000 20031").unwrap();
        let setup = Setup::new(Path::Packet, family).with("source_ports: [20000-20015]");
        let net = Net::start(&topology, setup);
        let mut streams: Vec<_> = (0..8).map(|_| net.carried()).collect();
        let endpoint = net.setup.endpoint;
        let connections: Vec<_> = (0..12)
            .map(|_| {
                let begin = Instant::now();
                let connection = topology.proxy.run(|| TcpStream::connect(endpoint).unwrap()).unwrap();
                assert!(begin.elapsed() < Duration::from_millis(500), "{:?}", begin.elapsed());
                connection
            })
            .collect();
        for connection in &connections {
            let port = connection.local_addr().unwrap().port();
            assert!((20016..=20031).contains(&port), "{port}");
        }
        streams.iter_mut().for_each(|stream| stream.bulk(1 << 18));
        // Nobody has accepted them, so nobody would close them.
        connections.into_iter().for_each(reset);
        drop(streams);
        net.expect_nothing_left();
    }
}

#[test]
fn when_the_records_are_used_up_streams_are_relayed() {
    on(Setup::new(Path::Packet, Family::V4).with("max_streams: 2"), |net| {
        let spliced = [net.carried(), net.carried()];
        let mut third = net.open();
        net.expect_relayed(&third, "map_full");
        third.bulk(1 << 20);
        drop(spliced);
        drop(third);
        net.expect_nothing_left();
        let again = [net.carried(), net.carried()];
        drop(again);
        net.expect_nothing_left();
    });
}
