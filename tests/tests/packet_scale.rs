//! Very many WebSockets at a time in one steer, which has far fewer descriptors than streams: real `ws`
//! servers and clients, and what a stream costs once the kernel carries it.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{ChildStdin, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use proxy_common::flow::Record;
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
/// In a hand-over after which nobody has to repeat anything, a few tens of milliseconds.
const REST_WITHIN: Duration = Duration::from_secs(10);
/// Descriptors that steer may hold at rest, whatever the number of streams.
const DESCRIPTORS_AT_REST: usize = 100;
/// Bytes that a further stream may cost in all: steer's memory at rest and its share of the maps.
/// The limit is the promise of docs/benchmarks.md, 1 KiB. On a busy machine runs of one binary differ
/// by 45 bytes, with what hand-overs have left in the allocator's pages. (Sizes have exact limits in
/// unit tests.)
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
    // The first half pays for what does not depend on the number of streams, such as the most sockets at a time.
    let mut clients = Vec::new();
    let mut open = |shares: std::ops::Range<usize>| {
        let first = shares.start;
        for share in shares {
            clients.push(Clients::start(&topology.clients, listen, share, logs.path())?);
        }
        for clients in &mut clients[first..] {
            let opened = clients.said("open", 1)?;
            anyhow::ensure!(opened["count"] == STREAMS / SHARES, "{opened}");
        }
        let streams = clients.len() * (STREAMS / SHARES);
        eventually("splice of every stream", PATIENCE, || Ok(is_spliced(&steer, streams)?.then_some(())))?;
        rest(&steer, &topology.proxy, &endpoints)?;
        Cost::at_rest(&steer)
    };
    let half = open(0..SHARES / 2)?;
    let all = open(SHARES / 2..SHARES)?;
    let each = all.of_each_since(&half)?;
    let total: u64 = each.iter().sum();
    println!(
        "{STREAMS} streams, {} descriptors; bytes for each further stream: {} of the process, {} in the flow maps, \
         {} record; {total} in all",
        all.descriptors, each[0], each[1], each[2]
    );

    for round in 1..=2 {
        clients.iter_mut().try_for_each(|clients| clients.say("echo"))?;
        for clients in &mut clients {
            let echoed = clients.said("echoed", round)?;
            anyhow::ensure!(echoed["count"] == STREAMS / SHARES, "{echoed}");
        }
    }
    anyhow::ensure!(is_spliced(&steer, STREAMS)?, "some streams have left the splice");
    anyhow::ensure!(total <= BYTES_PER_STREAM, "a further stream costs {total} bytes");

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

fn is_spliced(steer: &Steer<'_>, streams: usize) -> Result<bool> {
    Ok(steer.metric("steer_streams", &[("path", "packet")])? == streams as f64)
}

/// Waits until no stream has a socket any more. Those of the last ones are still there when their path is `packet`: a
/// hand-over has to be completed, and a grace period has to pass.
fn rest(steer: &Steer<'_>, proxy: &NetNs, endpoints: &[SocketAddr]) -> Result<()> {
    let mut held = (0, BTreeMap::new());
    eventually("rest of steer", REST_WITHIN, || {
        held = (sockets_to(proxy, endpoints)?, descriptors(steer.pid())?);
        Ok((held.0 == 0 && held.1.values().sum::<usize>() <= DESCRIPTORS_AT_REST).then_some(()))
    })
    .with_context(|| format!("{} sockets to endpoints, descriptors {:?}", held.0, held.1))
}

/// How many descriptors a process has of each kind.
fn descriptors(pid: u32) -> Result<BTreeMap<String, usize>> {
    let mut kinds = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // A descriptor may have been closed since.
        let Ok(target) = fs::read_link(entry?.path()) else { continue };
        let target = target.to_string_lossy();
        let kind = target.split_once(":[").map_or(&*target, |(kind, _inode)| kind);
        *kinds.entry(kind.to_owned()).or_default() += 1;
    }
    Ok(kinds)
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
    /// Without the mapped records, which count as resident from the start.
    memory: u64,
    /// Bytes of the kernel's memory for the flow maps, as their descriptors tell it.
    flow_maps: u64,
    streams: u64,
}

impl Cost {
    /// When the allocator has given back what the hand-overs needed for a moment: pages that were not used for a second, which
    /// takes longer the more there are.
    fn at_rest(steer: &Steer<'_>) -> Result<Self> {
        const STEADY: Duration = Duration::from_secs(3);
        let (mut least, mut since) = (Self::of(steer)?, Instant::now());
        while since.elapsed() < STEADY {
            thread::sleep(Duration::from_millis(200));
            let now = Self::of(steer)?;
            if now.memory < least.memory {
                (least, since) = (now, Instant::now());
            }
        }
        Ok(least)
    }

    fn of(steer: &Steer<'_>) -> Result<Self> {
        let pid = steer.pid();
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let memory = field(&status, "RssAnon:").context("no RssAnon")? * 1024;
        // Several descriptors may name the same map.
        let mut seen = HashSet::new();
        let mut flow_maps = 0;
        let mut descriptors = 0;
        for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
            descriptors += 1;
            // A descriptor may have been closed since.
            let Ok(info) = fs::read_to_string(entry?.path()) else { continue };
            let is_flow_map = field(&info, "map_type:") == Some(BPF_MAP_TYPE_HASH)
                && matches!(field(&info, "key_size:"), Some(12 | 36));
            if is_flow_map && field(&info, "map_id:").is_some_and(|id| seen.insert(id)) {
                flow_maps += field(&info, "memlock:").context("a map without memlock")?;
            }
        }
        anyhow::ensure!(seen.len() == 2, "steer has {} flow maps", seen.len());
        let used = steer.metric("steer_packet_streams", &[("kind", "used")])?;
        Ok(Self { descriptors, memory, flow_maps, streams: used as u64 })
    }

    /// Bytes for each stream that has come since `before`: memory of the process, flow maps, record.
    fn of_each_since(&self, before: &Self) -> Result<[u64; 3]> {
        let more = self.streams.checked_sub(before.streams).filter(|more| *more > 0);
        let more = more.context("no stream has come")?;
        let bytes = [
            self.memory.saturating_sub(before.memory),
            self.flow_maps.saturating_sub(before.flow_maps),
            more * size_of::<Record>() as u64,
        ];
        Ok(bytes.map(|bytes| bytes / more))
    }
}

const BPF_MAP_TYPE_HASH: u64 = 1;

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
