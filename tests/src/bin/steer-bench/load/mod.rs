//! The load generator: makes connections, does one kind of work on all of them, on one thread, and measures it.

mod bulk;
mod driver;
mod echo;
mod fan_out;
mod handshake;
mod polling;
mod tally;
mod upgrades;
mod workload;

use std::io::{self, Read as _, Write as _};

use anyhow::{Context as _, Result, ensure};

use crate::machine::raise_descriptor_limit;
use crate::spec::{Load, Measured, Work};
use bulk::Bulk;
use driver::Driver;
use echo::Echo;
use fan_out::FanOut;
use polling::Polling;
use upgrades::Upgrades;
use workload::Workload;

/// Descriptors that are not for connections.
const OWN_DESCRIPTORS: u64 = 64;

/// What is echoed once on connections that are only held.
const HELD_BYTES: usize = 64;

/// Does the work and returns what happened within the span. [`Work::Hold`] prints `ready N`, has its span from there to
/// the end of standard input, and counts the connections as operations.
///
/// # Errors
/// When the run could not be made: connections were not open in time, or many failed. A few that failed are in
/// [`Measured::errors`] instead; standard error tells of the first.
pub(crate) fn run(load: &Load) -> Result<Measured> {
    ensure!(!load.targets.is_empty(), "no targets");
    match load.work {
        Work::Echo { connections, bytes, rate } => measure(load, connections, Echo::new(bytes, rate)?),
        Work::Bulk { streams, direction } => measure(load, streams, Bulk::new(direction)?),
        Work::FanOut { connections, active, bytes } => {
            measure(load, connections, FanOut::new(connections, active, bytes)?)
        }
        Work::Upgrades { parallel } => measure(load, parallel, Upgrades::new()?),
        Work::Polling { connections, bytes, method } => {
            measure(load, connections, Polling::new(bytes, method))
        }
        Work::Hold { connections } => hold(load, connections),
    }
}

fn measure(load: &Load, connections: usize, workload: impl Workload) -> Result<Measured> {
    let room = room()?;
    ensure!(connections <= room, "{connections} connections, but no more than {room} may be open");
    Driver::new(load, connections, workload)?.measure()
}

fn hold(load: &Load, connections: usize) -> Result<Measured> {
    let mut driver = Driver::new(load, connections.min(room()?), Echo::new(HELD_BYTES, None)?)?;
    let ready = driver.open_what_goes()?;
    let begin = driver.begin()?;
    let mut output = io::stdout();
    writeln!(output, "ready {ready}")
        .and_then(|()| output.flush())
        .context("cannot tell how many are held")?;
    io::stdin().read_to_end(&mut Vec::new()).context("cannot wait for the end of the input")?;
    Ok(Measured { operations: ready as u64, ..driver.end(&begin)? })
}

/// How many connections this process may have.
fn room() -> Result<usize> {
    Ok(usize::try_from(raise_descriptor_limit()?.saturating_sub(OWN_DESCRIPTORS))?)
}
