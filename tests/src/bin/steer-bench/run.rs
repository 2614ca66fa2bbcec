//! Runs of the load generator.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use steer_tests::eventually::eventually;
use steer_tests::process::{Orphan, Process, quiet};

use crate::lanes::Lanes;
use crate::spec::{Load, Measured, Work};
use crate::subjects::Subject;

/// The time beyond warm-up and span: for opening 5,000 `WebSockets` and closing them.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs the load generator once, in the clients' namespace.
///
/// # Errors
/// When the load generator fails or does not end in time. Failed connections and wrong messages are
/// counted in [`Measured::errors`] instead.
pub(crate) fn load(lanes: &Lanes, subject: &Subject<'_>, load: &Load) -> Result<Measured> {
    let mut process = generator(lanes, load, Stdio::null())?;
    let patience = PATIENCE + Duration::from_millis(load.warm_up_ms + load.span_ms);
    let status = process.wait(patience).with_context(|| process.tail())?;
    anyhow::ensure!(
        status.success(),
        "the load on {} failed ({status}):\n{}",
        subject.kind(),
        process.tail()
    );
    // Prints the failures of single connections.
    eprint!("{}", process.stderr()?);
    let output = process.stdout()?;
    serde_json::from_str(&output).with_context(|| format!("the load generator printed {output}"))
}

/// Idle `WebSockets` through a subject. They stay open until the guard is dropped.
#[derive(Debug)]
pub(crate) struct Held {
    /// How many `WebSockets` are open. Fewer than were asked for if the subject takes no more.
    pub(crate) connections: usize,
    _generator: Process,
}

impl Held {
    /// Opens `connections` and waits until each has echoed once.
    pub(crate) fn open(lanes: &Lanes, subject: &Subject<'_>, connections: usize) -> Result<Self> {
        let load = subject.load(Work::Hold { connections }, Duration::ZERO, Duration::ZERO)?;
        let mut generator = generator(lanes, &load, Stdio::piped())?;
        let connections = eventually("held WebSockets", PATIENCE, || {
            generator.ensure_running()?;
            let output = generator.stdout()?;
            Ok(output.lines().find_map(|line| line.strip_prefix("ready ")?.trim().parse().ok()))
        });
        let connections = connections.with_context(|| generator.tail())?;
        Ok(Self { connections, _generator: generator })
    }
}

fn generator(lanes: &Lanes, load: &Load, stdin: Stdio) -> Result<Process> {
    let mut command: Command = quiet(std::env::current_exe().context("cannot find steer-bench")?);
    command.arg("load").arg(serde_json::to_string(load)?).stdin(stdin);
    // Several generators may run at the same time, each with its own output file.
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let name = format!("load-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
    Process::start(&name, command, lanes.directory(), Some(&lanes.clients), Orphan::Dies)
}
