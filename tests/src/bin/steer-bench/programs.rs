//! The time that each BPF program of the packet splice takes for a packet, under load. The kernel
//! measures it (`kernel.bpf_stats_enabled`). The measurement itself adds some tens of nanoseconds
//! to each packet.
//!
//! A packet is what a program sees: with the default offloads of veth, up to 64 KiB of a bulk
//! stream.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use aya::sys::{Stats, enable_stats};
use serde_json::json;

use crate::bpf;
use crate::collect::Run;
use crate::lanes::Lanes;
use crate::plan::Profile;
use crate::results::{Params, Series};
use crate::rounds::{Outcome, go_on};
use crate::run;
use crate::spec::{Way, Work};
use crate::subjects::{Kind, Subject};

const WARM_UP: Duration = Duration::from_millis(500);
/// The least time from the start of the load generator to the first reading, and from the last
/// reading to the end of the span. The generator starts and opens its streams in this time.
const MARGIN: Duration = Duration::from_millis(200);

const LOADS: [(&str, Work); 5] = [
    ("echo 64 B", Work::Echo { connections: 100, bytes: 64, rate: None }),
    ("echo 512 B", Work::Echo { connections: 100, bytes: 512, rate: None }),
    ("echo 4 KiB", Work::Echo { connections: 100, bytes: 4096, rate: None }),
    ("bulk, 1 stream", Work::Bulk { streams: 1, direction: Way::Download }),
    ("bulk, 8 streams", Work::Bulk { streams: 8, direction: Way::Both }),
];

/// Puts load on `subject`, which is [`Kind::SteerPacket`]. The endpoint is running.
///
/// # Errors
/// When the user interrupts the measurement, or the kernel does not count. A load that fails is
/// left out, with the reason.
pub(crate) fn run(lanes: &Lanes, subject: &Subject<'_>, profile: Profile) -> Result<Outcome> {
    let (rounds, span) = match profile {
        Profile::Quick => (1, Duration::from_secs(1)),
        Profile::Standard => (3, Duration::from_secs(1)),
        Profile::Full => (5, Duration::from_secs(2)),
    };
    // The kernel counts until this descriptor is closed.
    let _counting = enable_stats(Stats::RunTime).context("the kernel does not count the time of programs")?;
    let mut outcome = Outcome::default();
    let mut values: BTreeMap<(usize, String), Vec<Value>> = BTreeMap::new();
    for round in 1..=rounds {
        for (index, (load, work)) in LOADS.into_iter().enumerate() {
            go_on()?;
            eprintln!("programs {round}/{rounds} {load}");
            match once(lanes, subject, work, span) {
                Ok(programs) => programs
                    .into_iter()
                    .for_each(|(program, value)| values.entry((index, program)).or_default().push(value)),
                Err(error) => {
                    let params = Params::from([("load".to_owned(), json!(load))]);
                    outcome.leave_out(("programs", &params), subject.kind(), &error);
                }
            }
        }
    }
    for ((index, program), values) in values {
        outcome.series.extend(series(LOADS[index].0, &program, &values));
    }
    Ok(outcome)
}

/// The result of one run.
struct Value {
    ns_per_packet: f64,
    packets_per_s: f64,
    steal_percent: f64,
}

/// Puts load on the subject once, and reads the counters of its programs twice meanwhile. Programs
/// without packets are left out.
fn once(lanes: &Lanes, subject: &Subject<'_>, work: Work, span: Duration) -> Result<Vec<(String, Value)>> {
    let pid = subject.steer().context("only Steer has BPF programs")?.pid();
    let load = subject.load(work, WARM_UP, span)?;
    let (counts, measured) = thread::scope(|scope| {
        let looks = scope.spawn(|| -> Result<_> {
            thread::sleep(WARM_UP + MARGIN);
            let before = counts(pid)?;
            thread::sleep(span - 2 * MARGIN);
            Ok((before, counts(pid)?))
        });
        // The kernel kills the generator when the thread that started it ends, so this thread
        // starts it.
        let measured = run::load(lanes, subject, &load);
        (looks.join(), measured)
    });
    let (before, after) =
        counts.map_err(|_| anyhow::anyhow!("the thread that reads the programs' counters panicked"))??;
    let run = Run { measured: measured?, spliced_percent: None, splice_us: None };
    anyhow::ensure!(run.measured.errors == 0, "{} connections or messages failed", run.measured.errors);
    subject.wait_until_quiet(lanes)?;
    let value = |(program, after): (String, Count)| {
        let before = before.get(&program)?;
        let packets = (after.runs > before.runs).then(|| (after.runs - before.runs) as f64)?;
        let value = Value {
            ns_per_packet: (after.time - before.time).as_nanos() as f64 / packets,
            packets_per_s: packets / (after.at - before.at).as_secs_f64(),
            steal_percent: run.steal_percent(),
        };
        Some((program, value))
    };
    Ok(after.into_iter().filter_map(value).collect())
}

/// The counters of a program since the program was loaded.
struct Count {
    at: Instant,
    runs: u64,
    time: Duration,
}

/// The counters, by name of the program.
fn counts(pid: u32) -> Result<BTreeMap<String, Count>> {
    let count = |program: aya::programs::ProgramInfo| {
        let name = program.name_as_str().unwrap_or("?").to_owned();
        (name, Count { at: Instant::now(), runs: program.run_count(), time: program.run_time() })
    };
    Ok(bpf::programs_of(pid)?.into_iter().map(count).collect())
}

fn series(load: &str, program: &str, values: &[Value]) -> [Series; 2] {
    let params = Params::from([("load".to_owned(), json!(load)), ("program".to_owned(), json!(program))]);
    let of = |metric, value: fn(&Value) -> f64| {
        let (runs, steal) = values.iter().map(|it| (value(it), it.steal_percent)).unzip();
        Series::new(("programs", &params), Kind::SteerPacket.name(), metric, runs, steal)
    };
    [of("ns_per_packet", |it| it.ns_per_packet), of("packets_per_s", |it| it.packets_per_s)]
}
