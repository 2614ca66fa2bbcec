//! The network namespace: what this host is called, its interfaces, routes, and tracked
//! connections.

pub mod conntrack;
pub mod host;
pub(crate) mod netlink;
pub mod next_hop;
pub mod node;
mod pool;
pub(crate) mod remembered;
pub mod route;
mod sysctl;

use std::net::SocketAddr;

/// An IPv4 address that stands in an IPv6 address, as a dual-stack socket gives it, is an IPv4
/// address.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        // Unchanged: a link-local address keeps its scope.
        ip if ip == address.ip() => address,
        ip => SocketAddr::new(ip, address.port()),
    }
}

#[cfg(test)]
mod tests {
    use super::canonical;

    #[test]
    fn only_mapped_addresses_are_changed() {
        for (given, wanted) in [
            ("[::ffff:192.0.2.1]:80", "192.0.2.1:80"),
            ("192.0.2.1:80", "192.0.2.1:80"),
            ("[fe80::1%3]:80", "[fe80::1%3]:80"),
        ] {
            assert_eq!(canonical(given.parse().unwrap()), wanted.parse().unwrap(), "{given}");
        }
    }
}
