//! The load generator. On one thread, it makes connections, does one kind of work on all of them,
//! and measures it.

mod bulk;
mod driver;
mod echo;
mod fan_out;
pub(crate) mod handshake;
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

/// Bytes of the message that is echoed once on connections that are only held.
const HELD_BYTES: usize = 64;

/// Does the work and returns what happened within the span. [`Work::Hold`] prints `ready N`. Its
/// span begins there and ends with standard input, and its operations are the connections.
///
/// # Errors
/// When the connections were not open in time, or many of them failed. A few failures are counted
/// in [`Measured::errors`], and standard error has the first ones.
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
    ensure!(connections <= room, "{connections} connections were asked for, but at most {room} may be open");
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

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::thread;

    use steer_tests::eventually::eventually;
    use steer_tests::steer::free_address;

    use super::*;
    use crate::serve;
    use crate::spec::{Method, Way};

    /// An endpoint that serves until the process of the test ends.
    fn endpoint() -> Result<SocketAddr> {
        let address = free_address()?;
        thread::spawn(move || serve::run(&[address.port()]).expect("a free port"));
        eventually("the endpoint", std::time::Duration::from_secs(5), || {
            Ok(std::net::TcpStream::connect(address).ok())
        })?;
        Ok(address)
    }

    #[test]
    fn every_kind_of_work_moves_something_and_nothing_fails() -> Result<()> {
        let target = endpoint()?;
        let works = [
            Work::Echo { connections: 20, bytes: 8, rate: None },
            Work::Echo { connections: 3, bytes: 100_000, rate: None },
            Work::Echo { connections: 20, bytes: 64, rate: Some(2000) },
            Work::Bulk { streams: 2, direction: Way::Upload },
            Work::Bulk { streams: 2, direction: Way::Download },
            Work::Bulk { streams: 2, direction: Way::Both },
            Work::FanOut { connections: 20, active: 3, bytes: 64 },
            Work::Upgrades { parallel: 5 },
            Work::Polling { connections: 5, bytes: 200, method: Method::Get },
            Work::Polling { connections: 5, bytes: 100_000, method: Method::Post },
        ];
        for work in works {
            let watched = vec![std::process::id()];
            let load = Load { targets: vec![target], warm_up_ms: 10, span_ms: 100, watched, work };
            let measured = run(&load).with_context(|| format!("{work:?}"))?;
            assert_eq!(measured.errors, 0, "{work:?}");
            assert!(measured.operations > 0, "{work:?}: {measured:?}");
            assert!(measured.watched_ms > 0.0, "{work:?}: {measured:?}");
        }
        Ok(())
    }

    #[test]
    fn connections_that_fail_are_errors() -> Result<()> {
        let nobody = free_address()?;
        let work = Work::Echo { connections: 3, bytes: 64, rate: None };
        let load = Load { targets: vec![nobody], warm_up_ms: 0, span_ms: 10, watched: Vec::new(), work };
        assert_eq!(run(&load)?.errors, 3);
        Ok(())
    }
}
