//! The network of the benchmark: one lane for each subject, all between the same clients and the
//! same endpoint.
//!
//! ```text
//!              ┌─ 10.72.1.2 ── 10.72.1.1  lane 1 (direct)        10.73.1.1 ── 10.73.1.2 ─┐
//! clients ─────┼─ 10.72.2.2 ── 10.72.2.1  lane 2 (steer-packet)  10.73.2.1 ── 10.73.2.2 ─┼───── endpoint
//!              └─ ...                                                                    ┘
//! ```
//!
//! Each lane is a namespace with two veth pairs with the kernel's default offloads: devices
//! `clients` and `endpoint` in the lane, `lane1`, `lane2` ... at the other ends. So the packets of
//! one subject meet no BPF programs, sockets or memory of another subject. The direct connection
//! crosses as many links as the others.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use steer_tests::eventually::eventually;
use steer_tests::netns::{self, NetNs};
use steer_tests::process::{Orphan, Process, quiet};
use steer_tests::sockets::{self, State};
use tempfile::TempDir;

use crate::subjects::Kind;

/// The start of the names of the benchmark's namespaces.
const PREFIX: &str = "steer-bench";
/// Where proxies listen.
pub(crate) const LISTEN_PORT: u16 = 8080;
/// The three endpoints of the ring: three ports of one host.
pub(crate) const ENDPOINT_PORTS: [u16; 3] = [3000, 3001, 3002];
const LISTENING_WITHIN: Duration = Duration::from_secs(10);

/// All namespaces. They are removed together.
#[derive(Debug)]
pub(crate) struct Lanes {
    pub(crate) clients: NetNs,
    pub(crate) endpoint: NetNs,
    lanes: Vec<Lane>,
    directory: TempDir,
}

/// The network path of one subject.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) kind: Kind,
    pub(crate) netns: NetNs,
    number: u8,
}

impl Lanes {
    /// Makes one lane for each of `kinds`, after it has removed what crashed runs left.
    pub(crate) fn new(kinds: &[Kind]) -> Result<Self> {
        netns::remove_leftovers(PREFIX)?;
        let (clients, endpoint) = (NetNs::new(PREFIX, "clients")?, NetNs::new(PREFIX, "endpoint")?);
        for (netns, ports) in [(&clients, "10000 65535"), (&endpoint, "32768 60999")] {
            allow_many_connections(netns)?;
            netns.sysctl("net.ipv4.ip_local_port_range", ports)?;
        }
        let lane = |(number, kind): (u8, &Kind)| Lane::new(*kind, number, &clients, &endpoint);
        let lanes = (1..).zip(kinds).map(lane).collect::<Result<_>>()?;
        let directory = tempfile::tempdir().context("cannot make a directory")?;
        Ok(Self { clients, endpoint, lanes, directory })
    }

    /// # Errors
    /// When there is no lane for this kind.
    pub(crate) fn of(&self, kind: Kind) -> Result<&Lane> {
        let lane = self.lanes.iter().find(|lane| lane.kind == kind);
        lane.with_context(|| format!("{kind} has no lane"))
    }

    /// For logs and configuration files. It is removed with the lanes.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }
}

impl Lane {
    fn new(kind: Kind, number: u8, clients: &NetNs, endpoint: &NetNs) -> Result<Self> {
        let netns = NetNs::new(PREFIX, kind.name())?;
        let lane = Self { kind, netns, number };
        lane.join("clients", clients, lane.front(), lane.client())?;
        lane.join("endpoint", endpoint, lane.back(), lane.server())?;
        allow_many_connections(&lane.netns)?;
        if kind == Kind::Direct {
            lane.netns.sysctl("net.ipv4.ip_forward", "1")?;
            clients.ip(&["route", "add", &network(lane.server()), "via", &lane.front().to_string()])?;
            endpoint.ip(&["route", "add", &network(lane.client()), "via", &lane.back().to_string()])?;
        }
        Ok(lane)
    }

    /// Makes a veth pair: `device` with the address `near` in this lane, `laneN` with `far` in the
    /// namespace `other`.
    fn join(&self, device: &str, other: &NetNs, near: Ipv4Addr, far: Ipv4Addr) -> Result<()> {
        let there = format!("lane{}", self.number);
        let pair = ["link", "add", device, "type", "veth", "peer", "name", &there, "netns", other.name()];
        self.netns.ip(&pair)?;
        for (netns, device, address) in [(&self.netns, device, near), (other, there.as_str(), far)] {
            netns.ip(&["address", "add", &format!("{address}/24"), "dev", device])?;
            netns.ip(&["link", "set", device, "up"])?;
        }
        Ok(())
    }

    /// The clients' address in this lane.
    pub(crate) fn client(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 72, self.number, 2)
    }

    /// The lane's own address on the clients' side.
    pub(crate) fn front(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 72, self.number, 1)
    }

    /// The lane's own address on the endpoint's side.
    fn back(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 73, self.number, 1)
    }

    /// The endpoint's address in this lane.
    pub(crate) fn server(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 73, self.number, 2)
    }

    /// The address on which this lane's proxy listens.
    pub(crate) fn listen(&self) -> SocketAddr {
        (self.front(), LISTEN_PORT).into()
    }

    /// The addresses of the three endpoints.
    pub(crate) fn endpoints(&self) -> [SocketAddr; 3] {
        ENDPOINT_PORTS.map(|port| (self.server(), port).into())
    }

    /// The addresses to which the load generator connects.
    pub(crate) fn targets(&self) -> Vec<SocketAddr> {
        match self.kind {
            Kind::Direct => self.endpoints().to_vec(),
            _ => vec![self.listen()],
        }
    }
}

fn network(address: Ipv4Addr) -> String {
    let [a, b, c, _] = address.octets();
    format!("{a}.{b}.{c}.0/24")
}

/// Settings for thousands of connections a second, the same in all namespaces. In the lanes, the
/// range of local ports stays the kernel's default, because the packet splice uses the ports
/// outside that range.
fn allow_many_connections(netns: &NetNs) -> Result<()> {
    netns.sysctl("net.core.somaxconn", "16384")?;
    netns.sysctl("net.ipv4.tcp_max_syn_backlog", "16384")?;
    // A tuple may be used again one second after its connection was closed.
    netns.sysctl("net.ipv4.tcp_tw_reuse", "1")
}

/// The processes of the endpoint. They run until the guard is dropped.
#[derive(Debug)]
pub(crate) struct Endpoint {
    processes: Vec<Process>,
}

impl Endpoint {
    /// Starts one process that listens on all three ports. Most measurements use this, because one
    /// process competes least with the proxies for the processors.
    pub(crate) fn start(lanes: &Lanes) -> Result<Self> {
        Self::start_each(lanes, &[&ENDPOINT_PORTS])
    }

    /// Starts one process for each port, for more connections than one process has descriptors.
    pub(crate) fn start_three(lanes: &Lanes) -> Result<Self> {
        let [a, b, c] = ENDPOINT_PORTS;
        Self::start_each(lanes, &[&[a], &[b], &[c]])
    }

    fn start_each(lanes: &Lanes, ports: &[&[u16]]) -> Result<Self> {
        let start = |ports: &&[u16]| {
            let mut command = quiet(std::env::current_exe().context("cannot find steer-bench")?);
            command.arg("serve").args(ports.iter().map(u16::to_string));
            let name = format!("endpoint-{}", ports[0]);
            Process::start(&name, command, lanes.directory(), Some(&lanes.endpoint), Orphan::Dies)
        };
        let mut endpoint = Self { processes: ports.iter().map(start).collect::<Result<_>>()? };
        eventually("listening endpoint", LISTENING_WITHIN, || {
            endpoint.ensure_running()?;
            let sockets = lanes.endpoint.run(sockets::tcp)??;
            let listens = |port| {
                sockets.iter().any(|socket| socket.state == State::Listening && socket.local.port() == port)
            };
            Ok(ENDPOINT_PORTS.into_iter().all(listens).then_some(()))
        })?;
        Ok(endpoint)
    }

    /// # Errors
    /// When a process has ended; the error has its last output.
    pub(crate) fn ensure_running(&mut self) -> Result<()> {
        self.processes.iter_mut().try_for_each(Process::ensure_running)
    }
}
