//! The network that most tests run in:
//!
//! ```text
//! clients 10.71.0.2 ── 10.71.0.1 proxy 10.71.1.1 ── 10.71.1.2 endpoint 0
//!                                      10.71.2.1 ── 10.71.2.2 endpoint 1 ...
//! ```
//!
//! Each link also has IPv6: `fd71:0:0:N::1` and `::2` where IPv4 has `10.71.N.1` and `.2`. The
//! proxy's ends of the links are the devices `clients` and `endpoint0`, `endpoint1` ...; the other
//! ends are `eth0`.
//!
//! Each link is a veth pair with the kernel's default offloads. There are no routes between clients
//! and endpoints, so everything that arrives has passed the proxy.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Result;

use crate::instance;
use crate::netns::{self, NetNs};

/// A family of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    pub const fn other(self) -> Self {
        match self {
            Self::V4 => Self::V6,
            Self::V6 => Self::V4,
        }
    }
}

/// All namespaces and their links. They are removed together.
#[derive(Debug)]
pub struct Topology {
    pub clients: NetNs,
    pub proxy: NetNs,
    pub endpoints: Vec<NetNs>,
}

impl Topology {
    /// The proxy's address on the clients' side.
    pub const PROXY: Ipv4Addr = Ipv4Addr::new(10, 71, 0, 1);
    pub const CLIENTS: Ipv4Addr = Ipv4Addr::new(10, 71, 0, 2);
    pub const PROXY6: Ipv6Addr = v6(0, 1);
    pub const CLIENTS6: Ipv6Addr = v6(0, 2);

    /// The test network with 0 to 250 endpoints. Removes what crashed runs have left before.
    pub fn new(endpoints: u8) -> Result<Self> {
        const PREFIX: &str = "steer-t";
        netns::remove_leftovers(PREFIX)?;
        instance::remove_leftovers()?;
        Self::with_prefix(PREFIX, endpoints)
    }

    /// The same with another prefix for the names of the namespaces.
    pub fn with_prefix(prefix: &str, endpoints: u8) -> Result<Self> {
        let topology = Self {
            clients: NetNs::new(prefix, "clients")?,
            proxy: NetNs::new(prefix, "proxy")?,
            endpoints: (0..endpoints)
                .map(|i| NetNs::new(prefix, &format!("endpoint{i}")))
                .collect::<Result<_>>()?,
        };
        join(&topology.proxy, "clients", &topology.clients, 0)?;
        for (i, endpoint) in (0..).zip(&topology.endpoints) {
            join(&topology.proxy, &format!("endpoint{i}"), endpoint, i + 1)?;
        }
        Ok(topology)
    }

    /// All namespaces of the network.
    pub fn all(&self) -> impl Iterator<Item = &NetNs> {
        [&self.clients, &self.proxy].into_iter().chain(&self.endpoints)
    }

    /// The address of the endpoint at `index`.
    pub const fn endpoint(index: u8) -> Ipv4Addr {
        v4(index + 1, 2)
    }

    /// The IPv6 address of the endpoint at `index`.
    pub const fn endpoint6(index: u8) -> Ipv6Addr {
        v6(index + 1, 2)
    }

    /// The addresses of all endpoints with `port`, in order.
    pub fn endpoint_addresses(&self, port: u16) -> Vec<SocketAddr> {
        (0..).zip(&self.endpoints).map(|(i, _)| SocketAddr::from((Self::endpoint(i), port))).collect()
    }

    /// Lets clients and endpoints reach each other without a proxy: the kernel of the proxy's
    /// namespace routes.
    pub fn route_directly(&self) -> Result<()> {
        self.proxy.sysctl("net.ipv4.ip_forward", "1")?;
        self.proxy.sysctl("net.ipv6.conf.all.forwarding", "1")?;
        let links = std::iter::once(&self.clients).chain(&self.endpoints);
        for (link, netns) in (0..).zip(links) {
            for (family, gateway) in [("-4", v4(link, 1).to_string()), ("-6", v6(link, 1).to_string())] {
                netns.ip(&[family, "route", "add", "default", "via", &gateway])?;
            }
        }
        Ok(())
    }

    /// Keeps all namespaces when the guard is dropped.
    pub fn keep(&mut self) {
        self.clients.keep();
        self.proxy.keep();
        self.endpoints.iter_mut().for_each(NetNs::keep);
    }
}

const fn v4(link: u8, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 71, link, host)
}

const fn v6(link: u8, host: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd71, 0, 0, link as u16, 0, 0, 0, host as u16)
}

/// Makes a veth pair: `device` in the proxy's namespace, `eth0` in the other one. `link` numbers
/// its networks.
fn join(proxy: &NetNs, device: &str, other: &NetNs, link: u8) -> Result<()> {
    proxy.ip(&["link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", other.name()])?;
    for (netns, device, host) in [(proxy, device, 1), (other, "eth0", 2)] {
        netns.ip(&["address", "add", &format!("{}/24", v4(link, host)), "dev", device])?;
        // Without duplicate address detection, which takes a second.
        netns.ip(&["address", "add", &format!("{}/64", v6(link, host)), "dev", device, "nodad"])?;
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
        let address = SocketAddr::from((Topology::endpoint6(1), 3000));
        let _endpoint = topology.endpoints[1].run(|| TcpListener::bind(address).unwrap()).unwrap();
        assert!(topology.proxy.run(|| TcpStream::connect(address).is_ok()).unwrap());
        assert!(topology.clients.run(|| TcpStream::connect(address).is_err()).unwrap());
    }
}
