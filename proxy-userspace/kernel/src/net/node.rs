//! What this host calls itself and its interfaces.

use std::net::{IpAddr, Ipv4Addr};

use nix::ifaddrs::getifaddrs;
use nix::sys::socket::SockaddrStorage;

/// The first IPv4 address of an interface, in the kernel's order, that is not loopback; else the
/// first such IPv6 address; else 127.0.0.1. Asks the kernel, so call it once.
pub fn node_address() -> IpAddr {
    match getifaddrs() {
        Ok(interfaces) => first_address(interfaces.filter_map(|interface| interface.address).filter_map(ip)),
        Err(error) => {
            tracing::warn!(%error, "cannot list this host's addresses");
            None
        }
    }
    .unwrap_or(Ipv4Addr::LOCALHOST.into())
}

/// The index of the interface with this name, if there is one.
pub fn interface_index(name: &str) -> Option<u32> {
    nix::net::if_::if_nametoindex(name).ok()
}

fn ip(address: SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| v4.ip().into());
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| v6.ip().into()))
}

fn first_address(addresses: impl Iterator<Item = IpAddr>) -> Option<IpAddr> {
    let mut first_v6 = None;
    for address in addresses.filter(|address| !address.is_loopback()) {
        if address.is_ipv4() {
            return Some(address);
        }
        first_v6 = first_v6.or(Some(address));
    }
    first_v6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv4_comes_before_ipv6_and_loopback_never() {
        let first = |list: &[&str]| {
            first_address(list.iter().map(|text| text.parse().unwrap())).map(|ip| ip.to_string())
        };
        assert_eq!(
            first(&["127.0.0.1", "::1", "2001:db8::1", "192.0.2.2", "192.0.2.3"]).unwrap(),
            "192.0.2.2"
        );
        assert_eq!(first(&["127.0.0.1", "::1", "2001:db8::1", "2001:db8::2"]).unwrap(), "2001:db8::1");
        assert_eq!(first(&["127.0.0.1", "::1"]), None);
    }

    #[test]
    fn interfaces_have_an_index() {
        assert!(interface_index("lo").is_some_and(|index| index > 0));
        assert_eq!(interface_index("no-such-if"), None);
    }

    #[test]
    fn this_host_has_an_address() {
        let node = node_address();
        assert!(!node.is_unspecified());
        assert!(!node.is_loopback() || node == Ipv4Addr::LOCALHOST);
    }
}
