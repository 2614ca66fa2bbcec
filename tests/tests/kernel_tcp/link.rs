//! Two namespaces and a veth pair between them, with IPv4 and IPv6.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use steer_tests::netns::NetNs;

pub(crate) struct Link {
    pub(crate) proxy: NetNs,
    pub(crate) peer: NetNs,
}

impl Link {
    /// The proxy's addresses. The peer's addresses end with 2.
    pub(crate) const PROXY: [IpAddr; 2] =
        [IpAddr::V4(Ipv4Addr::new(10, 72, 0, 1)), IpAddr::V6(Ipv6Addr::new(0xfd72, 0, 0, 0, 0, 0, 0, 1))];

    pub(crate) fn new() -> Self {
        let proxy = NetNs::new("steer-t", "proxy").unwrap();
        let peer = NetNs::new("steer-t", "peer").unwrap();
        proxy
            .ip(&["link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", peer.name()])
            .unwrap();
        for (netns, host) in [(&proxy, 1), (&peer, 2)] {
            netns.ip(&["address", "add", &format!("10.72.0.{host}/24"), "dev", "wire"]).unwrap();
            netns.ip(&["address", "add", &format!("fd72::{host}/64"), "dev", "wire", "nodad"]).unwrap();
            netns.ip(&["link", "set", "wire", "up"]).unwrap();
        }
        Self { proxy, peer }
    }

    /// Writes a setting below `/proc/sys/net`. The thread that opens the file decides which
    /// namespace the setting belongs to.
    pub(crate) fn set(&self, netns: &NetNs, setting: &str, value: &str) {
        let path = format!("/proc/sys/net/{setting}");
        netns.run(|| std::fs::write(&path, value).unwrap()).unwrap();
    }
}
