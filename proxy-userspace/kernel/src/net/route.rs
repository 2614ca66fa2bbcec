//! Where the kernel would send a packet (RTM_GETROUTE).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use proxy_common::reason::Reason;

use super::host::{self, Interface};
use super::netlink::Netlink;
use super::pool::Pool;
use super::remembered::Remembered;

/// The first hop of the way to a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hop {
    /// The interface that packets leave by: loopback if the destination is local.
    pub ifindex: u32,
    /// The destination is an address of this host.
    pub local: bool,
    /// The MTU that the route or an ICMP error tells, in bytes. If there is none, the interface's
    /// MTU counts.
    pub mtu: Option<u32>,
    /// The address that the kernel would choose as source, or the one that was asked for.
    pub source: IpAddr,
}

#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    #[error("there is no route to {destination}")]
    NoRoute {
        destination: IpAddr,
        #[source]
        source: Option<io::Error>,
    },
    /// Such an address is complete only with an interface, which the bytes of the address do not
    /// name.
    #[error("{destination} is a link-local address")]
    LinkLocal { destination: IpAddr },
    #[error("cannot ask the kernel for a route")]
    Unknown(#[source] io::Error),
    #[error("cannot ask the kernel for the interface of a route")]
    Interface(#[source] io::Error),
}

impl RouteError {
    /// The reason of streams that are relayed because of it.
    pub fn reason(&self) -> Reason {
        match self {
            Self::NoRoute { .. } | Self::LinkLocal { .. } | Self::Unknown(_) => Reason::NoRoute,
            Self::Interface(_) => Reason::Interface,
        }
    }
}

/// Asks the routing tables of the network namespace in which it was made. Answers take a few
/// microseconds and never wait for the network. Threads that ask at the same time have sockets of
/// their own; all of these threads must be in that namespace.
#[derive(Debug)]
pub struct Routes(Pool<Netlink<RouteNetlinkMessage>>);

impl Routes {
    /// # Errors
    /// The process may not have another descriptor.
    pub fn new() -> io::Result<Self> {
        Netlink::route().map(|netlink| Self(Pool::of(netlink)))
    }

    /// The way from `source`, an address of this host or the unspecified one, to `destination`.
    /// IPv4-mapped addresses count as IPv4. Marks and incoming interfaces of policy routing are not
    /// taken into account.
    ///
    /// # Errors
    /// There is no route to a single host, or none that could be told without an interface; or the
    /// kernel did not answer.
    pub fn lookup(&self, source: IpAddr, destination: IpAddr) -> Result<Hop, RouteError> {
        let (source, destination) = (source.to_canonical(), destination.to_canonical());
        if matches!(destination, IpAddr::V6(address) if address.is_unicast_link_local()) {
            return Err(RouteError::LinkLocal { destination });
        }
        let request = RouteNetlinkMessage::GetRoute(request(source, destination));
        match self.with_netlink(|netlink| netlink.ask(request)) {
            Ok(RouteNetlinkMessage::NewRoute(route)) => {
                hop(&route, source).ok_or(RouteError::NoRoute { destination, source: None })
            }
            Ok(_) => Err(RouteError::Unknown(io::ErrorKind::InvalidData.into())),
            Err(error) => Err(match error.raw_os_error() {
                // The last three are the kernel's answers for the types of routes that refuse.
                Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES | libc::EINVAL) => {
                    RouteError::NoRoute { destination, source: Some(error) }
                }
                _ => RouteError::Unknown(error),
            }),
        }
    }

    /// Like [`host::interface`], but uses the open socket. For the interfaces of hops.
    ///
    /// # Errors
    /// `ENODEV` if there is no such interface.
    pub fn interface(&self, ifindex: u32) -> io::Result<Interface> {
        self.with_netlink(|netlink| host::ask_interface(netlink, ifindex))
    }

    fn with_netlink<R>(
        &self,
        ask: impl FnOnce(&mut Netlink<RouteNetlinkMessage>) -> io::Result<R>,
    ) -> io::Result<R> {
        self.0.with(Netlink::route, ask)?
    }
}

/// The addresses that the kernel would connect from, as long as nothing has changed in the network
/// namespace in which it was made.
#[derive(Debug)]
pub struct Sources(Remembered<IpAddr, IpAddr>);

impl Default for Sources {
    fn default() -> Self {
        Self::new()
    }
}

impl Sources {
    /// Never fails. Without a descriptor, [`towards`](Self::towards) asks the kernel each time.
    pub fn new() -> Self {
        Self(Remembered::new())
    }

    /// The address that the kernel would connect from. Answers are remembered.
    ///
    /// # Errors
    /// There is no route.
    pub fn towards(&self, destination: IpAddr) -> io::Result<IpAddr> {
        self.0.with(|known| known.get(destination, |destination| source_towards(*destination)))
    }
}

/// Sends nothing.
fn source_towards(destination: IpAddr) -> io::Result<IpAddr> {
    const ANY_PORT: u16 = 9;
    let unspecified: IpAddr = match destination {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((unspecified, 0))?;
    socket.connect((destination, ANY_PORT))?;
    Ok(socket.local_addr()?.ip())
}

fn request(source: IpAddr, destination: IpAddr) -> RouteMessage {
    let (address_family, bits) = match destination {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    let mut message = RouteMessage::default();
    message.header =
        RouteHeader { address_family, destination_prefix_length: bits, ..RouteHeader::default() };
    message.attributes.push(RouteAttribute::Destination(destination.into()));
    if !source.is_unspecified() {
        message.header.source_prefix_length = bits;
        message.attributes.push(RouteAttribute::Source(source.into()));
    }
    message
}

/// The needed parts of an answer. `None` if the answer is not a way to a single host.
fn hop(route: &RouteMessage, asked: IpAddr) -> Option<Hop> {
    let local = match route.header.kind {
        RouteType::Local => true,
        RouteType::Unicast => false,
        _ => return None,
    };
    let (mut ifindex, mut mtu, mut preferred) = (None, None, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => ifindex = Some(*index),
            RouteAttribute::PrefSource(RouteAddress::Inet(address)) => preferred = Some(IpAddr::V4(*address)),
            RouteAttribute::PrefSource(RouteAddress::Inet6(address)) => {
                preferred = Some(IpAddr::V6(*address))
            }
            RouteAttribute::Metrics(metrics) => mtu = metrics.iter().find_map(mtu_of),
            _ => {}
        }
    }
    // For IPv6 the kernel tells its preferred source even if the request named another one.
    let source = preferred.filter(|_| asked.is_unspecified()).unwrap_or(asked);
    Some(Hop { ifindex: ifindex?, local, mtu, source })
}

fn mtu_of(metric: &RouteMetric) -> Option<u32> {
    match metric {
        RouteMetric::Mtu(mtu) => Some(*mtu).filter(|mtu| *mtu > 0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::host::LOOPBACK_IFINDEX;

    #[test]
    fn loopback_is_local() {
        let routes = Routes::new().unwrap();
        let localhost = IpAddr::V4(Ipv4Addr::LOCALHOST);
        for source in [localhost, IpAddr::V4(Ipv4Addr::UNSPECIFIED)] {
            let hop = routes.lookup(source, localhost).unwrap();
            assert_eq!((hop.ifindex, hop.local, hop.source), (LOOPBACK_IFINDEX, true, localhost));
        }
        let mapped = Ipv4Addr::new(127, 0, 0, 7).to_ipv6_mapped().into();
        assert!(routes.lookup(localhost, mapped).unwrap().local);
    }

    #[test]
    fn sources_are_told_again() {
        let sources = Sources::new();
        let localhost = IpAddr::V4(Ipv4Addr::LOCALHOST);
        for _ in 0..2 {
            assert_eq!(sources.towards(localhost).unwrap(), localhost);
            assert_eq!(sources.towards(Ipv4Addr::new(127, 0, 0, 7).into()).unwrap(), localhost);
        }
    }

    #[test]
    fn what_is_no_host_is_refused_and_the_next_answer_is_right() {
        let routes = Routes::new().unwrap();
        let unspecified = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let multicast = routes.lookup(unspecified, Ipv4Addr::new(224, 0, 0, 1).into());
        assert!(matches!(multicast, Err(RouteError::NoRoute { .. })), "{multicast:?}");
        // No address of this host.
        let foreign = routes.lookup(Ipv4Addr::new(192, 0, 2, 1).into(), Ipv4Addr::LOCALHOST.into());
        assert!(matches!(foreign, Err(RouteError::NoRoute { .. })), "{foreign:?}");
        let link_local = routes.lookup(Ipv6Addr::UNSPECIFIED.into(), "fe80::1".parse().unwrap());
        assert!(matches!(link_local, Err(RouteError::LinkLocal { .. })), "{link_local:?}");
        assert!(routes.lookup(unspecified, Ipv4Addr::LOCALHOST.into()).unwrap().local);
    }
}
