//! One Steer between all kinds of clients and endpoints, and what becomes of a stream.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result};
use steer_tests::eventually::eventually;
use steer_tests::netns::NetNs;
use steer_tests::steer::Steer;
use steer_tests::streams::{self, Client};
use steer_tests::topology::{Family, Topology};

use crate::host::HostKind;
use crate::peers::{ClientKind, EndpointKind, container};
use crate::tun::TunLink;

/// Much longer than any step takes on a busy machine. A stream that takes longer is broken.
const PATIENCE: Duration = Duration::from_secs(15);
/// How much each stream moves in each direction.
const BULK: usize = 256 * 1024;

/// What becomes of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cell {
    Spliced,
    /// Relayed, for this reason.
    Relayed(String),
    /// The stream did not open, or did not carry its bytes, or had no decision.
    Broken,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Spliced => f.write_str("spliced"),
            Self::Relayed(reason) => write!(f, "`{reason}`"),
            Self::Broken => f.write_str("**broken**"),
        }
    }
}

pub(crate) struct Bed {
    // The first field, so that it is dropped before its namespaces.
    _tun: Option<TunLink>,
    pub(crate) topology: Topology,
    host: HostKind,
    _container: NetNs,
}

impl Bed {
    pub(crate) fn new(host: HostKind) -> Result<Self> {
        let topology = Topology::new(EndpointKind::HOSTS)?;
        let container = container(&topology.proxy)?;
        let tun = host.apply(&topology)?;
        for endpoint in EndpointKind::ALL {
            endpoint.apply(&topology)?;
            let netns = match endpoint {
                // The kind `Linux` serves both families.
                EndpointKind::OtherFamily => continue,
                EndpointKind::Loopback => &topology.proxy,
                EndpointKind::Container => &container,
                _ => &topology.endpoints[endpoint as usize],
            };
            for family in Family::BOTH {
                streams::serve(netns, endpoint.address(family))?;
            }
        }
        Ok(Self { _tun: tun, topology, host, _container: container })
    }

    /// Starts Steer, opens a stream in each case, one after the other, and stops Steer when it has
    /// no stream any more.
    pub(crate) fn run(&self, cases: &[(ClientKind, EndpointKind)]) -> Result<Vec<Cell>> {
        let mut steer = Steer::start(&config(), Some(&self.topology.proxy), &[])?;
        let mut cells = Vec::new();
        for (client, endpoint) in cases {
            let cell = self.cell(&steer, *client, *endpoint);
            eprintln!("{:?}, {client:?} to {endpoint:?}: {cell:?}", self.host);
            cells.push(cell.unwrap_or(Cell::Broken));
        }
        // The peers of a broken stream may never learn that it has ended.
        if !cells.contains(&Cell::Broken) {
            eventually("end of all streams", PATIENCE, || Ok(steer.flows()?.is_empty().then_some(())))?;
        }
        steer.stop(libc::SIGTERM)?;
        Ok(cells)
    }

    fn cell(&self, steer: &Steer<'_>, client: ClientKind, endpoint: EndpointKind) -> Result<Cell> {
        client.apply(&self.topology.clients)?;
        let first = self.stream(steer, client, endpoint)?;
        // The first stream may have shown Steer that the endpoint has no timestamps, or a small MSS.
        let learned = ["timestamps_differ", "mss"].map(|reason| Cell::Relayed(reason.to_owned()));
        if learned.contains(&first) { self.stream(steer, client, endpoint) } else { Ok(first) }
    }

    /// What becomes of one stream.
    fn stream(&self, steer: &Steer<'_>, client: ClientKind, endpoint: EndpointKind) -> Result<Cell> {
        let clients = &self.topology.clients;
        let front = SocketAddr::new(front(client.family()), self.host.port(endpoint));
        let stream = Client::open(clients, front, 1, PATIENCE)?;
        let address = stream.address()?.to_string();
        // Before the stream is old enough for a hand-over, it is relayed without a reason.
        let cell = eventually("decision about the stream", PATIENCE, || {
            let rows = steer.flows()?;
            let row = rows.iter().find(|row| row["client"] == address.as_str());
            let row = row.with_context(|| format!("/flows has no row of {address}: {rows:?}"))?;
            let relayed = row["reason"].as_str().map(|reason| Cell::Relayed(reason.to_owned()));
            Ok(if row["path"] == "packet" { Some(Cell::Spliced) } else { relayed })
        })?;
        let mut both = [stream];
        for tally in [streams::flow(&mut both, BULK), streams::close(&mut both)] {
            anyhow::ensure!(tally.faults.is_empty(), "the stream is {cell}, but broken: {:?}", tally.faults);
        }
        Ok(cell)
    }
}

fn front(family: Family) -> IpAddr {
    match family {
        Family::V4 => Topology::PROXY.into(),
        Family::V6 => Topology::PROXY6.into(),
    }
}

/// A listener and a cluster for each kind of endpoint and each family of clients. All else is the
/// default.
fn config() -> String {
    let mut listeners = String::new();
    let mut clusters = String::new();
    for (index, endpoint) in EndpointKind::ALL.iter().enumerate() {
        for family in Family::BOTH {
            let front = SocketAddr::new(front(family), endpoint.front_port());
            let name = format!("{family:?}-{index}");
            listeners += &format!(
                "- address: \"{front}\"\n  routes:\n  - match: {{ prefix: / }}\n    cluster: {name}\n    \
                 hash_policy:\n    - header: {{ header_name: x-forwarded-for }}\n    \
                 upgrade_configs: [websocket]\n"
            );
            let address = endpoint.address(family);
            clusters += &format!("- name: {name}\n  lb_policy: ring_hash\n  endpoints: [\"{address}\"]\n");
        }
    }
    format!("listeners:\n{listeners}clusters:\n{clusters}")
}
