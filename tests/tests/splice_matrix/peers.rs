//! The kinds of clients and endpoints: how their kernels are set, and at which addresses they are.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Result;
use steer_tests::netns::NetNs;
use steer_tests::topology::{Family, Topology};

pub(crate) const ENDPOINT_PORT: u16 = 3000;
/// The front of the endpoint kind with index `i` listens at this port plus `i`.
pub(crate) const FRONT_PORT: u16 = 8000;
const SMALL_MTU: &str = "1280";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ClientKind {
    Linux,
    NoTimestamps,
    NoSack,
    NoScaling,
    SmallMtu,
    Ipv6,
}

impl ClientKind {
    pub(crate) const ALL: [Self; 6] =
        [Self::Linux, Self::NoTimestamps, Self::NoSack, Self::NoScaling, Self::SmallMtu, Self::Ipv6];

    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Linux => "Linux",
            Self::NoTimestamps => "no timestamps (Windows)",
            Self::NoSack => "no SACK",
            Self::NoScaling => "no window scaling",
            Self::SmallMtu => "MTU 1280",
            Self::Ipv6 => "IPv6",
        }
    }

    pub(crate) const fn family(self) -> Family {
        match self {
            Self::Ipv6 => Family::V6,
            _ => Family::V4,
        }
    }

    /// Makes the clients' host be of this kind, whatever it was before.
    pub(crate) fn apply(self, clients: &NetNs) -> Result<()> {
        clients.sysctl("net.ipv4.tcp_timestamps", if self == Self::NoTimestamps { "0" } else { "1" })?;
        clients.sysctl("net.ipv4.tcp_sack", if self == Self::NoSack { "0" } else { "1" })?;
        clients.sysctl("net.ipv4.tcp_window_scaling", if self == Self::NoScaling { "0" } else { "1" })?;
        let mtu = if self == Self::SmallMtu { SMALL_MTU } else { "1500" };
        clients.ip(&["link", "set", "eth0", "mtu", mtu])
    }
}

/// The kinds up to [`Self::NarrowLink`] have a host of the topology each, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EndpointKind {
    Linux,
    NoTimestamps,
    NoSack,
    NoScaling,
    /// Only the endpoint knows of its small MTU, as behind a router with a tunnel.
    SmallMtu,
    /// The proxy's interface has the small MTU, too.
    NarrowLink,
    /// The endpoint of the kind `Linux`, by an address of the other family than the client's.
    OtherFamily,
    /// On loopback of the proxy's host.
    Loopback,
    /// In a container of the proxy's host: on a bridge, with an address of its own.
    Container,
}

impl EndpointKind {
    pub(crate) const ALL: [Self; 9] = [
        Self::Linux,
        Self::NoTimestamps,
        Self::NoSack,
        Self::NoScaling,
        Self::SmallMtu,
        Self::NarrowLink,
        Self::OtherFamily,
        Self::Loopback,
        Self::Container,
    ];
    /// How many hosts the topology needs.
    pub(crate) const HOSTS: u8 = Self::NarrowLink as u8 + 1;

    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Linux => "Linux",
            Self::NoTimestamps => "no timestamps",
            Self::NoSack => "no SACK",
            Self::NoScaling => "no window scaling",
            Self::SmallMtu => "MTU 1280 behind a router",
            Self::NarrowLink => "MTU 1280 on the link",
            Self::OtherFamily => "other family",
            Self::Loopback => "127.0.0.1, ::1",
            Self::Container => "container",
        }
    }

    /// The port of the front that leads to the endpoint.
    pub(crate) const fn front_port(self) -> u16 {
        FRONT_PORT + self as u16
    }

    /// The endpoint's address for a client of `family`.
    pub(crate) fn address(self, family: Family) -> SocketAddr {
        let family = if self == Self::OtherFamily { family.other() } else { family };
        let index = self.host().unwrap_or_default();
        let ip = match (self, family) {
            (Self::Loopback, Family::V4) => IpAddr::from(Ipv4Addr::LOCALHOST),
            (Self::Loopback, Family::V6) => Ipv6Addr::LOCALHOST.into(),
            (Self::Container, Family::V4) => CONTAINER.into(),
            (Self::Container, Family::V6) => CONTAINER6.into(),
            (_, Family::V4) => Topology::endpoint(index).into(),
            (_, Family::V6) => Topology::endpoint6(index).into(),
        };
        SocketAddr::new(ip, ENDPOINT_PORT)
    }

    /// The index of the endpoint's own host in the topology.
    fn host(self) -> Option<u8> {
        let index = self as u8;
        (index < Self::HOSTS).then_some(index)
    }

    /// Sets the kernel of the endpoint's host, and the proxy's end of the link.
    pub(crate) fn apply(self, topology: &Topology) -> Result<()> {
        let Some(index) = self.host() else { return Ok(()) };
        let host = &topology.endpoints[usize::from(index)];
        match self {
            Self::NoTimestamps => host.sysctl("net.ipv4.tcp_timestamps", "0"),
            Self::NoSack => host.sysctl("net.ipv4.tcp_sack", "0"),
            Self::NoScaling => host.sysctl("net.ipv4.tcp_window_scaling", "0"),
            Self::SmallMtu => host.ip(&["link", "set", "eth0", "mtu", SMALL_MTU]),
            Self::NarrowLink => {
                host.ip(&["link", "set", "eth0", "mtu", SMALL_MTU])?;
                topology.proxy.ip(&["link", "set", &format!("endpoint{index}"), "mtu", SMALL_MTU])
            }
            _ => Ok(()),
        }
    }
}

const CONTAINER: Ipv4Addr = Ipv4Addr::new(10, 72, 0, 2);
const CONTAINER6: Ipv6Addr = Ipv6Addr::new(0xfd72, 0, 0, 0, 0, 0, 0, 2);

/// Makes a host on a bridge of the proxy's host, as container runtimes do.
pub(crate) fn container(proxy: &NetNs) -> Result<NetNs> {
    let container = NetNs::new("steer-t", "container")?;
    proxy.ip(&["link", "add", "bridge0", "type", "bridge"])?;
    proxy.ip(&["link", "add", "port0", "type", "veth", "peer", "name", "eth0", "netns", container.name()])?;
    proxy.ip(&["link", "set", "port0", "master", "bridge0"])?;
    proxy.ip(&["link", "set", "port0", "up"])?;
    for (host, device, number) in [(proxy, "bridge0", 1), (&container, "eth0", 2)] {
        host.ip(&["address", "add", &format!("10.72.0.{number}/24"), "dev", device])?;
        host.ip(&["address", "add", &format!("fd72::{number}/64"), "dev", device, "nodad"])?;
        host.ip(&["link", "set", device, "up"])?;
    }
    Ok(container)
}

/// The cases that are tried on each kind of host, with their names in the table.
pub(crate) const HOST_CASES: [(&str, (ClientKind, EndpointKind)); 5] = [
    ("IPv4", (ClientKind::Linux, EndpointKind::Linux)),
    ("client without timestamps", (ClientKind::NoTimestamps, EndpointKind::Linux)),
    ("IPv6", (ClientKind::Ipv6, EndpointKind::Linux)),
    ("endpoint on 127.0.0.1", (ClientKind::Linux, EndpointKind::Loopback)),
    ("endpoint in a container", (ClientKind::Linux, EndpointKind::Container)),
];
