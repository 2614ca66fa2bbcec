//! Steer between clients and one endpoint, each in its own namespace.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::future::Future;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use steer_tests::eventually::eventually;
use steer_tests::process::quiet;
use steer_tests::sockets::{self, State};
use steer_tests::steer::{Steer, binary};
use steer_tests::topology::Topology;

use crate::backend::Backend;
use crate::footprint::{Footprint, ThreadTime};
use crate::load::{self, Load, Outcome};
use crate::plan::Kind;
use crate::{ensure_none, runtime};

const BACKEND_PORT: u16 = 3000;

/// The configuration of the packet splice. The hand-over is at a random moment, so mostly in full
/// flow. The record is freed soon after the end.
const PACKET: &str = "packet_splice:\n  hand_over_after: 0s\n  hand_over_within: 40ms\n  linger: 1s\n";

/// Half of the time after which a stream [hangs](load::run), and a little later.
const STUCK_AFTER: [Duration; 2] = [Duration::from_secs(30), Duration::from_secs(40)];

/// The IP versions of the two connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
    /// Clients have IPv4, and the endpoint has IPv6.
    V4ToV6,
    /// The other way.
    V6ToV4,
}

impl Family {
    pub(crate) const ALL: [Self; 4] = [Self::V4, Self::V6, Self::V4ToV6, Self::V6ToV4];

    fn proxy(self) -> IpAddr {
        match self {
            Self::V4 | Self::V4ToV6 => Topology::PROXY.into(),
            Self::V6 | Self::V6ToV4 => Topology::PROXY6.into(),
        }
    }

    fn endpoint(self) -> IpAddr {
        match self {
            Self::V4 | Self::V6ToV4 => Topology::endpoint(0).into(),
            Self::V6 | Self::V4ToV6 => Topology::endpoint6(0).into(),
        }
    }

    /// Each has a port of its own.
    fn front(self, port: u16) -> SocketAddr {
        SocketAddr::new(self.proxy(), port + 100 * self as u16)
    }
}

pub(crate) struct Bed<'t> {
    mode: &'t str,
    topology: &'t Topology,
    pub(crate) steer: Steer<'t>,
    port: u16,
}

impl<'t> Bed<'t> {
    /// `mode` is a value of `splice`. Each bed of a topology has its own `port`.
    pub(crate) fn new(topology: &'t Topology, mode: &'t str, port: u16) -> Result<Self> {
        let listener = |family: Family| {
            let address = family.front(port);
            format!(
                "- address: '{address}'\n  \
                   routes:\n  \
                   - match: {{ prefix: / }}\n    \
                     cluster: {family:?}\n    \
                     hash_policy:\n    \
                     - header: {{ header_name: x-forwarded-for }}\n    \
                     upgrade_configs: [websocket]\n"
            )
        };
        let cluster = |family: Family| {
            let address = SocketAddr::new(family.endpoint(), BACKEND_PORT);
            format!("- name: {family:?}\n  lb_policy: ring_hash\n  endpoints: ['{address}']\n")
        };
        let config = format!(
            "listeners:\n{}clusters:\n{}splice: {mode}\n{}",
            Family::ALL.map(listener).concat(),
            Family::ALL.map(cluster).concat(),
            if mode == "packet" { PACKET } else { "" },
        );
        let steer = Steer::start(&config, Some(&topology.proxy), &["--log-level", "warn"])?;
        Ok(Self { mode, topology, steer, port })
    }

    /// Runs `work` in the clients' namespace, with Steer's address and a new backend at the
    /// endpoint.
    pub(crate) fn on_clients<T: Send, F: Future<Output = Result<T>>>(
        &self,
        family: Family,
        work: impl FnOnce(SocketAddr, Arc<Backend>) -> F + Send,
    ) -> Result<T> {
        let listener = self.listener(family)?;
        let target = family.front(self.port);
        self.at(listener, |backend| work(target, backend))
    }

    /// Runs the same streams without Steer, on the [direct path](Topology::route_directly).
    pub(crate) fn without_steer(&self, family: Family, load: Load) -> Result<Outcome> {
        let listener = self.listener(family)?;
        let target = listener.local_addr()?;
        let outcome =
            self.at(listener, |backend| async move { Ok(load::run(target, &backend, load).await) })?;
        println!("direct, {family:?}: {} streams, longest gap {:?}", load.streams, outcome.longest_gap());
        ensure_none(&outcome.failures)?;
        Ok(outcome)
    }

    fn listener(&self, family: Family) -> Result<TcpListener> {
        let address = SocketAddr::new(family.endpoint(), BACKEND_PORT);
        let listener = self.topology.endpoints[0].run(|| TcpListener::bind(address))?;
        listener.with_context(|| format!("binding {address}"))
    }

    fn at<T: Send, F: Future<Output = Result<T>>>(
        &self,
        listener: TcpListener,
        work: impl FnOnce(Arc<Backend>) -> F + Send,
    ) -> Result<T> {
        // The runtime's threads start in the namespace of the thread that makes the runtime, and
        // stay there. The backend's sockets are in the namespace in which its listener was made.
        self.topology.clients.run(|| runtime()?.block_on(async { work(Backend::start(listener)?).await }))?
    }

    /// One round of streams, which must all arrive as planned and be counted. Returns how the
    /// streams went, and how often each path was seen.
    pub(crate) fn round(&self, family: Family, load: Load) -> Result<Round> {
        let Load { kind, streams, .. } = load;
        let before = Counters::of(&self.steer)?;
        let time_before = ThreadTime::of(self.steer.pid())?;
        let started = Instant::now();
        let (outcome, paths) = thread::scope(|scope| {
            let running = scope.spawn(|| {
                self.on_clients(family, |target, backend| async move {
                    Ok(load::run(target, &backend, load).await)
                })
            });
            let mut paths = BTreeMap::new();
            let mut looks = STUCK_AFTER.iter().peekable();
            while !running.is_finished() {
                if looks.next_if(|after| started.elapsed() > **after).is_some() {
                    self.print_stuck(started.elapsed());
                }
                for row in self.steer.flows()? {
                    let path = row["path"].as_str().context("the row of a stream does not have a path")?;
                    *paths.entry(path.to_owned()).or_insert(0_u64) += 1;
                }
                thread::sleep(Duration::from_millis(100));
            }
            let outcome = running.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            anyhow::Ok((outcome, paths))
        })?;
        let slowdown = ThreadTime::of(self.steer.pid())?.slowdown_since(time_before);
        let sent = outcome.bytes_to_upstream + outcome.bytes_to_downstream;
        println!(
            "{}, {family:?}, {kind:?}: {streams} streams, {} MB, {:?}, longest gap {:?}, paths seen {paths:?}",
            self.mode,
            sent / 1_000_000,
            started.elapsed(),
            outcome.longest_gap(),
        );
        ensure_none(&outcome.failures)?;

        self.at_rest()?;
        let counted = Counters::of(&self.steer)?.since(before);
        let end = if kind == Kind::Whole { counted.finished } else { counted.reset };
        anyhow::ensure!(end == streams as f64, "of {streams} {kind:?} streams: {counted:?}");
        if kind == Kind::Whole {
            let bytes = [outcome.bytes_to_upstream as f64, outcome.bytes_to_downstream as f64];
            anyhow::ensure!(counted.bytes == bytes, "{bytes:?} bytes were carried: {counted:?}");
        }
        Ok(Round { outcome, paths, counted, slowdown })
    }

    /// Prints what is known of streams that take suspiciously long: the sockets of both peers, and the records of
    /// Steer. Two prints show what still moves.
    fn print_stuck(&self, elapsed: Duration) {
        println!("after {elapsed:?} there are still streams; records: {}", records());
        if let Err(error) = self.print_metrics() {
            println!("{error:#}");
        }
        for netns in self.topology.all() {
            let sockets = netns.run(|| quiet("ss").args(["-tneiH"]).output());
            match sockets {
                Ok(Ok(output)) => println!("{}: {}", netns.name(), String::from_utf8_lossy(&output.stdout)),
                failed => println!("{}: {failed:?}", netns.name()),
            }
        }
    }

    /// Prints what Steer has counted for the paths.
    pub(crate) fn print_metrics(&self) -> Result<()> {
        const SHOWN: [&str; 4] = ["steer_splice_", "steer_sock_", "steer_packet_", "steer_hand_overs_"];
        for line in self.steer.admin_get("/metrics")?.body.lines() {
            if SHOWN.iter().any(|name| line.starts_with(name)) && !line.ends_with(" 0") {
                println!("  {line}");
            }
        }
        Ok(())
    }

    /// Steer's footprint when it holds no stream any more, which must be soon.
    pub(crate) fn at_rest(&self) -> Result<Footprint> {
        // A close may wait for a peer's acknowledgement. Pipes are kept for a moment. The packet
        // splice keeps a record and a port for the `linger` in `PACKET`.
        let held = Cell::default();
        eventually("rest of steer", Duration::from_secs(10), || {
            held.set(Held::by(&self.steer)?);
            Ok((held.get() == Held::default()).then_some(()))
        })
        .with_context(|| format!("Steer still holds {:?}\n{}", held.get(), records()))?;
        // The sum of a metric that does not exist is 0, too.
        let metrics = self.steer.admin_get("/metrics")?.body;
        for name in match self.mode {
            "sockmap" => &["steer_sock_map_entries"][..],
            "packet" => &["steer_packet_streams", "steer_source_ports"],
            _ => &[],
        } {
            anyhow::ensure!(metrics.lines().any(|line| line.starts_with(name)), "there is no {name}");
        }
        self.ensure_no_sockets()?;
        let mut last = Footprint::of(self.steer.pid())?;
        eventually("the same descriptors twice", Duration::from_secs(5), || {
            thread::sleep(Duration::from_millis(200));
            let now = Footprint::of(self.steer.pid())?;
            let same = now.descriptors == last.descriptors;
            last = now;
            Ok(same.then_some(now))
        })
    }

    /// Checks that neither Steer nor the kernel on its behalf has a connection with a client or an
    /// endpoint.
    fn ensure_no_sockets(&self) -> Result<()> {
        eventually("end of the proxy's sockets", Duration::from_secs(10), || {
            let mut open = self.topology.proxy.run(sockets::tcp)??;
            open.retain(|tuple| tuple.state == State::Connection && !tuple.local.ip().is_loopback());
            Ok(open.is_empty().then_some(()))
        })
    }
}

/// The records of the packet splice, to show the state of those that remain.
fn records() -> String {
    let shown = binary().and_then(|steer| Ok(quiet(steer).args(["flows", "--json"]).output()?));
    shown.map_or_else(
        |error| format!("{error:#}"),
        |output| String::from_utf8_lossy(&output.stdout).into_owned(),
    )
}

/// What Steer holds for streams that exist, or have just ended.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Held {
    flows: usize,
    connections: f64,
    sock_entries: f64,
    packet_records: f64,
    source_ports: f64,
}

impl Held {
    fn by(steer: &Steer<'_>) -> Result<Self> {
        Ok(Self {
            flows: steer.flows()?.len(),
            connections: steer.metric("steer_downstream_connections", &[])?,
            sock_entries: steer.metric("steer_sock_map_entries", &[])?,
            packet_records: steer.metric("steer_packet_streams", &[("kind", "used")])?,
            source_ports: steer.metric("steer_source_ports", &[("kind", "used")])?,
        })
    }
}

/// How a round went.
pub(crate) struct Round {
    pub(crate) outcome: Outcome,
    pub(crate) paths: BTreeMap<String, u64>,
    pub(crate) counted: Counters,
    /// How many times longer Steer took than on processors of its own.
    pub(crate) slowdown: f64,
}

/// What Steer has counted for streams.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Counters {
    finished: f64,
    reset: f64,
    /// Bytes to upstream, and to downstream.
    bytes: [f64; 2],
    /// Streams that were handed over to the kernel.
    pub(crate) hand_overs: f64,
    pub(crate) failed_hand_overs: f64,
    /// Streams that were relayed because the peers differ in TCP timestamps.
    pub(crate) timestamps_differ: f64,
}

impl Counters {
    fn of(steer: &Steer<'_>) -> Result<Self> {
        let closed = |end| steer.metric("steer_streams_closed_total", &[("end", end)]);
        let bytes = |direction| steer.metric("steer_stream_bytes_total", &[("direction", direction)]);
        let hand_overs = |how| steer.metric("steer_hand_overs_total", &[("how", how)]);
        Ok(Self {
            finished: closed("finished")?,
            reset: closed("reset")?,
            bytes: [bytes("to_upstream")?, bytes("to_downstream")?],
            hand_overs: hand_overs("quiet")? + hand_overs("busy")?,
            failed_hand_overs: hand_overs("failed")?,
            timestamps_differ: steer
                .metric("steer_splice_fallback_total", &[("reason", "timestamps_differ")])?,
        })
    }

    fn since(self, before: Self) -> Self {
        Self {
            finished: self.finished - before.finished,
            reset: self.reset - before.reset,
            bytes: [self.bytes[0] - before.bytes[0], self.bytes[1] - before.bytes[1]],
            hand_overs: self.hand_overs - before.hand_overs,
            failed_hand_overs: self.failed_hand_overs - before.failed_hand_overs,
            timestamps_differ: self.timestamps_differ - before.timestamps_differ,
        }
    }
}
