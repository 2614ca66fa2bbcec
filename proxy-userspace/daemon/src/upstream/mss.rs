//! The largest segments that clients may send. A stream whose packets are passed on as they come needs a client
//! that sends none larger than its endpoint can take; and the client is told before its endpoint is known.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;

use steer_kernel::net::host;
use steer_kernel::net::route::{Hop, Routes};
use steer_kernel::tcp::tcp_info::{TIMESTAMP_BYTES, TcpInfo};
use steer_policy::config::{self, Cluster, Config, Listener, Route};

/// Headers without options, of IP and TCP together.
const IPV4_HEADERS: u32 = 40;
const IPV6_HEADERS: u32 = 60;

/// What a client's handshake has fixed, and its endpoint should agree with. Segments are in bytes of payload and TCP
/// options.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientTcp {
    /// The largest that it accepts.
    pub accepts: u16,
    /// The largest that it may send, as we have told it.
    pub told: u16,
    /// The scale of its windows, 0 to 14; 0 without scaling.
    pub window_scale: u8,
    /// Whether its segments have timestamps (RFC 7323).
    pub timestamps: bool,
}

impl ClientTcp {
    /// Of the connection of a client; `None`: it has ended.
    pub fn of(client: impl AsFd) -> Option<Self> {
        let info = &TcpInfo::of(client).ok()?;
        Some(Self {
            accepts: accepted_by_peer(info),
            told: announced(info),
            window_scale: info.send_scale(),
            timestamps: info.options().timestamps,
        })
    }
}

/// The largest segment that the peer of a connection is known to accept: it may be more than that if
/// TCP_MAXSEG limits the socket.
pub(super) fn accepted_by_peer(info: &TcpInfo) -> u16 {
    // There is less room for payload, which the kernel tells, than the peer has announced.
    let options = if info.options().timestamps { TIMESTAMP_BYTES } else { 0 };
    u16::try_from(info.send_mss() + options).unwrap_or(u16::MAX)
}

/// The largest segment that the peer was told to send.
pub(super) fn announced(info: &TcpInfo) -> u16 {
    u16::try_from(info.announced_mss()).unwrap_or(u16::MAX)
}

/// What a listener of a configuration should announce to its clients: what is configured, or else what fits its
/// ways to endpoints as the routes and interfaces stand now. `None`: that sets no limit.
pub fn for_listener(listener: &Listener, config: &Config) -> Option<u16> {
    config.packet_splice.mss.or_else(|| match Routes::new() {
        Ok(routes) => of_routes(listener, &config.clusters, &routes),
        Err(error) => {
            tracing::warn!(%error, "cannot ask for routes, streams to endpoints with a smaller MTU are relayed");
            None
        }
    })
}

/// What fits the narrowest way from a listener to an endpoint that it can upgrade to. `None`: there is no way, or
/// none is narrower than what `TCP_MAXSEG` can say.
fn of_routes(listener: &Listener, clusters: &[Cluster], routes: &Routes) -> Option<u16> {
    let upgradable = upgradable(listener);
    let fits = |cluster: &Cluster| {
        let addresses = cluster.endpoints.iter().map(|endpoint| endpoint.address.ip().to_canonical());
        addresses
            .filter_map(|address| of_route(address, &cluster.source_addresses, routes))
            .collect::<Vec<_>>()
    };
    let clusters = clusters.iter().filter(|cluster| upgradable.contains(&*cluster.name));
    clusters.flat_map(fits).min().filter(|mss| mss <= config::MSS.end())
}

/// The names of the clusters that streams of a listener can go to.
fn upgradable(listener: &Listener) -> BTreeSet<&str> {
    let routes = listener.virtual_hosts.iter().flat_map(|host| &host.routes);
    let upgrades = |route: &&Route| route.upgrade_websocket.unwrap_or(listener.options.upgrade_websocket);
    routes.filter(upgrades).map(|route| &*route.cluster).collect()
}

/// What fits the narrowest way to an address.
fn of_route(address: IpAddr, sources: &[IpAddr], routes: &Routes) -> Option<u16> {
    let unspecified = [match address {
        IpAddr::V4(_) => IpAddr::from([0; 4]),
        IpAddr::V6(_) => IpAddr::from([0; 16]),
    }];
    let mut sources: Vec<_> = sources.iter().filter(|source| source.is_ipv4() == address.is_ipv4()).collect();
    if sources.is_empty() {
        sources.extend(&unspecified);
    }
    let headers = if address.is_ipv4() { IPV4_HEADERS } else { IPV6_HEADERS };
    let fits = |source: &IpAddr| {
        let hop = routes.lookup(*source, address);
        let mtu = hop.map_err(io::Error::other).and_then(mtu);
        let mtu = mtu
            .inspect_err(|error| tracing::debug!(%address, %error, "the MTU towards an endpoint is unknown"));
        let mss = mtu.ok()?.checked_sub(headers)?.max((*config::MSS.start()).into());
        Some(u16::try_from(mss).unwrap_or(u16::MAX))
    };
    sources.into_iter().filter_map(fits).min()
}

fn mtu(hop: Hop) -> io::Result<u32> {
    let interface = host::interface(hop.ifindex)?.mtu;
    Ok(hop.mtu.map_or(interface, |mtu| mtu.min(interface)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener(address: &str, second_route: &str) -> Option<u16> {
        let text = format!(
            "
listeners:
- address: '{address}'
  routes:
  - {{ cluster: local, upgrade_configs: [websocket] }}
  - {{ cluster: nowhere, {second_route} }}
clusters:
- {{ name: local, lb_policy: maglev, endpoints: ['127.0.0.1:3000', '[::1]:3000'] }}
- {{ name: nowhere, lb_policy: maglev, endpoints: ['255.255.255.255:3000'] }}
"
        );
        let config = config::parse(&text, "test").unwrap().config;
        for_listener(&config.listeners[0], &config)
    }

    #[test]
    fn loopback_and_unreachable_endpoints_set_no_limit() {
        assert_eq!(listener("127.0.0.1:0", "upgrade_configs: []"), None);
        assert_eq!(listener("[::]:0", "upgrade_configs: [websocket]"), None);
    }

    #[test]
    fn only_upgrades_count() {
        let text = "
listeners:
- address: 127.0.0.1:0
  upgrade_configs: [websocket]
  routes: [{ cluster: a, upgrade_configs: [] }, { cluster: b }]
clusters:
- { name: a, lb_policy: maglev, endpoints: ['127.0.0.1:1'] }
- { name: b, lb_policy: maglev, endpoints: ['127.0.0.1:2'] }
";
        let config = config::parse(text, "test").unwrap().config;
        assert_eq!(upgradable(&config.listeners[0]), BTreeSet::from(["b"]));
    }

    #[test]
    fn an_interfaces_mtu_counts_unless_the_route_is_narrower() {
        let hop = Hop {
            ifindex: host::LOOPBACK_IFINDEX,
            local: true,
            mtu: None,
            source: IpAddr::from([127, 0, 0, 1]),
        };
        assert_eq!(mtu(hop).unwrap(), host::interface(host::LOOPBACK_IFINDEX).unwrap().mtu);
        assert_eq!(mtu(Hop { mtu: Some(1400), ..hop }).unwrap(), 1400);
    }
}
