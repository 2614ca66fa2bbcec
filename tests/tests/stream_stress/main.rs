//! Streams through a running Steer, under stress: every byte of each is checked at both ends, and
//! in the end Steer holds nothing of them.
//!
//! All of a run follows from one seed, which is printed. To replay a run, set `STEER_STRESS_SEED` to
//! it (hexadecimal). `STEER_STRESS_STREAMS` (2400) and `STEER_STALL_SECONDS` (20) set the sizes.

mod backend;
mod footprint;
mod load;
mod pattern;
mod peer;
mod plan;
mod stall;
mod upgrade;

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{env, thread};

use anyhow::{Context as _, Result};
use steer_tests::eventually::eventually;
use steer_tests::require;
use steer_tests::steer::Steer;
use steer_tests::topology::Topology;
use tokio::io::{AsyncReadExt, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::time::timeout;

use crate::backend::Backend;
use crate::footprint::Footprint;
use crate::plan::Kind;

const MIB: u64 = 1 << 20;
const BACKEND_PORT: u16 = 3000;
const STEER_PORT: u16 = 8080;

#[test]
fn relayed_streams_arrive_whole_and_leave_nothing() -> Result<()> {
    stress("relay")
}

#[test]
fn sockmap_streams_arrive_whole_and_leave_nothing() -> Result<()> {
    stress("sockmap")
}

#[test]
fn stalled_reader_holds_memory_flat_on_the_relay() -> Result<()> {
    stall_test("relay")
}

#[test]
fn stalled_reader_holds_memory_flat_on_the_sockmap() -> Result<()> {
    stall_test("sockmap")
}

/// The control: without a proxy the same streams pass, so that what fails with one is its fault.
#[test]
fn direct_streams_arrive_whole() -> Result<()> {
    let _alone = alone();
    let seed = seed();
    runtime()?.block_on(async {
        let (backend, address) = local_backend()?;
        for kind in [Kind::Whole, Kind::Abort] {
            let outcome = load::run(address, &backend, kind, seed, 200).await;
            ensure_none(&outcome.failures)?;
        }
        Ok(())
    })
}

/// The other control: a proxy that damages, or ends in the wrong way, is found out.
#[test]
fn damaged_streams_are_noticed() -> Result<()> {
    let _alone = alone();
    let seed = seed();
    runtime()?.block_on(async {
        let (backend, address) = local_backend()?;
        for (damage, kind) in [
            (Damage::LosesAByte, Kind::Whole),
            (Damage::DoublesAByte, Kind::Whole),
            (Damage::ClosesOnHalfClose, Kind::Whole),
            (Damage::TurnsResetsIntoFins, Kind::Abort),
        ] {
            let proxy = bad_proxy(address, damage).await?;
            let outcome = load::run(proxy, &backend, kind, seed, 40).await;
            anyhow::ensure!(!outcome.failures.is_empty(), "{damage:?} was not noticed");
        }
        Ok(())
    })
}

fn stress(mode: &str) -> Result<()> {
    if !require::root() {
        return Ok(());
    }
    let _alone = alone();
    let seed = seed();
    let streams = number("STEER_STRESS_STREAMS", 2400)?;
    let topology = Topology::new(1)?;
    let bed = Bed::new(&topology, mode)?;
    // Allocators and tables grow to their working size once: the first round is not measured, but
    // has as many streams at a time as the others.
    bed.round(Kind::Whole, seed, (streams / 2).max(400))?;
    let before = bed.at_rest()?;
    bed.round(Kind::Whole, seed.wrapping_add(1), streams)?;
    bed.round(Kind::Abort, seed.wrapping_add(2), streams / 4)?;
    let after = bed.at_rest()?;
    println!("{mode}: {before:?} before, {after:?} after");
    anyhow::ensure!(after.descriptors == before.descriptors, "descriptors: {before:?}, then {after:?}");
    // Room for the allocator's fragments. If each of the standard 3,000 streams left more than 4 KiB
    // behind, it would be too small.
    let growth = after.resident_bytes.saturating_sub(before.resident_bytes);
    anyhow::ensure!(growth < 12 * MIB, "memory grew by {growth} bytes: {before:?}, then {after:?}");
    Ok(())
}

fn stall_test(mode: &str) -> Result<()> {
    if !require::root() {
        return Ok(());
    }
    let _alone = alone();
    let stalled_for = Duration::from_secs(number("STEER_STALL_SECONDS", 20)? as u64);
    let topology = Topology::new(1)?;
    let bed = Bed::new(&topology, mode)?;
    let limits = stall::Limits::new(stalled_for, footprint::largest_tcp_buffers()?);
    let report = bed.on_clients(|target, backend| stall::test(target, backend, bed.steer.pid(), limits))?;
    println!("{mode}: {report}");
    bed.at_rest()?;
    Ok(())
}

/// Steer between clients and one endpoint, each in a namespace of its own.
struct Bed<'t> {
    mode: &'t str,
    topology: &'t Topology,
    steer: Steer<'t>,
}

impl<'t> Bed<'t> {
    fn new(topology: &'t Topology, mode: &'t str) -> Result<Self> {
        let config = format!(
            "listeners:\n\
             - address: {proxy}:{STEER_PORT}\n  \
               routes:\n  \
               - match: {{ prefix: / }}\n    \
                 cluster: streams\n    \
                 hash_policy:\n    \
                 - header: {{ header_name: x-forwarded-for }}\n    \
                 upgrade_configs: [websocket]\n\
             clusters:\n\
             - name: streams\n  \
               lb_policy: ring_hash\n  \
               endpoints: [{endpoint}:{BACKEND_PORT}]\n\
             splice: {mode}\n",
            proxy = Topology::PROXY,
            endpoint = Topology::endpoint(0),
        );
        let steer = Steer::start(&config, Some(&topology.proxy), &["--log-level", "warn"])?;
        Ok(Self { mode, topology, steer })
    }

    /// Runs `work` where the clients are, with Steer's address and a new backend at the endpoint.
    fn on_clients<T: Send, F: Future<Output = Result<T>>>(
        &self,
        work: impl FnOnce(SocketAddr, Arc<Backend>) -> F + Send,
    ) -> Result<T> {
        let address = SocketAddr::from((Topology::endpoint(0), BACKEND_PORT));
        let listener = self.topology.endpoints[0].run(|| TcpListener::bind(address))?;
        let listener = listener.with_context(|| format!("binding {address}"))?;
        let target = SocketAddr::from((Topology::PROXY, STEER_PORT));
        // The runtime's threads start, and so stay, in the namespace of the thread that makes it.
        // The backend's sockets are in the namespace where its listener was made.
        self.topology
            .clients
            .run(|| runtime()?.block_on(async { work(target, Backend::start(listener)?).await }))?
    }

    /// One round of streams: all arrive as planned, on the right path, and are counted.
    fn round(&self, kind: Kind, seed: u64, streams: usize) -> Result<()> {
        let before = Counters::of(&self.steer)?;
        let started = Instant::now();
        let (outcome, paths) = thread::scope(|scope| {
            let load = scope.spawn(|| {
                self.on_clients(|target, backend| async move {
                    Ok(load::run(target, &backend, kind, seed, streams).await)
                })
            });
            let mut paths = BTreeMap::new();
            while !load.is_finished() {
                for row in self.steer.flows()? {
                    let path = row["path"].as_str().context("a flow without a path")?;
                    *paths.entry(path.to_owned()).or_insert(0_u64) += 1;
                }
                thread::sleep(Duration::from_millis(100));
            }
            let outcome = load.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            anyhow::Ok((outcome, paths))
        })?;
        let sent = outcome.bytes_to_upstream + outcome.bytes_to_downstream;
        println!(
            "{}, {kind:?}: {streams} streams, {} MB, {:?}, paths seen {paths:?}",
            self.mode,
            sent / 1_000_000,
            started.elapsed(),
        );
        for line in self.steer.admin_get("/metrics")?.body.lines() {
            if line.starts_with("steer_splice_") || line.starts_with("steer_sock_") {
                println!("  {line}");
            }
        }
        ensure_none(&outcome.failures)?;

        self.at_rest()?;
        let counted = Counters::of(&self.steer)?.since(before);
        let end = if kind == Kind::Whole { counted.finished } else { counted.reset };
        anyhow::ensure!(end == streams as f64, "of {streams} {kind:?} streams: {counted:?}");
        if kind == Kind::Whole {
            // Not all: the socket splice leaves some streams to the relay, as the counters above tell.
            let (on_path, all) = (paths.get(self.mode).copied().unwrap_or(0), paths.values().sum::<u64>());
            anyhow::ensure!(2 * on_path > all, "few streams are carried by the {}: {paths:?}", self.mode);
            let bytes = [outcome.bytes_to_upstream as f64, outcome.bytes_to_downstream as f64];
            anyhow::ensure!(counted.bytes == bytes, "{bytes:?} bytes were carried: {counted:?}");
        }
        Ok(())
    }

    /// Steer's footprint once it holds no stream, which must be soon.
    fn at_rest(&self) -> Result<Footprint> {
        const MAP_ENTRIES: &str = "steer_sock_map_entries";
        // Closing may wait for a peer's acknowledgement, and pipes are kept for a moment.
        eventually("rest of steer", Duration::from_secs(10), || {
            let streams = self.steer.flows()?.len() as f64;
            let connections = self.steer.metric("steer_downstream_connections", &[])?;
            let entries = self.steer.metric(MAP_ENTRIES, &[])?;
            Ok((streams + connections + entries == 0.0).then_some(()))
        })?;
        // A metric that is not there sums up to 0, too.
        let metrics = self.steer.admin_get("/metrics")?.body;
        let counted = metrics.lines().any(|line| line.starts_with(MAP_ENTRIES));
        anyhow::ensure!(counted || self.mode != "sockmap", "there is no {MAP_ENTRIES} in /metrics");
        let mut last = Footprint::of(self.steer.pid())?;
        eventually("the same descriptors twice", Duration::from_secs(5), || {
            thread::sleep(Duration::from_millis(200));
            let now = Footprint::of(self.steer.pid())?;
            let same = now.descriptors == last.descriptors;
            last = now;
            Ok(same.then_some(now))
        })
    }
}

/// What Steer has counted of streams.
#[derive(Debug, Clone, Copy)]
struct Counters {
    finished: f64,
    reset: f64,
    /// To upstream, to downstream.
    bytes: [f64; 2],
}

impl Counters {
    fn of(steer: &Steer<'_>) -> Result<Self> {
        let closed = |end| steer.metric("steer_streams_closed_total", &[("end", end)]);
        let bytes = |direction| steer.metric("steer_stream_bytes_total", &[("direction", direction)]);
        Ok(Self {
            finished: closed("finished")?,
            reset: closed("reset")?,
            bytes: [bytes("to_upstream")?, bytes("to_downstream")?],
        })
    }

    fn since(self, before: Self) -> Self {
        Self {
            finished: self.finished - before.finished,
            reset: self.reset - before.reset,
            bytes: [self.bytes[0] - before.bytes[0], self.bytes[1] - before.bytes[1]],
        }
    }
}

/// How [`bad_proxy`] is bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Damage {
    LosesAByte,
    DoublesAByte,
    ClosesOnHalfClose,
    TurnsResetsIntoFins,
}

/// A proxy for `target` with a fault.
async fn bad_proxy(target: SocketAddr, damage: Damage) -> Result<SocketAddr> {
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(async move {
                // Whatever happens ends the connection; that it shows is what is tested.
                let _ended = carry_badly(client, target, damage).await;
            });
        }
    });
    Ok(address)
}

async fn carry_badly(mut client: TcpStream, target: SocketAddr, damage: Damage) -> Result<()> {
    let mut backend = TcpStream::connect(target).await?;
    let (mut from_client, mut to_client) = client.split();
    let (mut from_backend, mut to_backend) = backend.split();
    let up = async {
        // Behind the request, so that it is the stream which suffers.
        let mut start = vec![0; 5_000];
        let read = read_some(&mut from_client, &mut start).await?;
        to_backend.write_all(&start[..read]).await?;
        match damage {
            Damage::LosesAByte => _ = from_client.read(&mut [0]).await?,
            Damage::DoublesAByte => to_backend.write_all(&start[read - 1..read]).await?,
            Damage::ClosesOnHalfClose | Damage::TurnsResetsIntoFins => {}
        }
        tokio::io::copy(&mut from_client, &mut to_backend).await?;
        anyhow::ensure!(damage != Damage::ClosesOnHalfClose);
        Ok(to_backend.shutdown().await?)
    };
    let down = async {
        tokio::io::copy(&mut from_backend, &mut to_client).await?;
        anyhow::ensure!(damage != Damage::ClosesOnHalfClose);
        Ok(to_client.shutdown().await?)
    };
    tokio::try_join!(up, down).map(|_| ())
}

/// Fills `buffer`, as far as bytes come.
async fn read_some(from: &mut (impl AsyncReadExt + Unpin), buffer: &mut [u8]) -> Result<usize> {
    let mut filled = 0;
    while let Ok(Ok(read)) = timeout(Duration::from_millis(300), from.read(&mut buffer[filled..])).await {
        filled += read;
        if read == 0 || filled == buffer.len() {
            break;
        }
    }
    Ok(filled)
}

fn local_backend() -> Result<(Arc<Backend>, SocketAddr)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    Ok((Backend::start(listener)?, address))
}

fn ensure_none(failures: &[String]) -> Result<()> {
    let shown = failures.iter().take(5).cloned().collect::<Vec<_>>().join("\n");
    anyhow::ensure!(failures.is_empty(), "{} streams failed; the first:\n{shown}", failures.len());
    Ok(())
}

fn runtime() -> Result<Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().context("starting a runtime")
}

/// Load and measured memory do not mix: the tests of this file take turns.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn seed() -> u64 {
    let given = env::var("STEER_STRESS_SEED").ok();
    let seed = given.map_or_else(rand::random, |hex| u64::from_str_radix(&hex, 16).expect("hex digits"));
    println!("STEER_STRESS_SEED={seed:x}");
    seed
}

fn number(variable: &str, default: usize) -> Result<usize> {
    match env::var(variable) {
        Ok(text) => text.parse().with_context(|| format!("{variable}={text}")),
        Err(_) => Ok(default),
    }
}
