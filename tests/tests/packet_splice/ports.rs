//! Limited resources: source ports and records.

use std::collections::HashSet;
use std::net::{IpAddr, TcpStream};
use std::time::{Duration, Instant};

use steer_tests::eventually::eventually;
use steer_tests::steer::Steer;

use crate::net::{FRONT_PORT, Family, GONE_WITHIN, Net, Path, Setup, at_once, on};
use crate::stream::{Stream, ask_upgrade, read_head, reset};

/// The proxy's address towards the first endpoint, and a second address that the test adds.
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

/// Two Steers with the same endpoint and the same ports. The second one chooses a port that a
/// stream of the first one has. The endpoint's SYN-ACK then goes to the client of that stream,
/// because the stream has no socket.
#[test]
fn a_port_that_a_stream_of_another_steer_has_is_passed_over() {
    let ports = "source_ports: [20000-20029]";
    on(Setup::new(Path::Packet, Family::V4).with(ports), |net| {
        let mut first: Vec<Stream> = (0..10).map(|_| net.carried()).collect();
        let mut setup = net.setup.clone();
        setup.front.set_port(FRONT_PORT + 1);
        let config = setup.config() + "  connect_timeout: 2s\n";
        let second = Steer::start(&config, Some(&net.topology.proxy), &[]).unwrap();
        let warning = format!("other=\"instance `{}` (process {})\"", net.steer.instance(), net.steer.pid());
        assert!(second.said().unwrap().contains(&warning), "{}", second.said().unwrap());
        let mut streams = Vec::new();
        let mut late = 0;
        for _ in 0..20 {
            let begin = Instant::now();
            let mut stream = net.open_at(setup.front, |_| {});
            let took = begin.elapsed();
            assert!(took < Duration::from_secs(2), "{took:?}");
            late += usize::from(took > Duration::from_millis(400));
            stream.echo();
            streams.push(stream);
        }
        eprintln!("{late} of 20 connections tried a port of the other Steer");
        first.iter_mut().chain(&mut streams).for_each(|stream| stream.bulk(1 << 16));
        // Twenty of thirty ports, or all ports except those of ten streams.
        let leased = second.metric("steer_source_ports", &[("kind", "used")]).unwrap();
        assert!(late > 0 && leased >= 10.0, "{late} were late, {leased} have ports");
        // The endpoint has vanished. All tries together have one time limit.
        net.topology.endpoints[0].ip(&["link", "set", "eth0", "down"]).unwrap();
        let begin = Instant::now();
        let mut client = net.topology.clients.run(|| TcpStream::connect(setup.front).unwrap()).unwrap();
        ask_upgrade(&mut client, setup.front);
        let head = read_head(&mut client);
        let took = begin.elapsed();
        assert!(head.starts_with("HTTP/1.1 50"), "{head}");
        assert!(took < Duration::from_secs(3), "{took:?}");
    });
}

/// The rest of the host never gets a stream's port, even if the ports are part of the host's own
/// range.
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
        // Nobody has accepted these connections, so nobody else would close them.
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
