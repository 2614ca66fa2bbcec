//! Ordinary hosts whose packets are not plain: the stream goes on. Hosts whose packets cannot be
//! spliced: both peers learn of the end at once, and the next stream is relayed.

use std::io::Write as _;
use std::net::{IpAddr, TcpStream};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use socket2::SockRef;
use steer_tests::netns::NetNs;
use steer_tests::require;
use steer_tests::topology::Topology;

use crate::bridge::OddHost;
use crate::net::{Family, Net, Path, Setup, at_once, on};
use crate::path_mtu::FarHost;
use crate::shapes::Shape;
use crate::stream::{HANG, Learned, Stream, learned};

/// How soon a stream that cannot go on must end.
const VISIBLE_WITHIN: Duration = Duration::from_secs(2);
const BULK: usize = 2 << 20;

fn ip(netns: &NetNs, line: &str) {
    netns.ip(&line.split(' ').collect::<Vec<_>>()).unwrap();
}

/// Everything that the socket sends from now on carries these options (IPv4) or this destination
/// options header (IPv6).
fn set_ip_options(socket: &TcpStream) {
    let (level, name, bytes): (_, _, &[u8]) = if socket.local_addr().unwrap().is_ipv4() {
        (libc::IPPROTO_IP, libc::IP_OPTIONS, &[1, 1, 1, 0])
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_DSTOPTS, &[0, 0, 1, 4, 0, 0, 0, 0])
    };
    // SAFETY: `bytes` has the given length, and the socket is open.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            bytes.as_ptr().cast(),
            bytes.len() as libc::socklen_t,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Runs a scenario with both families, each in its own network.
fn on_both_families(scenario: impl Fn(&mut Net<'_>) + Sync) {
    at_once(Family::BOTH, |family| on(Setup::new(Path::Packet, family), &scenario));
}

fn goes_on(net: &Net<'_>, stream: &mut Stream) {
    for _ in 0..20 {
        stream.echo();
    }
    stream.bulk(BULK);
    net.expect_path(stream, Path::Packet);
    assert_eq!(net.packets("given_up"), 0);
}

/// Checks that both peers of a stream learn at once that the stream cannot go on, that nothing of
/// the stream is left, and that the next stream is relayed without trouble. The packet that cannot
/// be spliced was sent at `begin`.
fn is_given_up(net: &Net<'_>, mut stream: Stream, begin: Instant) {
    assert_eq!(learned(&mut stream.client, HANG), Learned::Reset);
    assert_eq!(learned(&mut stream.backend, HANG), Learned::Reset);
    let took = begin.elapsed();
    eprintln!("given up after {took:?}");
    assert!(took < VISIBLE_WITHIN, "{took:?}");
    assert_eq!((net.packets("given_up"), net.ended("not_carried")), (1, 1));
    net.expect_nothing_left();
    let mut next = net.open();
    net.expect_relayed(&next, "not_carried");
    next.echo();
    next.bulk(BULK);
}

#[test]
fn options_and_extension_headers_do_not_stop_a_stream() {
    on_both_families(|net| {
        let mut stream = net.carried();
        set_ip_options(&stream.client);
        goes_on(net, &mut stream);
        let client_only = net.packets("made_plain");
        assert!(client_only > 20, "{client_only}");
        if net.setup.front.is_ipv4() {
            // Not over IPv6. There Linux does not make the segments of an existing connection
            // smaller for a new header.
            set_ip_options(&stream.backend);
            goes_on(net, &mut stream);
            assert!(net.packets("made_plain") > client_only + 20);
        }
        drop(stream.client);
        assert_eq!(learned(&mut stream.backend, HANG), Learned::Fin);
    });
}

#[test]
fn options_from_the_first_packet_on_do_not_hinder_the_hand_over() {
    on_both_families(|net| {
        for _ in 0..10 {
            let mut stream = net.open();
            set_ip_options(&stream.client);
            stream.echo();
            net.expect_path(&stream, Path::Packet);
            goes_on(net, &mut stream);
        }
    });
}

/// A client that lets routers fragment its packets, behind a router that fragments. Its endpoint is
/// next to the proxy, or on the proxy's own host.
fn with_a_fragmented_client(endpoint: Option<IpAddr>, scenario: impl Fn(&Net<'_>)) {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let router = &topology.clients;
    let client = FarHost::behind(router, &topology.proxy, Topology::CLIENTS.into(), 1);
    client.netns.sysctl("net.ipv4.ip_no_pmtu_disc", "1").unwrap();
    ip(router, &format!("route add {}/32 dev eth0 mtu lock 1000", Topology::PROXY));
    let mut setup = Setup::new(Path::Packet, Family::V4);
    let mut host = &topology.endpoints[0];
    if let Some(own) = endpoint {
        setup.endpoint.set_ip(own);
        host = &topology.proxy;
    }
    scenario(&Net::between(&topology, setup, &client.netns, host));
}

#[test]
fn fragments_do_not_stop_a_stream() {
    with_a_fragmented_client(None, |net| {
        let mut stream = net.carried();
        goes_on(net, &mut stream);
        let fragments = net.packets("fragment");
        assert!(fragments > 1000, "{fragments}");
        // Sends this in one packet with the FIN.
        SockRef::from(&stream.client).send_with_flags(&[7; 1300], libc::MSG_MORE).unwrap();
        drop(stream.client);
        assert_eq!(learned(&mut stream.backend, HANG), Learned::Fin);
        drop(stream.backend);
        net.expect_nothing_left();
        assert_eq!((net.ended("finished"), net.packets("bad_checksum")), (1, 0));
    });
}

/// A whole packet from one loopback address to another arrives, because its socket is known.
/// Fragments do not.
#[test]
fn fragments_for_an_endpoint_on_loopback_give_the_stream_up() {
    with_a_fragmented_client(Some([127, 0, 0, 1].into()), |net| {
        let mut stream = net.carried();
        let begin = Instant::now();
        stream.client.write_all(&[7; 1300]).unwrap();
        is_given_up(net, stream, begin);
    });
}

/// An asymmetric route: the client's packets arrive on an interface on which no packets leave for
/// the client. Only the local stack sees them.
#[test]
fn a_stream_whose_packets_come_another_way_is_given_up() {
    on_both_families(|net| {
        let (clients, proxy) = (&net.topology.clients, &net.topology.proxy);
        let mut stream = net.carried();
        const MAC: &str = "02:00:00:00:00:02";
        let pair = format!("link add other type veth peer name other address {MAC} netns {}", proxy.name());
        ip(clients, &pair);
        ip(proxy, "link set other up");
        ip(clients, "link set other up");
        for setting in ["all", "other"] {
            proxy.sysctl(&format!("net.ipv4.conf.{setting}.rp_filter"), "0").unwrap();
        }
        let front = net.setup.front.ip();
        ip(clients, &format!("neighbour replace {front} lladdr {MAC} dev other"));
        let bits = if front.is_ipv4() { 32 } else { 128 };
        ip(clients, &format!("route replace {front}/{bits} dev other"));
        let begin = Instant::now();
        stream.client.write_all(b"x").unwrap();
        is_given_up(net, stream, begin);
    });
}

/// The seed is `STEER_SHAPES_SEED` (hex), to repeat a run.
fn seed() -> u64 {
    let seed = match std::env::var("STEER_SHAPES_SEED") {
        Ok(seed) => u64::from_str_radix(&seed, 16).unwrap(),
        Err(_) => rand::random(),
    };
    eprintln!("STEER_SHAPES_SEED={seed:x}");
    seed
}

/// Runs a scenario with a client whose packets can be given other shapes.
fn with_an_odd_client(family: Family, scenario: impl Fn(&Net<'_>, &OddHost)) {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let client = OddHost::beside(&topology.proxy, seed());
    let mut setup = Setup::new(Path::Packet, family);
    setup.front.set_ip(OddHost::front(family == Family::V4));
    let net = Net::between(&topology, setup, &client.netns, &topology.endpoints[0]);
    scenario(&net, &client);
}

#[test]
fn no_legal_shape_stops_a_stream() {
    const STREAMS: usize = 6;
    at_once(Family::BOTH, |family| {
        with_an_odd_client(family, |net, client| {
            let before = [net.open(), net.open()];
            client.send(Shape::Any);
            // Some streams are opened now, so that the shapes also come during their hand-over.
            let mut streams: Vec<_> = before.into_iter().chain((0..STREAMS).map(|_| net.open())).collect();
            for stream in &mut streams {
                stream.echo();
                net.expect_path(stream, Path::Packet);
            }
            for stream in &mut streams {
                goes_on(net, stream);
            }
            let [plain, fragments] = ["made_plain", "fragment"].map(|what| net.packets(what));
            eprintln!(
                "{family:?}: {} of another shape, {plain} made plain, {fragments} pieces",
                client.bent()
            );
            assert!(plain > 1000 && fragments > 1000, "{plain} {fragments}");
            for stream in streams {
                let mut backend = stream.backend;
                drop(stream.client);
                assert_eq!(learned(&mut backend, HANG), Learned::Fin);
            }
            net.expect_nothing_left();
        });
    });
}

#[test]
fn a_stream_of_a_shape_that_cannot_be_spliced_is_given_up() {
    let cases = [
        (Family::V4, Shape::TinyPieces),
        (Family::V4, Shape::Backwards),
        (Family::V6, Shape::Backwards),
        (Family::V6, Shape::ManyHeaders),
        (Family::V6, Shape::HeaderInPieces),
    ];
    at_once(cases, |(family, shape)| {
        with_an_odd_client(family, |net, client| {
            let mut stream = net.carried();
            client.send(shape);
            let begin = Instant::now();
            stream.client.write_all(&[7; 5000]).unwrap();
            eprintln!("{family:?} {shape:?}");
            is_given_up(net, stream, begin);
        });
    });
}
