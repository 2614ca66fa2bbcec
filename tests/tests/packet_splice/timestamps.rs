//! Whether a stream is spliced if one of its peers has no TCP timestamps.

use std::io;

use steer_tests::require;
use steer_tests::topology::Topology;

use crate::net::{ENDPOINT_PORT, Family, Net, Path, Setup, at_once};

const BULK: usize = 4 << 20;
const STREAMS: u64 = 3;

/// The network of a client without timestamps, changed by `prepare`.
fn network(prepare: impl FnOnce(&Topology)) -> Topology {
    let topology = Topology::new(1).unwrap();
    topology.clients.sysctl("net.ipv4.tcp_timestamps", "0").unwrap();
    prepare(&topology);
    topology
}

/// Streams are spliced, and carry bulk in both directions.
fn expect_spliced(topology: &Topology, setup: Setup) {
    let net = Net::start(topology, setup);
    for _ in 0..STREAMS {
        let mut stream = net.open();
        net.expect_path(&stream, Path::Packet);
        stream.bulk(BULK);
    }
    assert_eq!(net.packets("syn_plain"), STREAMS);
    net.expect_nothing_left();
}

/// Streams are relayed, and no SYN is changed.
fn expect_relayed(topology: &Topology, setup: Setup) {
    let net = Net::start(topology, setup);
    let mut stream = net.open();
    net.expect_relayed(&stream, "timestamps_differ");
    stream.bulk(BULK);
    assert_eq!(net.packets("syn_plain"), 0);
    drop(stream);
    net.expect_nothing_left();
}

#[test]
fn a_client_without_timestamps_is_spliced() {
    if !require::root() {
        return;
    }
    at_once(Family::BOTH, |family| expect_spliced(&network(|_| ()), Setup::new(Path::Packet, family)));
}

#[test]
fn a_client_without_timestamps_is_spliced_to_an_endpoint_on_loopback() {
    if !require::root() {
        return;
    }
    let setup = Setup::new(Path::Packet, Family::V4);
    expect_spliced(&network(|_| ()), Setup { endpoint: ([127, 0, 0, 1], ENDPOINT_PORT).into(), ..setup });
}

/// Without timestamps, a cookie has no room for window scale and SACK.
#[test]
fn a_client_without_timestamps_is_spliced_to_an_endpoint_that_sends_syn_cookies() {
    if !require::root() {
        return;
    }
    at_once(Family::BOTH, |family| {
        let always = |topology: &Topology| {
            topology.endpoints[0].sysctl("net.ipv4.tcp_syncookies", "2").unwrap();
        };
        expect_spliced(&network(always), Setup::new(Path::Packet, family));
    });
}

/// The kernel then computes the checksum of the SYN after the program. Usually veth delivers the
/// packet without one.
#[test]
fn a_changed_syn_has_a_right_checksum_if_the_kernel_computes_it() {
    if !require::root() {
        return;
    }
    at_once(Family::BOTH, |family| {
        let no_offload = |topology: &Topology| {
            topology.proxy.run(|| without_checksum_offload("endpoint0")).unwrap().unwrap();
        };
        expect_spliced(&network(no_offload), Setup::new(Path::Packet, family));
    });
}

#[test]
fn a_client_without_timestamps_is_relayed_if_the_configuration_says_so() {
    if !require::root() {
        return;
    }
    at_once(Family::BOTH, |family| {
        let setup = Setup::new(Path::Packet, family).with("agree_at_handshake: false");
        expect_relayed(&network(|_| ()), setup);
    });
}

/// The network of an endpoint without timestamps, changed by `prepare`.
fn network_of_plain_endpoint(prepare: impl FnOnce(&Topology)) -> Topology {
    let topology = Topology::new(1).unwrap();
    topology.endpoints[0].sysctl("net.ipv4.tcp_timestamps", "0").unwrap();
    prepare(&topology);
    topology
}

/// The first stream shows that the endpoint has no timestamps. From then on clients get none.
fn expect_learned(net: &Net<'_>) {
    let mut first = net.open();
    net.expect_relayed(&first, "timestamps_differ");
    for _ in 0..STREAMS {
        let mut stream = net.open();
        net.expect_path(&stream, Path::Packet);
        stream.bulk(BULK);
    }
    first.bulk(BULK);
    assert_eq!(net.packets("syn_plain_in"), STREAMS);
    // The endpoint gets the offer, and shows each time that it has no timestamps.
    assert_eq!(net.packets("syn_plain"), 0);
}

fn learns(topology: &Topology, setup: Setup) {
    let net = Net::start(topology, setup);
    expect_learned(&net);
    net.expect_nothing_left();
}

#[test]
fn the_second_stream_to_an_endpoint_without_timestamps_is_spliced() {
    if !require::root() {
        return;
    }
    at_once(Family::BOTH, |family| {
        learns(&network_of_plain_endpoint(|_| ()), Setup::new(Path::Packet, family));
    });
}

/// The kernel of the client then computes the checksum before the program sees the SYN.
#[test]
fn a_client_whose_checksums_are_computed_loses_its_timestamps_too() {
    if !require::root() {
        return;
    }
    at_once(Family::BOTH, |family| {
        let no_offload = |topology: &Topology| {
            topology.clients.run(|| without_checksum_offload("eth0")).unwrap().unwrap();
        };
        learns(&network_of_plain_endpoint(no_offload), Setup::new(Path::Packet, family));
    });
}

/// Without timestamps, a cookie has no room for window scale and SACK.
#[test]
fn a_listener_that_sends_syn_cookies_learns_of_endpoints_without_timestamps() {
    if !require::root() {
        return;
    }
    at_once(Family::BOTH, |family| {
        let always = |topology: &Topology| topology.proxy.sysctl("net.ipv4.tcp_syncookies", "2").unwrap();
        learns(&network_of_plain_endpoint(always), Setup::new(Path::Packet, family));
    });
}

#[test]
fn a_client_of_this_host_loses_its_timestamps_too() {
    if !require::root() {
        return;
    }
    let topology = network_of_plain_endpoint(|_| ());
    let net = Net::start(&topology, Setup::new(Path::Packet, Family::V4)).with_clients_beside_the_proxy();
    expect_learned(&net);
    net.expect_nothing_left();
}

#[test]
fn an_endpoint_that_has_timestamps_again_costs_one_stream() {
    if !require::root() {
        return;
    }
    at_once(Family::BOTH, |family| {
        let topology = network_of_plain_endpoint(|_| ());
        let net = Net::start(&topology, Setup::new(Path::Packet, family));
        expect_learned(&net);
        topology.endpoints[0].sysctl("net.ipv4.tcp_timestamps", "1").unwrap();
        // This client has lost its timestamps, and the endpoint accepts the offer.
        net.expect_relayed(&net.open(), "timestamps_differ");
        for number in 1..=STREAMS {
            let mut stream = net.open();
            net.expect_path(&stream, Path::Packet);
            stream.bulk(BULK);
            assert_eq!(net.packets("syn_plain"), number);
        }
        net.expect_nothing_left();
    });
}

#[test]
fn an_endpoint_without_timestamps_is_relayed_if_the_configuration_says_so() {
    if !require::root() {
        return;
    }
    at_once(Family::BOTH, |family| {
        let topology = network_of_plain_endpoint(|_| ());
        let net = Net::start(&topology, Setup::new(Path::Packet, family).with("agree_at_handshake: false"));
        for _ in 0..STREAMS {
            let mut stream = net.open();
            net.expect_relayed(&stream, "timestamps_differ");
            stream.bulk(BULK);
        }
        assert_eq!(net.packets("syn_plain_in"), 0);
        net.expect_nothing_left();
    });
}

/// Makes the kernel compute the checksums of what leaves by `device` of this namespace.
fn without_checksum_offload(device: &str) -> io::Result<()> {
    /// linux/ethtool.h
    const ETHTOOL_STXCSUM: u32 = 0x17;
    const SIOCETHTOOL: libc::Ioctl = 0x8946;
    let socket = std::net::UdpSocket::bind(("127.0.0.1", 0))?;
    let mut off = [ETHTOOL_STXCSUM, 0];
    // SAFETY: all bits zero are a valid `ifreq`, which consists of integers and pointers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = off.as_mut_ptr().cast();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&socket);
    // SAFETY: the request is valid, and its data is as long as a `struct ethtool_value`.
    let result = unsafe { libc::ioctl(fd, SIOCETHTOOL, &raw mut request) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
