//! The kinds of hosts that Steer runs on: their packet filters, and their interfaces.

use std::io::Write as _;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use steer_tests::netns::NetNs;
use steer_tests::process::quiet;
use steer_tests::topology::Topology;

use crate::peers::{ENDPOINT_PORT, EndpointKind, FRONT_PORT};
use crate::tun::TunLink;

/// A client connects to this port plus `i`, and the rules lead it to the front `FRONT_PORT` plus
/// `i`.
const NAT_PORT: u16 = 9000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HostKind {
    Plain,
    /// Rules for forwarded packets only, as those of Docker.
    Forwards,
    /// `ct state invalid drop`
    DropsInvalid,
    /// `ct state invalid drop`, with `nf_conntrack_tcp_be_liberal`.
    DropsInvalidLiberally,
    /// `ct state invalid drop`, and rules that exempt Steer's connections from tracking.
    DropsInvalidExceptSteer,
    /// Clients connect to another port than the front's.
    Redirects,
    /// As `Redirects`, but only connections of clients are tracked.
    RedirectsOnly,
    /// As `Redirects`, with `nf_conntrack_tcp_be_liberal`.
    RedirectsLiberally,
    /// Connections to endpoints get the address of the interface, which they have already.
    Masquerades,
    /// Connections to endpoints get another address.
    ChangesSource,
    /// As `ChangesSource`, but only connections to endpoints are tracked.
    ChangesSourceOnly,
    /// Connections to one endpoint reach another endpoint, as with a virtual address. Only these
    /// connections are tracked.
    ChangesDestinationOnly,
    TunToEndpoint,
    TunToClients,
}

impl HostKind {
    pub(crate) const ALL: [Self; 10] = [
        Self::Plain,
        Self::Forwards,
        Self::DropsInvalid,
        Self::DropsInvalidLiberally,
        Self::DropsInvalidExceptSteer,
        Self::Redirects,
        Self::Masquerades,
        Self::ChangesSource,
        Self::TunToEndpoint,
        Self::TunToClients,
    ];

    /// A rule rewrites one connection. Only the tracked entry of that connection tells so.
    pub(crate) const REWRITING: [Self; 4] = [
        Self::RedirectsOnly,
        Self::RedirectsLiberally,
        Self::ChangesSourceOnly,
        Self::ChangesDestinationOnly,
    ];

    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Plain => "no rules",
            Self::Forwards => "`ct state invalid drop` for forwarded packets only",
            Self::DropsInvalid => "`ct state invalid drop`",
            Self::DropsInvalidLiberally => "`ct state invalid drop`, `nf_conntrack_tcp_be_liberal=1`",
            Self::DropsInvalidExceptSteer => "`ct state invalid drop`, `notrack` for both connections",
            Self::Redirects => "DNAT in front of the listener",
            Self::RedirectsOnly => "DNAT in front of the listener, `notrack` for endpoints",
            Self::RedirectsLiberally => "DNAT in front of the listener, `nf_conntrack_tcp_be_liberal=1`",
            Self::Masquerades => "MASQUERADE towards endpoints",
            Self::ChangesSource => "SNAT towards endpoints",
            Self::ChangesSourceOnly => "SNAT towards endpoints, `notrack` for listeners",
            Self::ChangesDestinationOnly => "DNAT towards endpoints, `notrack` for listeners",
            Self::TunToEndpoint => "tun device towards endpoints",
            Self::TunToClients => "tun device towards clients",
        }
    }

    /// The port to which clients connect for this endpoint.
    pub(crate) fn port(self, endpoint: EndpointKind) -> u16 {
        match self {
            Self::Redirects | Self::RedirectsOnly | Self::RedirectsLiberally => NAT_PORT + endpoint as u16,
            _ => endpoint.front_port(),
        }
    }

    /// Changes the proxy's host. Returns the link that must live as long as the topology.
    pub(crate) fn apply(self, topology: &Topology) -> Result<Option<TunLink>> {
        let proxy = &topology.proxy;
        match self {
            Self::Plain => {}
            Self::Forwards => nft(proxy, FORWARDS)?,
            Self::DropsInvalid => nft(proxy, DROP_INVALID)?,
            Self::DropsInvalidLiberally => {
                nft(proxy, DROP_INVALID)?;
                proxy.sysctl("net.netfilter.nf_conntrack_tcp_be_liberal", "1")?;
            }
            Self::DropsInvalidExceptSteer => {
                nft(proxy, &[DROP_INVALID, &notrack_fronts(), &notrack_endpoints()].join("\n"))?
            }
            Self::Redirects => nft(proxy, &redirect())?,
            Self::RedirectsOnly => nft(proxy, &[redirect(), notrack_endpoints()].join("\n"))?,
            Self::RedirectsLiberally => {
                nft(proxy, &redirect())?;
                proxy.sysctl("net.netfilter.nf_conntrack_tcp_be_liberal", "1")?;
            }
            Self::Masquerades => nft(proxy, MASQUERADE)?,
            Self::ChangesSource => change_source(proxy)?,
            Self::ChangesSourceOnly => {
                nft(proxy, &notrack_fronts())?;
                change_source(proxy)?;
            }
            Self::ChangesDestinationOnly => {
                let other = &topology.endpoints[EndpointKind::NoSack as usize];
                other.ip(&["route", "add", "10.71.1.0/24", "via", "10.71.3.1"])?;
                nft(proxy, &[&notrack_fronts(), CHANGE_DESTINATION].join("\n"))?;
            }
            Self::TunToEndpoint => {
                return TunLink::between(proxy, "endpoint0", &topology.endpoints[0], 1).map(Some);
            }
            Self::TunToClients => {
                return TunLink::between(proxy, "clients", &topology.clients, 0).map(Some);
            }
        }
        Ok(None)
    }
}

const FORWARDS: &str = "\
table inet filter {
    chain forward {
        type filter hook forward priority filter
        ct state invalid drop
    }
}";

const DROP_INVALID: &str = "\
table inet filter {
    chain in {
        type filter hook prerouting priority filter
        ct state invalid drop
    }
    chain out {
        type filter hook output priority filter
        ct state invalid drop
    }
}";

const MASQUERADE: &str = "\
table inet nat {
    chain post {
        type nat hook postrouting priority srcnat
        oifname { \"endpoint*\", \"bridge0\" } masquerade
    }
}";

/// From the endpoint of the kind `Linux` to that of the kind `NoSack`.
const CHANGE_DESTINATION: &str = "\
table inet nat {
    chain out {
        type nat hook output priority -100
        ip daddr 10.71.1.2 dnat ip to 10.71.3.2
    }
}";

/// Rules that exempt the connections to endpoints from tracking. The last one is for endpoints on
/// loopback: they send by `out`, too.
fn notrack_endpoints() -> String {
    format!(
        "\
table inet steer {{
    chain in {{
        type filter hook prerouting priority raw
        tcp sport {ENDPOINT_PORT} notrack
    }}
    chain out {{
        type filter hook output priority raw
        tcp dport {ENDPOINT_PORT} notrack
        tcp sport {ENDPOINT_PORT} notrack
    }}
}}"
    )
}

/// Rules that exempt the connections of clients from tracking.
fn notrack_fronts() -> String {
    let fronts = format!("{FRONT_PORT}-{}", FRONT_PORT + 99);
    format!(
        "\
table inet steer {{
    chain in {{
        type filter hook prerouting priority raw
        tcp dport {fronts} notrack
    }}
    chain out {{
        type filter hook output priority raw
        tcp sport {fronts} notrack
    }}
}}"
    )
}

fn redirect() -> String {
    let ports = EndpointKind::ALL
        .map(|endpoint| format!("{} : {}", HostKind::Redirects.port(endpoint), endpoint.front_port()));
    format!(
        "\
table inet nat {{
    chain pre {{
        type nat hook prerouting priority dstnat
        meta l4proto tcp redirect to :tcp dport map {{ {} }}
    }}
}}",
        ports.join(", ")
    )
}

/// Gives the proxy's host second addresses, and sends connections from these to the endpoints.
fn change_source(proxy: &NetNs) -> Result<()> {
    for (device, v4, v6) in [("endpoint0", "10.71.1", "fd71:0:0:1:"), ("bridge0", "10.72.0", "fd72:")] {
        proxy.ip(&["address", "add", &format!("{v4}.9/24"), "dev", device])?;
        // IPv6 would take the newest address as a source by itself, and the rule would change nothing.
        let v6 = format!("{v6}:9/64");
        proxy.ip(&["address", "add", &v6, "dev", device, "nodad", "preferred_lft", "0"])?;
    }
    nft(
        proxy,
        "\
table inet nat {
    chain post {
        type nat hook postrouting priority srcnat
        ip daddr 10.71.1.2 snat ip to 10.71.1.9
        ip6 daddr fd71:0:0:1::2 snat ip6 to fd71:0:0:1::9
        ip daddr 10.72.0.2 snat ip to 10.72.0.9
        ip6 daddr fd72::2 snat ip6 to fd72::9
    }
}",
    )
}

fn nft(host: &NetNs, rules: &str) -> Result<()> {
    let mut command = quiet("nft");
    command.args(["-f", "-"]).stdin(Stdio::piped());
    host.enter(&mut command)?;
    let mut child = command.spawn().context("cannot run nft")?;
    let mut stdin = child.stdin.take().context("nft has no standard input")?;
    stdin.write_all(rules.as_bytes()).and_then(|()| stdin.write_all(b"\n")).context("cannot tell nft")?;
    drop(stdin);
    ensure!(child.wait().context("cannot wait for nft")?.success(), "nft refused these rules:\n{rules}");
    Ok(())
}
