//! A path that becomes narrower at a router. The router's ICMP errors arrive at the proxy, but are
//! for the peer that sends too large packets.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd as _;

use steer_tests::netns::NetNs;
use steer_tests::require;
use steer_tests::topology::Topology;

use crate::net::{Family, Net, Path, Setup};
use crate::stream::{HANG, Learned, learned};

/// The largest packets that the routers send on to the far hosts. All links carry 1500.
const NARROW: u32 = 1300;
const BULK: usize = 8 << 20;

/// A far host behind one of the hosts next to the proxy, which becomes a router with a narrow route
/// to the far host.
pub(crate) struct FarHost {
    pub(crate) netns: NetNs,
    address: IpAddr,
}

impl FarHost {
    /// `link` numbers the networks. `next_hop` is the router's address on the proxy's side.
    pub(crate) fn behind(router: &NetNs, proxy: &NetNs, next_hop: IpAddr, link: u8) -> Self {
        let netns = NetNs::new("steer-t", &format!("far{link}")).unwrap();
        let ([network, near, address], bits) = match next_hop {
            IpAddr::V4(_) => ([0, 1, 2].map(|host| v4(link, host)), 24),
            IpAddr::V6(_) => ([0, 1, 2].map(|host| v6(link, host)), 64),
        };
        let ip = |netns: &NetNs, line: &str| netns.ip(&line.split(' ').collect::<Vec<_>>()).unwrap();
        ip(router, &format!("link add far type veth peer name eth0 netns {}", netns.name()));
        let nodad = if address.is_ipv6() { " nodad" } else { "" };
        ip(router, &format!("address add {near}/{bits} dev far noprefixroute{nodad}"));
        ip(&netns, &format!("address add {address}/{bits} dev eth0{nodad}"));
        ip(router, "link set far up");
        ip(&netns, "link set eth0 up");
        router.sysctl("net.ipv4.ip_forward", "1").unwrap();
        router.sysctl("net.ipv6.conf.all.forwarding", "1").unwrap();
        // Routers obey the MTU of a route only if it is locked.
        ip(router, &format!("route add {network}/{bits} dev far mtu lock {NARROW}"));
        ip(&netns, &format!("route add default via {near}"));
        ip(proxy, &format!("route add {network}/{bits} via {next_hop}"));
        Self { netns, address }
    }
}

fn v4(link: u8, host: u8) -> IpAddr {
    Ipv4Addr::new(10, 72, link, host).into()
}

fn v6(link: u8, host: u8) -> IpAddr {
    Ipv6Addr::new(0xfd72, 0, 0, link.into(), 0, 0, 0, host.into()).into()
}

/// The path MTU that the kernel knows for a socket.
fn path_mtu(socket: &TcpStream) -> u32 {
    let (level, name) = if socket.local_addr().unwrap().is_ipv4() {
        (libc::IPPROTO_IP, libc::IP_MTU)
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU)
    };
    let (mut mtu, mut length) = (0u32, 4);
    // SAFETY: `mtu` has room for `length` bytes, and the socket is open.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut mtu).cast(), &mut length) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    mtu
}

#[test]
fn both_peers_learn_that_the_path_behind_the_proxy_is_narrow() {
    if !require::root() {
        return;
    }
    let families = Family::BOTH.into_iter().flat_map(|client| Family::BOTH.map(|other| (client, other)));
    for (client_family, endpoint_family) in families {
        let topology = Topology::new(1).unwrap();
        let client_router = match client_family {
            Family::V4 => IpAddr::from(Topology::CLIENTS),
            Family::V6 => Topology::CLIENTS6.into(),
        };
        let endpoint_router = match endpoint_family {
            Family::V4 => IpAddr::from(Topology::endpoint(0)),
            Family::V6 => Topology::endpoint6(0).into(),
        };
        let client = FarHost::behind(&topology.clients, &topology.proxy, client_router, 1);
        let endpoint = FarHost::behind(&topology.endpoints[0], &topology.proxy, endpoint_router, 2);
        let mut setup = Setup::of_families(Path::Packet, client_family, endpoint_family);
        setup.endpoint = SocketAddr::new(endpoint.address, setup.endpoint.port());
        let net = Net::between(&topology, setup, &client.netns, &endpoint.netns);
        let mut stream = net.carried();
        assert_eq!(stream.client_address.ip(), client.address);
        assert_eq!([path_mtu(&stream.client), path_mtu(&stream.backend)], [1500; 2]);

        stream.bulk(BULK);
        // A packet of IPv6 has 20 bytes more than the same packet of IPv4.
        let expected = match (client_family, endpoint_family) {
            (Family::V4, Family::V6) => [NARROW - 20, NARROW + 20],
            (Family::V6, Family::V4) => [NARROW + 20, NARROW - 20],
            _ => [NARROW; 2],
        };
        assert_eq!([path_mtu(&stream.client), path_mtu(&stream.backend)], expected);
        assert!(net.packets("icmp_translated") >= 2);
        assert_eq!(net.packets("icmp_passed"), 0);
        net.expect_path(&stream, Path::Packet);

        drop(stream.client);
        assert_eq!(learned(&mut stream.backend, HANG), Learned::Fin);
    }
}
