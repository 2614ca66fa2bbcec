//! The phases that are tried one after the other, and reported.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};
use steer_tests::eventually::eventually;
use steer_tests::kernels::{BULK_BYTES, BULK_STREAMS, MORE, STREAMS};
use steer_tests::netns::NetNs;
use steer_tests::sockets::State;
use steer_tests::steer::Steer;
use steer_tests::streams::{self, Client, Tally};
use steer_tests::topology::Topology;
use steer_tests::{instance, socketio, sockets};

use crate::Report;
use crate::kernel::{self, Objects};

const FRONT_PORT: u16 = 8080;
const DEVICES: [&str; 3] = ["clients", "endpoint0", "endpoint1"];
const MESSAGES: u32 = 20;
/// The number of streams that are tried without a process: a few are enough.
const FEW: u32 = 3;
/// For a guest whose host is busy.
const PATIENCE: Duration = Duration::from_secs(60);
/// For events that may not happen at all.
const SHORT: Duration = Duration::from_secs(15);

/// Starts a Steer with `splice: MODE`, opens streams through it, and stops it when the streams have
/// ended. `port` is the port of the endpoints.
pub(crate) fn carry(report: &mut Report, topology: &Topology, mode: &'static str, port: u16) -> Result<()> {
    let mut bed = Bed::start(report, topology, mode, mode, port)?;
    let (mut clients, faults) = streams::open(&topology.clients, front(), 0..STREAMS, PATIENCE);
    bed.say_opened("opened", clients.len(), &faults)?;
    bed.say_tally("echo", &streams::talk(&mut clients, MESSAGES))?;
    let some = clients.len().min(BULK_STREAMS);
    bed.say_tally("bulk", &streams::flow(&mut clients[..some], BULK_BYTES))?;
    bed.say_tally("closed", &streams::close(&mut clients))?;
    bed.end()
}

/// Kills the process while streams are open. The streams go on as far as the kernel supports that.
/// Then starts the next process.
pub(crate) fn kill(report: &mut Report, topology: &Topology, port: u16) -> Result<()> {
    let mut bed = Bed::start(report, topology, "kill", "auto", port)?;
    let (mut clients, faults) = streams::open(&topology.clients, front(), 0..STREAMS, SHORT);
    bed.say_opened("opened", clients.len(), &faults)?;
    bed.steer.stop(libc::SIGKILL)?;
    bed.say_tally("orphaned", &streams::talk(&mut clients, FEW))?;
    clients.retain(Client::is_good);
    let begin = Instant::now();
    bed.steer.start_again()?;
    bed.say("restart", json!({ "seconds": begin.elapsed().as_secs_f64() }))?;
    let adopted = bed.steer.metric("steer_streams_adopted_total", &[])?;
    bed.say("adopted", json!({ "streams": adopted }))?;
    bed.say_tally("outlived", &streams::talk(&mut clients, FEW))?;
    clients.retain(Client::is_good);
    let (mut more, faults) = streams::open(&topology.clients, front(), STREAMS..STREAMS + MORE, SHORT);
    bed.say_opened("reopened", more.len(), &faults)?;
    bed.say_tally("echo", &streams::talk(&mut more, FEW))?;
    clients.append(&mut more);
    bed.say_tally("closed", &streams::close(&mut clients))?;
    bed.end()
}

/// A Steer process, and the BPF objects that existed before it.
pub(crate) struct Bed<'r, 'n> {
    report: &'r mut Report,
    /// The namespace of Steer. `None` for the namespace of this program.
    netns: Option<&'n NetNs>,
    /// The devices of Steer's namespace that streams pass.
    devices: &'static [&'static str],
    phase: &'static str,
    endpoints: Vec<SocketAddr>,
    before: Objects,
    pub(crate) steer: Steer<'n>,
}

impl<'r, 'n> Bed<'r, 'n> {
    /// Starts endpoints at `port`, and a Steer with `splice: MODE` in front of them.
    fn start(
        report: &'r mut Report,
        topology: &'n Topology,
        phase: &'static str,
        mode: &'static str,
        port: u16,
    ) -> Result<Self> {
        let endpoints = topology.endpoint_addresses(port);
        for (netns, address) in topology.endpoints.iter().zip(&endpoints) {
            streams::serve(netns, *address)?;
        }
        Self::start_in(report, (Some(&topology.proxy), &DEVICES), [phase, mode], front(), endpoints)
    }

    /// Starts a Steer at `front` with `splice: MODE`.
    pub(crate) fn start_in(
        report: &'r mut Report,
        place: (Option<&'n NetNs>, &'static [&'static str]),
        [phase, mode]: [&'static str; 2],
        front: SocketAddr,
        endpoints: Vec<SocketAddr>,
    ) -> Result<Self> {
        let (netns, devices) = place;
        let before = Objects::now()?;
        let config =
            format!("splice: {mode}\npacket_splice:\n  linger: 1s\n{}", socketio::config(front, &endpoints));
        let begin = Instant::now();
        let steer = Steer::start(&config, netns, &[])?;
        let seconds = begin.elapsed().as_secs_f64();
        let mut bed = Self { report, netns, devices, phase, endpoints, before, steer };
        let warnings = warnings(&bed.steer.said()?);
        bed.say("start", json!({ "seconds": seconds, "warnings": warnings }))?;
        Ok(bed)
    }

    pub(crate) fn say(&mut self, kind: &str, mut finding: Value) -> Result<()> {
        finding["phase"] = self.phase.into();
        self.report.say(kind, finding)
    }

    fn say_tally(&mut self, kind: &str, tally: &Tally) -> Result<()> {
        let Tally { good, bytes, faults } = tally;
        self.say(kind, json!({ "streams": good, "bytes": bytes, "faults": faults }))
    }

    /// Reports how many streams were opened, which path carries each stream that exists, and which
    /// kernel objects exist for them.
    pub(crate) fn say_opened(&mut self, kind: &str, streams: usize, faults: &[String]) -> Result<()> {
        let carried = self.settled()?;
        let objects = self.objects()?;
        let finding = json!({ "streams": streams, "faults": faults, "carried": carried, "objects": objects });
        self.say(kind, finding)
    }

    /// The kernel objects that did not exist before this phase.
    fn objects(&self) -> Result<Value> {
        let (now, before) = (Objects::now()?, self.before);
        Ok(json!({
            "programs": now.programs.saturating_sub(before.programs),
            "maps": now.maps.saturating_sub(before.maps),
            "links": now.links.saturating_sub(before.links),
            "filters": kernel::filters(self.netns, self.devices)?.len(),
        }))
    }

    /// Waits until the path of each stream is decided. Returns how many streams each path carries,
    /// with the fallback reason if there is one.
    fn settled(&self) -> Result<BTreeMap<String, usize>> {
        let look = || {
            let rows = self.steer.flows()?;
            let relayed = rows.iter().filter(|row| row["path"] != "packet").count();
            let sockets =
                self.netns.map_or_else(|| Ok(sockets::tcp()), |netns| netns.run(sockets::tcp))??;
            let held = sockets.iter().filter(|socket| {
                socket.state == State::Connection && self.endpoints.contains(&socket.remote)
            });
            let is_open = |row: &Value| row["path"] == "relay" && row["reason"].is_null();
            let is_settled = !rows.iter().any(is_open) && held.count() <= relayed;
            Ok::<_, anyhow::Error>((rows, is_settled))
        };
        let settled = eventually("decision of what carries streams", SHORT, || {
            let (rows, is_settled) = look()?;
            Ok(is_settled.then_some(rows))
        });
        // If the decision takes too long, the present rows tell more than the error.
        let rows = settled.or_else(|_| look().map(|(rows, _)| rows))?;
        let mut carried = BTreeMap::new();
        for row in rows {
            let reason = row["reason"].as_str().map(|reason| format!(" ({reason})")).unwrap_or_default();
            *carried.entry(socketio::text(&row["path"]) + &reason).or_insert(0) += 1;
        }
        Ok(carried)
    }

    /// Waits until no stream is left, ends the process by SIGTERM, and reports what the process
    /// leaves.
    pub(crate) fn end(mut self) -> Result<()> {
        let gone = eventually("end of all streams", PATIENCE, || {
            let used = ["steer_packet_streams", "steer_source_ports"]
                .map(|metric| self.steer.metric(metric, &[("kind", "used")]));
            let [streams, ports] = used;
            Ok((self.steer.flows()?.is_empty() && streams? == 0.0 && ports? == 0.0).then_some(()))
        });
        let status = self.steer.stop(libc::SIGTERM)?;
        // The kernel frees objects a little after the last reference. Objects that remain are
        // reported.
        let _freed =
            eventually("BPF objects as before", SHORT, || Ok((Objects::now()? == self.before).then_some(())));
        let name = self.steer.instance();
        let finding = json!({
            "status": status.code(),
            "streams_ended": gone.is_ok(),
            "objects": self.objects()?,
            "pins": Path::new(instance::DIRECTORY).join(name).exists(),
            "sockets": Path::new(instance::SOCKETS).join(name).exists(),
        });
        self.say("left", finding)
    }
}

fn front() -> SocketAddr {
    SocketAddr::from((Topology::PROXY, FRONT_PORT))
}

/// The lines of a log above the level INFO, without colours.
fn warnings(log: &str) -> Vec<String> {
    let plain = log.lines().map(|line| {
        let mut parts = line.split('\x1b');
        let first = parts.next().unwrap_or_default().to_owned();
        parts.fold(first, |text, part| text + part.split_once('m').map_or("", |(_, text)| text))
    });
    plain.filter(|line| line.contains("WARN") || line.contains("ERROR")).collect()
}
