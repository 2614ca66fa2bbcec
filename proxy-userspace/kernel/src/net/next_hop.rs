//! The next hop of the packets of a connection, and the interface that they leave on.

use std::net::IpAddr;

use super::host::InterfaceKind;
use super::remembered::Remembered;
use super::route::{RouteError, Routes};

/// The next hop towards a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NextHop {
    /// Loopback if the destination is local.
    pub ifindex: u32,
    pub interface: InterfaceKind,
    /// The destination is an address of this host.
    pub local: bool,
}

/// The next hops from addresses of this host, for the network namespace in which this was made.
/// Answers are remembered until the network changes, so most questions cost one system call, and
/// threads do not wait for each other.
#[derive(Debug)]
pub struct NextHops {
    routes: Routes,
    known: Remembered<(IpAddr, IpAddr), NextHop>,
}

impl NextHops {
    /// # Errors
    /// The process may not have another descriptor.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { routes: Routes::new()?, known: Remembered::new() })
    }

    /// For each pair of addresses: the next hop from the first towards the second.
    pub fn of<const N: usize>(&self, pairs: [(IpAddr, IpAddr); N]) -> [Result<NextHop, RouteError>; N] {
        let ask = |(source, destination): &_| self.ask(*source, *destination);
        self.known.with(|known| pairs.map(|pair| known.get(pair, ask)))
    }

    fn ask(&self, source: IpAddr, destination: IpAddr) -> Result<NextHop, RouteError> {
        let hop = self.routes.lookup(source, destination)?;
        let interface = self.routes.interface(hop.ifindex).map_err(RouteError::Interface)?;
        Ok(NextHop { ifindex: hop.ifindex, interface: interface.kind, local: hop.local })
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::net::host::LOOPBACK_IFINDEX;

    #[test]
    fn both_ways_of_a_stream_are_told_again_and_again() {
        let next_hops = NextHops::new().unwrap();
        let localhost = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let multicast = IpAddr::V4(Ipv4Addr::new(224, 0, 0, 1));
        let loopback = NextHop { ifindex: LOOPBACK_IFINDEX, interface: InterfaceKind::Loopback, local: true };
        for _ in 0..2 {
            let [known, refused] = next_hops.of([(localhost, localhost), (localhost, multicast)]);
            assert_eq!(known.unwrap(), loopback);
            assert!(matches!(refused, Err(RouteError::NoRoute { .. })), "{refused:?}");
        }
    }
}
