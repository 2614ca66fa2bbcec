//! What happens to `WebSockets` and to new connections when a proxy is reloaded, restarted or
//! killed.
//!
//! Each subject is started anew for each event, and carries the streams and connections of `watch`.
//! Two windows of the same length are compared: one before the event, and one that begins with the
//! event.

mod daemon;
mod watcher;

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;

use self::daemon::Daemon;
use self::watcher::Watcher;
use crate::lanes::{Endpoint, Lanes};
use crate::machine::Cpu;
use crate::plan::Profile;
use crate::results::{Params, Series};
use crate::rounds::{Outcome, go_on};
use crate::subjects::{Kind, Programs};
use crate::watch::Window;

pub(crate) const WORKLOAD: &str = "outlive";

const STREAMS: usize = 1000;
/// For [`Event::Reloads`]: the number of reloads, and the time between two of them.
const RELOADS: usize = 5;
const BETWEEN: Duration = Duration::from_secs(2);
const WINDOW: Duration = Duration::from_secs(4);
/// How long after the end of the event's window the subject is measured again. By then replaced
/// processes have reached their limit.
const LATER: Duration = Duration::from_secs(daemon::LIMIT as u64 - 1);

/// What happens to a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// A new process of the same configuration replaces the old one without refusing connections.
    /// The old process has a few seconds to end.
    Reload,
    /// Several reloads, with new streams before each. The old processes have only their own time
    /// limits.
    Reloads,
    /// SIGTERM, and a new process after the old one has ended, as `systemctl restart` does.
    Restart,
    /// SIGKILL to all processes of the subject, and a new process.
    Kill,
}

impl Event {
    pub(crate) const ALL: [Self; 4] = [Self::Reload, Self::Reloads, Self::Restart, Self::Kill];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Reload => "outlive/reload",
            Self::Reloads => "outlive/reloads",
            Self::Restart => "outlive/restart",
            Self::Kill => "outlive/kill",
        }
    }

    fn params(self) -> Params {
        let name = self.name().trim_start_matches("outlive/");
        Params::from([("event".to_owned(), json!(name)), ("connections".to_owned(), json!(STREAMS))])
    }
}

/// Does each of `events` to each of `kinds`. Starts the endpoint and the subjects; none may be
/// running.
///
/// # Errors
/// When the user interrupts the measurement, or the endpoint does not start. A subject that fails
/// is left out, with the reason.
pub(crate) fn run(
    lanes: &Lanes,
    programs: &Programs,
    (kinds, events): (&[Kind], &[Event]),
    profile: Profile,
) -> Result<Outcome> {
    let rounds = if profile == Profile::Full { 3 } else { 1 };
    let _endpoint = Endpoint::start(lanes)?;
    let mut outcome = Outcome::default();
    for event in events {
        for kind in kinds {
            let mut runs = Vec::new();
            for round in 1..=rounds {
                go_on()?;
                eprintln!("{} {round}/{rounds} {kind}", event.name());
                match once(lanes, programs, *kind, *event) {
                    Ok(run) => runs.push(run),
                    Err(error) => outcome.leave_out((WORKLOAD, &event.params()), *kind, &error),
                }
            }
            outcome.series.extend(series(*event, *kind, &runs));
        }
    }
    Ok(outcome)
}

/// The result of one run: metrics by name, and the share of the machine's time that was stolen.
struct Run {
    values: BTreeMap<&'static str, f64>,
    steal_percent: f64,
}

fn once(lanes: &Lanes, programs: &Programs, kind: Kind, event: Event) -> Result<Run> {
    let mut daemon = Daemon::start(kind, lanes, programs, event)?;
    let mut watcher = Watcher::start(lanes, &lanes.of(kind)?.targets())?;
    let share = if event == Event::Reloads { STREAMS / RELOADS } else { STREAMS };
    watcher.open(&daemon, share)?;
    watcher.window()?;
    let cpu = Cpu::now()?;
    thread::sleep(WINDOW);
    let quiet = watcher.window()?;
    let begin = Instant::now();
    daemon.undergo(event)?;
    if event == Event::Reloads {
        for _ in 1..RELOADS {
            thread::sleep(BETWEEN);
            watcher.open(&daemon, share)?;
            daemon.undergo(event)?;
        }
    }
    thread::sleep(WINDOW.saturating_sub(begin.elapsed()));
    let at_event = watcher.window()?;
    let (processes, memory) = (daemon.processes()?.len(), daemon.memory()?);
    thread::sleep(LATER);
    let later = watcher.window()?;
    let machine = Cpu::now()?.since(&cpu);
    drop(watcher);

    let longest = |window: &Window| window.latency.map_or(0.0, |latency| latency.max / 1e3);
    let p99 = |window: &Window| window.latency.map_or(0.0, |latency| latency.p99 / 1e3);
    let (before, probes) = (quiet.lost + quiet.wrong, &at_event.probes);
    anyhow::ensure!(before == 0, "{before} streams were lost before the event");
    let values = BTreeMap::from([
        ("streams_lost", at_event.lost as f64),
        ("streams_lost_later", later.lost as f64),
        ("streams_wrong", (at_event.wrong + later.wrong) as f64),
        ("refused", probes.refused as f64),
        ("failed", (probes.reset + probes.failed) as f64),
        ("slow", probes.slow as f64),
        ("served", probes.served as f64),
        ("unserved_ms", probes.unserved_ms),
        ("longest_gap_ms", longest(&at_event)),
        ("quiet_longest_gap_ms", longest(&quiet)),
        ("echo_p99_ms", p99(&at_event)),
        ("quiet_echo_p99_ms", p99(&quiet)),
        ("processes", processes as f64),
        ("process_mib", memory as f64 / 1_048_576.0),
    ]);
    let all = machine.user + machine.system + machine.interrupts + machine.idle + machine.steal;
    Ok(Run { values, steal_percent: machine.steal / all.max(1.0) * 100.0 })
}

fn series(event: Event, kind: Kind, runs: &[Run]) -> Vec<Series> {
    let Some(first) = runs.first() else { return Vec::new() };
    let of = |metric: &'static str| {
        let (values, steal) = runs.iter().map(|run| (run.values[metric], run.steal_percent)).unzip();
        Series::new((WORKLOAD, &event.params()), kind.name(), metric, values, steal)
    };
    first.values.keys().map(|metric| of(metric)).collect()
}
