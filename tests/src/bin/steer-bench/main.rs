//! The benchmark that `cargo xtask bench` runs. It measures Steer on each of its paths, a direct
//! connection, HAProxy, nginx and Envoy, under the same load, in turns within one run.
//!
//! The runner lays out the network (`lanes`), starts the subjects (`subjects`) and works through
//! the plan (`plan`, `rounds`). The load (`load`, `watch`) and the endpoint (`serve`) are separate
//! processes. The runner starts them from this same binary inside their namespaces, so that their
//! descriptors and their CPU time are separate from the runner's.

mod bpf;
mod check;
mod collect;
mod head;
mod host;
mod lanes;
mod link;
mod load;
mod machine;
mod memory;
mod outlive;
mod plan;
mod programs;
mod progress;
mod report;
mod results;
mod rounds;
mod run;
mod serve;
mod spec;
mod spliced;
mod subjects;
mod table;
mod watch;
mod ws;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};
use steer_tests::require::is_root;

use crate::lanes::{Endpoint, Lanes};
use crate::plan::{Plan, Profile, Size};
use crate::progress::Progress;
use crate::results::Report;
use crate::rounds::{INTERRUPTED, Outcome, Rounds};
use crate::subjects::{Kind, Programs, Subject};

#[derive(Debug, Parser)]
#[command(
    name = "steer-bench",
    about = "Steer beside a direct connection, HAProxy, nginx and Envoy, in one run",
    args_conflicts_with_subcommands = true
)]
struct Cli {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    part: Option<Part>,
}

#[derive(Debug, Args)]
struct Options {
    /// The cases that say most, within four minutes
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// More and longer rounds, for numbers to publish
    #[arg(long)]
    full: bool,
    /// Only cases whose names begin so: echo, echo/100x64, bulk, fan_out, upgrades, polling,
    /// memory, programs, outlive
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Only these beside the direct connection: steer-packet, steer-sockmap, steer-relay, haproxy,
    /// nginx, envoy
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = kind)]
    peers: Vec<Kind>,
    /// Rounds of each case
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    rounds: Option<u16>,
    /// What is measured in each round, after its warm-up
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    span_ms: Option<u64>,
    /// A setting of the clients' host, for example net.ipv4.tcp_timestamps=0, as Windows has it
    #[arg(long, value_name = "NAME=VALUE", value_parser = setting, conflicts_with = "report")]
    client_sysctl: Vec<(String, String)>,
    /// Write the results
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Make the plots and tables under docs/ from these results, or from those of FILE without
    /// measuring
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    report: Option<Option<PathBuf>>,
    /// Compare with the results in FILE; regressions are printed and make the exit code 1
    #[arg(long, value_name = "FILE")]
    check: Option<PathBuf>,
}

/// The parts that run as separate processes.
#[derive(Debug, Subcommand)]
enum Part {
    /// One run of the load generator
    #[command(hide = true)]
    Load { json: String },
    /// The endpoint that all subjects connect to
    #[command(hide = true)]
    Serve { ports: Vec<u16> },
    /// The streams and connections of the outlive cases, which meet restarts
    #[command(hide = true)]
    Watch { targets: Vec<SocketAddr> },
}

fn kind(name: &str) -> Result<Kind, String> {
    let names = || Kind::ALL.map(Kind::name).join(", ");
    Kind::named(name).ok_or_else(|| format!("there is no subject {name}; there are: {}", names()))
}

fn setting(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

fn main() -> ExitCode {
    let Cli { options, part } = Cli::parse();
    let done = match part {
        Some(Part::Load { json }) => load_once(&json),
        Some(Part::Serve { ports }) => serve::run(&ports).map(|()| ExitCode::SUCCESS),
        Some(Part::Watch { targets }) => watch::run(&targets).map(|()| ExitCode::SUCCESS),
        None => bench(&options),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn load_once(json: &str) -> Result<ExitCode> {
    let load = serde_json::from_str(json).context("the argument does not describe a load")?;
    println!("{}", serde_json::to_string(&load::run(&load)?)?);
    Ok(ExitCode::SUCCESS)
}

fn bench(options: &Options) -> Result<ExitCode> {
    let root =
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the package has no parent directory")?;
    if let Some(Some(stored)) = &options.report {
        report::write(&Report::read(stored)?, root)?;
        return Ok(ExitCode::SUCCESS);
    }
    // Reads the stored results first, so that an error in them shows before an hour of measuring.
    let stored = options.check.as_deref().map(Report::read).transpose()?;
    let plan = options.plan()?;
    let report = measure(&plan)?;
    if let Some(path) = &options.json {
        report.write(path)?;
    }
    print!("{}", table::render(&report));
    if options.report.is_some() {
        report::write(&report, root)?;
    }
    Ok(stored.map_or(ExitCode::SUCCESS, |stored| say_regressions(&stored, &report)))
}

fn say_regressions(stored: &Report, now: &Report) -> ExitCode {
    let verdict = check::compare(stored, now);
    verdict.regressions.iter().for_each(|line| println!("REGRESSION {line}"));
    println!("{} ratios compared, {} regressions", verdict.compared, verdict.regressions.len());
    if verdict.regressions.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

impl Options {
    fn plan(&self) -> Result<Plan> {
        let profile = match (self.quick, self.full) {
            (true, _) => Profile::Quick,
            (_, true) => Profile::Full,
            _ => Profile::Standard,
        };
        let mut size = Size::of(profile);
        size.rounds = self.rounds.map_or(size.rounds, usize::from);
        size.span = self.span_ms.map_or(size.span, Duration::from_millis);
        let plan = Plan::new(profile, size, &self.only, &self.peers)?;
        Ok(Plan { client_settings: self.client_sysctl.clone(), ..plan })
    }
}

fn measure(plan: &Plan) -> Result<Report> {
    anyhow::ensure!(
        is_root(),
        "the benchmark makes network namespaces and loads BPF programs, which needs root. Run:\n  \
         sudo env \"PATH=$PATH\" \"HOME=$HOME\" cargo xtask bench"
    );
    let begin = Instant::now();
    stop_between_runs()?;
    // Children inherit the limit.
    let descriptors = machine::raise_descriptor_limit()?;
    let found = Programs::find()?;
    let lanes = Lanes::new(&plan.subjects)?;
    for (name, value) in &plan.client_settings {
        lanes.clients.sysctl(name, value)?;
    }

    let endpoint = Endpoint::start(&lanes)?;
    let start = |kind: &Kind| Subject::start(*kind, &lanes, &found);
    let subjects = plan.subjects.iter().map(start).collect::<Result<Vec<_>>>()?;
    let mut host = host::describe(plan, &found, &subjects, descriptors)?;
    let progress = Progress::new(plan.runs(), plan.duration());
    let mut rounds = Rounds { plan, lanes: &lanes, subjects, descriptors, progress };
    let mut outcome = rounds.run()?;
    let packet = rounds.subjects.iter().find(|subject| subject.kind() == Kind::SteerPacket);
    if let Some(packet) = packet.filter(|_| plan.programs) {
        outcome.add(programs::run(&lanes, packet, plan.profile)?);
    }
    drop((rounds, endpoint));
    if plan.memory {
        outcome.add(memory::run(&lanes, &found, &plan.subjects, plan.profile)?);
    }
    outcome.add(outlive::run(&lanes, &found, (&plan.subjects, &plan.outlive), plan.profile)?);

    let Outcome { series: results, left_out, repeated_runs } = outcome;
    let steal: Vec<_> = results.iter().flat_map(|series| &series.steal_percent).copied().collect();
    host.steal_percent = steal.iter().sum::<f64>() / steal.len().max(1) as f64;
    host.repeated_runs = repeated_runs;
    host.took_seconds = begin.elapsed().as_secs();
    Ok(Report { host, results, left_out })
}

/// Makes SIGINT and SIGTERM end the benchmark between two runs, so that all processes and
/// namespaces are removed.
fn stop_between_runs() -> Result<()> {
    extern "C" fn interrupt(_signal: libc::c_int) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let handler = interrupt as extern "C" fn(libc::c_int) as libc::sighandler_t;
        // SAFETY: the handler only stores an atomic, which is safe at any moment. Children do not
        // inherit the handler over exec.
        let before = unsafe { libc::signal(signal, handler) };
        anyhow::ensure!(before != libc::SIG_ERR, std::io::Error::last_os_error());
    }
    Ok(())
}
