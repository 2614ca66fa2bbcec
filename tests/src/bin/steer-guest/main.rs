//! The program that the suite `kernels` runs in a virtual machine, on another kernel than the
//! host's. It runs Steer between network namespaces, with streams through Steer, and compares every
//! byte. Each finding is a line of JSON. The test on the host judges the findings.
//!
//! `steer-guest REPORT PHASES`: REPORT is the file for the findings. PHASES are names with commas
//! between them, or `wire`.

mod kernel;
mod phases;
mod wire;

use std::fs::{File, OpenOptions};
use std::io::Write as _;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use steer_tests::topology::Topology;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let usage = "usage: steer-guest REPORT PHASES";
    let mut report = Report::open(&args.next().context(usage)?)?;
    let phases = args.next().context(usage)?;
    if let Err(error) = run(&mut report, &phases) {
        report.say("error", json!({ "text": format!("{error:#}") }))?;
    }
    report.say("done", json!({}))
}

fn run(report: &mut Report, phases: &str) -> Result<()> {
    report.say("kernel", json!({ "release": kernel::release()? }))?;
    if phases == "wire" {
        return wire::carry(report);
    }
    let topology = Topology::new(2)?;
    // Endpoints run until the end, so each phase uses its own port.
    for (port, phase) in (3000..).zip(phases.split(',')) {
        match phase {
            "auto" => phases::carry(report, &topology, "auto", port)?,
            "sockmap" => phases::carry(report, &topology, "sockmap", port)?,
            "kill" => phases::kill(report, &topology, port)?,
            other => anyhow::bail!("there is no phase {other}"),
        }
    }
    report.say("log", json!({ "complaints": kernel::complaints()? }))
}

/// The file for the findings.
#[derive(Debug)]
struct Report(File);

impl Report {
    fn open(path: &str) -> Result<Self> {
        let file = OpenOptions::new().append(true).open(path);
        file.map(Self).with_context(|| format!("cannot open {path}"))
    }

    /// Adds the finding `kind` with the fields of `finding`, which is a JSON object.
    fn say(&mut self, kind: &str, mut finding: Value) -> Result<()> {
        finding["finding"] = kind.into();
        writeln!(self.0, "{finding}").context("cannot report")
    }
}
