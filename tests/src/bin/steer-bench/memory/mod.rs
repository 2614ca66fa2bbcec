//! The memory of an idle `WebSocket`: in the proxy's process, in its BPF maps, and in the kernel
//! for its sockets.
//!
//! Each subject is started and measured without `WebSockets`. Then more and more `WebSockets` are
//! opened. The subject is measured again each time its memory has stopped changing, and the growth
//! since the first measurement is divided by their number. The clients and the endpoint are on the
//! same machine. The direct connection, which needs no other sockets, tells what their sockets take
//! in the kernel.
//!
//! The memory per stream includes what the first streams make a process allocate once.
//! `further_stream_bytes` does not include that: it is the growth from one level to the next,
//! divided by the number of new streams.
//!
//! A hash map counts by the growth that streams cause. The packet splice allocates the array of
//! records once, for `max_streams`, so this array counts by the records in use. The size of all
//! maps without streams is a metric of its own.

mod footprint;

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;
use steer_tests::eventually::eventually;
use steer_tests::netns::NetNs;

use self::footprint::Footprint;
use crate::lanes::{Endpoint, Lanes};
use crate::machine;
use crate::plan::Profile;
use crate::results::{Params, Series};
use crate::rounds::{Outcome, go_on};
use crate::run::Held;
use crate::subjects::{Kind, Programs, Subject};

/// How many `WebSockets` one process of clients holds. It has descriptors for only a few more.
const OF_ONE_PROCESS: usize = 15_000;
/// Descriptors that a proxy needs in addition to those of its streams.
const SPARE_DESCRIPTORS: usize = 300;
/// The level at which the direct connection tells the memory of the clients' and the endpoint's
/// sockets.
const DIRECT: Level = Level::Number(5000);
/// Memory counts as settled if it changes by no more than this many bytes for each stream, or by no
/// more than `OTHERS` bytes, which other processes may cause.
const STILL: f64 = 8.0;
const OTHERS: f64 = 65_536.0;
const INTERVAL: Duration = Duration::from_millis(250);
const SETTLES_WITHIN: Duration = Duration::from_secs(30);
const SPLICED_WITHIN: Duration = Duration::from_secs(30);
const ENDS_WITHIN: Duration = Duration::from_secs(60);

/// How many `WebSockets` are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Number(usize),
    /// As many as the descriptors allow.
    Most,
}

/// The size of the measurement.
struct Extent {
    rounds: usize,
    levels: &'static [Level],
    /// At [`Level::Most`], the number of streams for a proxy that needs no descriptors for them.
    enough: usize,
    /// How long the memory must not change. Allocators give memory back late.
    rest: Duration,
    /// The limit for each process.
    descriptors: usize,
}

impl Extent {
    fn of(profile: Profile) -> Result<Self> {
        const ALL: &[Level] = &[Level::Number(1000), Level::Number(5000), Level::Most];
        let (rounds, levels, enough, rest): (_, &[Level], _, _) = match profile {
            Profile::Quick => (1, &[Level::Number(1000), Level::Number(5000)], 0, 1),
            Profile::Standard => (1, ALL, 15_000, 3),
            Profile::Full => (3, ALL, 30_000, 5),
        };
        let descriptors = usize::try_from(machine::raise_descriptor_limit()?)?;
        Ok(Self { rounds, levels, enough, rest: Duration::from_secs(rest), descriptors })
    }

    /// The number of `WebSockets` that `kind` holds at `level`.
    fn number(&self, kind: Kind, level: Level) -> usize {
        let each_worker = self.descriptors.saturating_sub(SPARE_DESCRIPTORS) / 2;
        match (level, kind) {
            (Level::Number(number), _) => number,
            (Level::Most, Kind::SteerPacket) => self.enough,
            // HAProxy reserves descriptors for the pipes of `option splice-auto`: one pipe for
            // every four streams.
            (Level::Most, Kind::Haproxy) => each_worker * 4 / 5,
            // Each of the two workers has its own descriptors, but the kernel does not distribute
            // connections evenly.
            (Level::Most, Kind::Nginx) => 2 * each_worker * 4 / 5,
            (Level::Most, _) => each_worker,
        }
    }
}

/// Measures each of `kinds` that is a proxy, and the direct connection for comparison.
///
/// Starts endpoints and subjects itself. No other endpoint or subject may be running.
///
/// # Errors
/// When the user interrupts the measurement, or the endpoint does not start. A subject that fails
/// is left out, with the reason.
pub(crate) fn run(lanes: &Lanes, programs: &Programs, kinds: &[Kind], profile: Profile) -> Result<Outcome> {
    let extent = Extent::of(profile)?;
    let _endpoint = Endpoint::start_three(lanes)?;
    for kind in kinds {
        without_remains(&lanes.of(*kind)?.netns)?;
    }
    without_remains(&lanes.clients)?;
    without_remains(&lanes.endpoint)?;
    let mut outcome = Outcome::default();
    let mut values = Values::default();
    for round in 1..=extent.rounds {
        let mut direct = Vec::new();
        if let Err(error) = hold(lanes, programs, Kind::Direct, &[DIRECT], &extent, &mut direct) {
            // Without this number, the proxies' share of the kernel's memory is not known.
            outcome.leave_out(("memory", &params(DIRECT)), Kind::Direct, &error);
            break;
        }
        let ends = direct.first().map_or(0.0, |seen| seen.growth(|footprint| footprint.kernel));
        for kind in kinds.iter().filter(|kind| **kind != Kind::Direct) {
            go_on()?;
            eprintln!("memory {round}/{} {kind}", extent.rounds);
            let mut all = Vec::new();
            if let Err(error) = hold(lanes, programs, *kind, extent.levels, &extent, &mut all) {
                let level = extent.levels.get(all.len()).copied().unwrap_or(Level::Most);
                outcome.leave_out(("memory", &params(level)), *kind, &error);
            }
            values.add(*kind, &all, ends);
        }
    }
    outcome.series = values.series();
    Ok(outcome)
}

/// Otherwise the remains of a subject's connections would disappear during the next measurement.
fn without_remains(netns: &NetNs) -> Result<()> {
    netns.sysctl("net.ipv4.tcp_max_tw_buckets", "0")
}

fn params(level: Level) -> Params {
    let connections = match level {
        Level::Number(number) => json!(number),
        Level::Most => json!("most"),
    };
    Params::from([("connections".to_owned(), connections)])
}

/// The memory with `streams` idle `WebSockets`, and the memory before the first one.
struct Seen {
    level: Level,
    streams: usize,
    before: Footprint,
    now: Footprint,
}

impl Seen {
    /// By how many bytes `part` has grown for each stream.
    fn growth(&self, part: impl Fn(&Footprint) -> u64) -> f64 {
        (part(&self.now) as f64 - part(&self.before) as f64) / self.streams as f64
    }
}

/// Starts a subject and measures it without `WebSockets` and at each level. Appends to `seen` for
/// each level that it reached.
fn hold(
    lanes: &Lanes,
    programs: &Programs,
    kind: Kind,
    levels: &[Level],
    extent: &Extent,
    seen: &mut Vec<Seen>,
) -> Result<()> {
    let subject = Subject::start(kind, lanes, programs)?;
    let at_rest = [footprint::sockets(&lanes.clients)?, footprint::sockets(&lanes.endpoint)?];
    let reached = climb(lanes, &subject, levels, extent, seen);
    // Waits while the subject can still pass on the ends of the streams. Remains would count as
    // memory of the next subject.
    let ended = eventually("end of the WebSockets", ENDS_WITHIN, || {
        let now = [footprint::sockets(&lanes.clients)?, footprint::sockets(&lanes.endpoint)?];
        Ok(now.iter().zip(&at_rest).all(|(now, at_rest)| now <= at_rest).then_some(()))
    });
    if let Err(error) = ended {
        eprintln!("sockets of {kind} remain and may count for the next subject: {error:#}");
    }
    reached
}

/// Opens more and more `WebSockets`, and closes them all at the end.
fn climb(
    lanes: &Lanes,
    subject: &Subject<'_>,
    levels: &[Level],
    extent: &Extent,
    seen: &mut Vec<Seen>,
) -> Result<()> {
    let before = settled(subject, 0, extent.rest)?;
    let mut held: Vec<Held> = Vec::new();
    let mut streams = 0;
    for level in levels {
        let number = extent.number(subject.kind(), *level);
        while streams < number {
            let asked = (number - streams).min(OF_ONE_PROCESS);
            let opened = Held::open(lanes, subject, asked)?;
            streams += opened.connections;
            anyhow::ensure!(opened.connections == asked, "{streams} of {number} WebSockets were opened");
            held.push(opened);
        }
        wait_until_spliced(subject, streams)?;
        let now = settled(subject, streams, extent.rest)?;
        seen.push(Seen { level: *level, streams, before: before.clone(), now });
    }
    Ok(())
}

/// Waits until the kernel has all streams. Returns at once for a subject that splices no packets.
fn wait_until_spliced(subject: &Subject<'_>, streams: usize) -> Result<()> {
    let (Kind::SteerPacket, Some(steer)) = (subject.kind(), subject.steer()) else { return Ok(()) };
    eventually("splice of every stream", SPLICED_WITHIN, || {
        let spliced = steer.metric("steer_streams", &[("path", "packet")])?;
        Ok((spliced == streams as f64).then_some(()))
    })
}

/// Measures until nothing has changed for `rest`, or prints that the memory still changes.
fn settled(subject: &Subject<'_>, streams: usize, rest: Duration) -> Result<Footprint> {
    let begin = Instant::now();
    let (mut since, mut bytes) = (begin, Footprint::of(subject)?.all());
    loop {
        thread::sleep(INTERVAL);
        let now = Footprint::of(subject)?;
        if now.all().abs_diff(bytes) as f64 > OTHERS.max(STILL * streams as f64) {
            (since, bytes) = (Instant::now(), now.all());
        }
        if since.elapsed() >= rest {
            return Ok(now);
        }
        if begin.elapsed() >= SETTLES_WITHIN {
            eprintln!("the memory of {} is still changing", subject.kind());
            return Ok(now);
        }
    }
}

/// A value of each round, by level, subject and metric.
#[derive(Default)]
struct Values(BTreeMap<(Level, Kind, &'static str), Vec<f64>>);

impl Values {
    /// `ends`: bytes of kernel memory for the sockets of one client and of the endpoint, per
    /// stream.
    fn add(&mut self, kind: Kind, all: &[Seen], ends: f64) {
        let mut less: Option<(usize, f64)> = None;
        for seen in all {
            let process = seen.growth(|footprint| footprint.process);
            let maps = seen.growth(Footprint::maps_in_use);
            // The entries of hash maps are among the kernel's objects, but `maps` has already
            // counted them.
            let entries = seen.growth(|footprint| footprint.maps);
            // Streams free no memory. A value below zero means that the sockets of clients and
            // endpoint took less memory than with the direct connection. Such a value must not hide
            // memory that the proxy takes.
            let kernel = (seen.growth(|footprint| footprint.kernel) - entries - ends).max(0.0);
            let each = process + maps + kernel;
            let metrics = [
                ("bytes_per_stream", each),
                ("process_bytes_per_stream", process),
                ("map_bytes_per_stream", maps),
                ("kernel_bytes_per_stream", kernel),
                ("sockets_per_stream", seen.growth(|footprint| footprint.sockets)),
                ("streams", seen.streams as f64),
                ("idle_process_bytes", seen.before.process as f64),
                ("idle_map_bytes", seen.before.maps as f64),
            ];
            let grown = each * seen.streams as f64;
            let further = less.map(|(streams, bytes)| (grown - bytes) / (seen.streams - streams) as f64);
            less = Some((seen.streams, grown));
            for (metric, value) in
                metrics.into_iter().chain(further.map(|value| ("further_stream_bytes", value)))
            {
                self.0.entry((seen.level, kind, metric)).or_default().push(value);
            }
        }
    }

    fn series(self) -> Vec<Series> {
        let series = |((level, kind, metric), runs): ((Level, Kind, &str), Vec<f64>)| {
            // These values do not depend on stolen CPU time.
            Series::new(("memory", &params(level)), kind.name(), metric, runs, Vec::new())
        };
        self.0.into_iter().map(series).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_streams_add_counts_once() {
        let before = Footprint { process: 5000, maps: 10_000, ..Footprint::default() };
        let at = |streams: u64| Footprint {
            // 2000 once, and 100 for each stream.
            process: 7000 + 100 * streams,
            maps: 10_000 + 160 * streams,
            records: 320 * streams,
            // Entries of maps, the sockets of clients and endpoint, and 7 of the proxy.
            kernel: (160 + 4000 + 7) * streams,
            sockets: 0,
        };
        let seen = [10, 20].map(|streams| Seen {
            level: Level::Number(streams),
            streams,
            before: before.clone(),
            now: at(streams as u64),
        });
        let mut values = Values::default();
        values.add(Kind::SteerPacket, &seen, 4000.0);
        let of =
            |level, metric| values.0.get(&(Level::Number(level), Kind::SteerPacket, metric)).map(|it| it[0]);
        assert_eq!(of(10, "process_bytes_per_stream"), Some(300.0));
        assert_eq!(of(10, "map_bytes_per_stream"), Some(480.0));
        assert_eq!(of(10, "kernel_bytes_per_stream"), Some(7.0));
        assert_eq!(of(10, "bytes_per_stream"), Some(787.0));
        assert_eq!(of(10, "further_stream_bytes"), None);
        assert_eq!(of(20, "bytes_per_stream"), Some(687.0));
        assert_eq!(of(20, "further_stream_bytes"), Some(587.0));
        assert_eq!(of(20, "idle_map_bytes"), Some(10_000.0));

        let mut values = Values::default();
        values.add(Kind::SteerPacket, &seen[1..], 5000.0);
        let (_, bytes) = values.0.iter().find(|((_, _, metric), _)| *metric == "bytes_per_stream").unwrap();
        assert_eq!(bytes[0], 200.0 + 480.0);
    }
}
