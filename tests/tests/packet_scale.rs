//! Very many WebSockets at a time in one steer, which has far fewer descriptors than streams: real `ws`
//! servers and clients, and what a stream costs once the kernel carries it.

use std::collections::HashSet;
use std::fs;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{ChildStdin, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;
use steer_tests::eventually::eventually;
use steer_tests::netns::NetNs;
use steer_tests::process::{Orphan, Process};
use steer_tests::socketio::{events, wait_for};
use steer_tests::steer::Steer;
use steer_tests::topology::Topology;
use steer_tests::{peers, require, socketio};

/// Streams in all; far above any limit of descriptors that a process has here.
const STREAMS: usize = 50_000;
/// Servers, and processes of clients: each has descriptors for its share only.
const SHARES: usize = 4;
/// Handshakes that a process of clients has under way.
const PARALLEL: usize = 100;
const PATIENCE: Duration = Duration::from_secs(300);
/// Descriptors that steer may hold at rest, whatever the number of streams.
const DESCRIPTORS_AT_REST: usize = 100;
/// Bytes that a stream may cost in all: steer's memory and its share of the maps.
const BYTES_PER_STREAM: u64 = 1024;

#[test]
fn fifty_thousand_spliced_websockets_echo_and_cost_next_to_nothing() -> Result<()> {
    if !require::root() {
        return Ok(());
    }
    let logs = tempfile::tempdir()?;
    let topology = Topology::new(SHARES as u8)?;
    let endpoints = topology.endpoint_addresses(3000);
    let mut servers = Vec::new();
    for (netns, address) in topology.endpoints.iter().zip(&endpoints) {
        let Some(mut command) = peers::node_app("ws-server.js") else { return Ok(()) };
        command.args([address.ip().to_string(), address.port().to_string()]);
        let name = format!("server{}", servers.len());
        servers.push(Process::start(&name, command, logs.path(), Some(netns), Orphan::Dies)?);
    }
    servers.iter_mut().try_for_each(|server| wait_for("listening", server))?;

    let listen = SocketAddr::from((Topology::PROXY, 8080));
    let config = socketio::config(listen, &endpoints)
        + &format!("packet_splice: {{ max_streams: {}, linger: 1s }}\n", 2 * STREAMS);
    let steer = Steer::start(&config, Some(&topology.proxy), &["--splice", "packet"])?;
    let before = Cost::of(&steer)?;

    let mut clients = Vec::new();
    for share in 0..SHARES {
        clients.push(Clients::start(&topology.clients, listen, share, logs.path())?);
    }
    for clients in &mut clients {
        let opened = clients.said("open", 1)?;
        anyhow::ensure!(opened["count"] == STREAMS / SHARES, "{opened}");
    }
    eventually("splice of every stream", PATIENCE, || Ok(is_spliced(&steer)?.then_some(())))?;
    let after = Cost::of(&steer)?;
    after.report(&before);
    anyhow::ensure!(after.descriptors <= DESCRIPTORS_AT_REST, "{after:?}");
    anyhow::ensure!(sockets_to(&topology.proxy, &endpoints)? == 0, "sockets are left in the proxy");

    for round in 1..=2 {
        clients.iter_mut().try_for_each(|clients| clients.say("echo"))?;
        for clients in &mut clients {
            let echoed = clients.said("echoed", round)?;
            anyhow::ensure!(echoed["count"] == STREAMS / SHARES, "{echoed}");
        }
    }
    anyhow::ensure!(is_spliced(&steer)?, "some streams have left the splice");
    let per_stream = after.since(&before) / STREAMS as u64;
    anyhow::ensure!(per_stream <= BYTES_PER_STREAM, "a stream costs {per_stream} bytes");

    clients.iter_mut().try_for_each(|clients| clients.say("close"))?;
    for clients in &mut clients {
        let closed = clients.said("closed", 1)?;
        anyhow::ensure!(closed["count"] == STREAMS / SHARES, "{closed}");
    }
    eventually("end of every stream", PATIENCE, || {
        let left = steer.metric("steer_packet_streams", &[("kind", "used")])?
            + steer.metric("steer_source_ports", &[("kind", "used")])?
            + steer.metric("steer_streams", &[])?;
        Ok((left == 0.0).then_some(()))
    })?;
    let finished = steer.metric("steer_streams_closed_total", &[("end", "finished")])?;
    anyhow::ensure!(finished == STREAMS as f64, "{finished} streams finished in order");
    Ok(())
}

fn is_spliced(steer: &Steer<'_>) -> Result<bool> {
    Ok(steer.metric("steer_streams", &[("path", "packet")])? == STREAMS as f64)
}

/// A process of WebSocket clients.
struct Clients {
    process: Process,
    stdin: ChildStdin,
}

impl Clients {
    fn start(netns: &NetNs, proxy: SocketAddr, share: usize, logs: &std::path::Path) -> Result<Self> {
        // One address has too few ports for all.
        let [a, b, c, d] = Topology::CLIENTS.octets();
        let address = Ipv4Addr::new(a, b, c, d + share as u8);
        if share > 0 {
            netns.ip(&["address", "add", &format!("{address}/24"), "dev", "eth0"])?;
        }
        let mut command = peers::node_app("ws-clients.js").context("npm's packages are gone")?;
        command.args([format!("ws://{proxy}/"), address.to_string()]);
        command.args([(STREAMS / SHARES).to_string(), PARALLEL.to_string(), format!("share{share}")]);
        command.stdin(Stdio::piped());
        let name = format!("clients{share}");
        let mut process = Process::start(&name, command, logs, Some(netns), Orphan::Dies)?;
        let stdin = process.take_stdin().context("the clients have no standard input")?;
        Ok(Self { process, stdin })
    }

    fn say(&mut self, line: &str) -> Result<()> {
        writeln!(self.stdin, "{line}").with_context(|| format!("cannot say {line} to the clients"))
    }

    /// The event of this kind, once it has been said so many times.
    fn said(&mut self, kind: &str, times: usize) -> Result<Value> {
        eventually(&format!("word `{kind}` of the clients"), PATIENCE, || {
            let running = self.process.ensure_running();
            if let Some(event) = events(&self.process.stdout()?, kind)?.into_iter().nth(times - 1) {
                return Ok(Some(event));
            }
            running.map(|()| None)
        })
    }
}

/// What steer holds.
#[derive(Debug)]
struct Cost {
    descriptors: usize,
    resident: u64,
    /// Bytes of the kernel's memory for BPF maps, as their descriptors tell it.
    flow_maps: u64,
    /// `STEER_CONNS`, which is there from the start: bytes, records in all, records in use.
    records: (u64, f64, f64),
}

impl Cost {
    fn of(steer: &Steer<'_>) -> Result<Self> {
        const KIND: &str = "steer_packet_streams";
        let pid = steer.pid();
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        // Not VmRSS, in which the mapped records count from the start.
        let resident = field(&status, "RssAnon:").context("no RssAnon")? * 1024;
        // Several descriptors may name the same map.
        let mut seen = HashSet::new();
        let (mut flow_maps, mut records) = (0, 0);
        let mut descriptors = 0;
        for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
            descriptors += 1;
            // A descriptor may have been closed since.
            let Ok(info) = fs::read_to_string(entry?.path()) else { continue };
            let (Some(id), Some(kind)) = (field(&info, "map_id:"), field(&info, "map_type:")) else {
                continue;
            };
            if !seen.insert(id) {
                continue;
            }
            let bytes = field(&info, "memlock:").context("a map without memlock")?;
            match (kind, field(&info, "key_size:")) {
                (BPF_MAP_TYPE_HASH, Some(12 | 36)) => flow_maps += bytes,
                (BPF_MAP_TYPE_ARRAY, _) if field(&info, "value_size:") == Some(CONN_BYTES) => {
                    records += bytes
                }
                _ => {}
            }
        }
        anyhow::ensure!(records > 0, "steer has no map of records");
        let (limit, used) =
            (steer.metric(KIND, &[("kind", "limit")])?, steer.metric(KIND, &[("kind", "used")])?);
        Ok(Self { descriptors, resident, flow_maps, records: (records, limit, used) })
    }

    /// Bytes in all that have come with the streams since `before`.
    fn since(&self, before: &Self) -> u64 {
        let (bytes, limit, used) = self.records;
        let records = bytes as f64 / limit * (used - before.records.2);
        self.resident.saturating_sub(before.resident)
            + self.flow_maps.saturating_sub(before.flow_maps)
            + records as u64
    }

    fn report(&self, before: &Self) {
        let each = |bytes: u64| bytes / STREAMS as u64;
        println!(
            "{STREAMS} streams: {} descriptors; bytes per stream: {} resident memory of steer, {} entries of the \
             flow maps, {} record; {} in all",
            self.descriptors,
            each(self.resident.saturating_sub(before.resident)),
            each(self.flow_maps.saturating_sub(before.flow_maps)),
            self.records.0 / self.records.1 as u64,
            each(self.since(before)),
        );
    }
}

const BPF_MAP_TYPE_HASH: u64 = 1;
const BPF_MAP_TYPE_ARRAY: u64 = 2;
const CONN_BYTES: u64 = 320;

/// The number behind `name` at the beginning of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Sockets of the namespace that are connected to one of `addresses`.
fn sockets_to(netns: &NetNs, addresses: &[SocketAddr]) -> Result<usize> {
    const ESTABLISHED: &str = "01";
    let table = netns.run(|| fs::read_to_string("/proc/thread-self/net/tcp"))??;
    let remote = |address: &SocketAddr| match address.ip() {
        std::net::IpAddr::V4(ip) => format!("{:08X}:{:04X}", u32::from_ne_bytes(ip.octets()), address.port()),
        std::net::IpAddr::V6(_) => String::new(),
    };
    let remotes: Vec<_> = addresses.iter().map(remote).collect();
    let is_one = |line: &&str| {
        let columns: Vec<_> = line.split_whitespace().collect();
        columns.len() > 3 && columns[3] == ESTABLISHED && remotes.iter().any(|remote| remote == columns[2])
    };
    Ok(table.lines().skip(1).filter(is_one).count())
}
