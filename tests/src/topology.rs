//! The network that most tests run in:
//!
//! ```text
//! clients 10.71.0.2 ── 10.71.0.1 proxy 10.71.1.1 ── 10.71.1.2 endpoint 0
//!                                      10.71.2.1 ── 10.71.2.2 endpoint 1 ...
//! ```
//!
//! Each link is a veth pair with the kernel's default offloads. There are no routes between clients
//! and endpoints: what arrives has passed the proxy.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::Result;

use crate::netns::{self, NetNs};

/// The namespaces, joined; they go away together.
#[derive(Debug)]
pub struct Topology {
    pub clients: NetNs,
    pub proxy: NetNs,
    pub endpoints: Vec<NetNs>,
}

impl Topology {
    /// The proxy, as the clients see it.
    pub const PROXY: Ipv4Addr = Ipv4Addr::new(10, 71, 0, 1);
    pub const CLIENTS: Ipv4Addr = Ipv4Addr::new(10, 71, 0, 2);

    /// The test network with 0 to 250 endpoints; removes what crashed runs have left first.
    pub fn new(endpoints: u8) -> Result<Self> {
        const PREFIX: &str = "steer-t";
        netns::remove_leftovers(PREFIX)?;
        Self::with_prefix(PREFIX, endpoints)
    }

    /// The same with another prefix for the namespaces' names.
    pub fn with_prefix(prefix: &str, endpoints: u8) -> Result<Self> {
        let topology = Self {
            clients: NetNs::new(prefix, "clients")?,
            proxy: NetNs::new(prefix, "proxy")?,
            endpoints: (0..endpoints)
                .map(|i| NetNs::new(prefix, &format!("endpoint{i}")))
                .collect::<Result<_>>()?,
        };
        join(&topology.proxy, "clients", Self::PROXY, &topology.clients, Self::CLIENTS)?;
        for (i, endpoint) in (0..).zip(&topology.endpoints) {
            let near = Ipv4Addr::new(10, 71, i + 1, 1);
            join(&topology.proxy, &format!("endpoint{i}"), near, endpoint, Self::endpoint(i))?;
        }
        Ok(topology)
    }

    /// The address of the endpoint at `index`.
    pub const fn endpoint(index: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 71, index + 1, 2)
    }

    /// The addresses of all endpoints with `port`, in order.
    pub fn endpoint_addresses(&self, port: u16) -> Vec<SocketAddr> {
        (0..).zip(&self.endpoints).map(|(i, _)| SocketAddr::from((Self::endpoint(i), port))).collect()
    }

    /// Leaves all namespaces standing when the guard is dropped.
    pub fn keep(&mut self) {
        self.clients.keep();
        self.proxy.keep();
        self.endpoints.iter_mut().for_each(NetNs::keep);
    }
}

/// A veth pair: `link` in the proxy's namespace, `eth0` in the other.
fn join(proxy: &NetNs, link: &str, near: Ipv4Addr, other: &NetNs, far: Ipv4Addr) -> Result<()> {
    proxy.ip(&["link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", other.name()])?;
    for (netns, device, address) in [(proxy, link, near), (other, "eth0", far)] {
        netns.ip(&["address", "add", &format!("{address}/24"), "dev", device])?;
        netns.ip(&["link", "set", device, "up"])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn clients_reach_the_proxy_and_the_proxy_reaches_the_endpoints() {
        if !crate::require::root() {
            return;
        }
        let topology = Topology::new(2).unwrap();
        let front = topology.proxy.run(|| TcpListener::bind((Topology::PROXY, 80)).unwrap()).unwrap();
        let address = front.local_addr().unwrap();
        assert!(topology.clients.run(|| TcpStream::connect(address).is_ok()).unwrap());
        for (netns, address) in topology.endpoints.iter().zip(topology.endpoint_addresses(3000)) {
            let _endpoint = netns.run(|| TcpListener::bind(address).unwrap()).unwrap();
            assert!(topology.proxy.run(|| TcpStream::connect(address).is_ok()).unwrap());
            assert!(topology.clients.run(|| TcpStream::connect(address).is_err()).unwrap());
        }
    }
}
