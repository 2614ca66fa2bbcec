//! The kernel itself gives up streams that nobody looks after, with a timer that is pinned together
//! with its map (see [`proxy_common::expiry`]). This module starts the timer, and tells it again
//! and again that this process lives.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use aya::Ebpf;
use aya::maps::{Array, Map, MapData};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use proxy_common::abi;
use proxy_common::expiry::Expiry;

use crate::bpf::loader::{self, LoadError};
use crate::bpf::sock::maps::into_io;
use crate::grace::wait_for_rcu_readers;
use crate::tcp::clock::monotonic_ns;

/// A process that has sent no heartbeat for this long counts as gone. A busy machine keeps a
/// process waiting for a much shorter time.
const GONE_AFTER: Duration = Duration::from_secs(30);
/// The smallest input for a test run of a program: an Ethernet header.
const FRAME: [u8; 14] = [0; 14];

/// The heartbeat that tells the BPF timer that this process is alive.
pub(super) struct Heartbeat(Mutex<Held>);

struct Held {
    map: Array<MapData, Expiry>,
    value: Expiry,
}

impl fmt::Debug for Heartbeat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // aya's maps are not `Debug`.
        f.write_str("Heartbeat")
    }
}

impl Heartbeat {
    /// Sends the first heartbeat, to a map that an earlier process may have left. When this
    /// returns, the timer examines no streams any more.
    pub(super) fn begin(map: Array<MapData, Expiry>) -> io::Result<Self> {
        let before = map.get(&0, 0).map_err(into_io)?;
        let is_new = before.heartbeat_ns == 0;
        let value = if is_new { expiry(None, Duration::MAX) } else { before };
        let heartbeat = Self(Mutex::new(Held { map, value }));
        heartbeat.send()?;
        if !is_new {
            // The timer may have begun to examine streams before the heartbeat.
            wait_for_rcu_readers();
        }
        Ok(heartbeat)
    }

    /// Sends a heartbeat.
    pub(super) fn send(&self) -> io::Result<()> {
        self.change(|_| {})
    }

    /// See [`super::PacketKernel::set_limits`].
    pub(super) fn set_limits(&self, orphan_timeout: Option<Duration>, linger: Duration) -> io::Result<()> {
        self.change(|value| *value = expiry(orphan_timeout, linger))
    }

    fn change(&self, change: impl FnOnce(&mut Expiry)) -> io::Result<()> {
        // Nothing that runs under the lock leaves it half done.
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Held { map, value } = &mut *held;
        change(value);
        value.heartbeat_ns = monotonic_ns();
        map.set(0, *value, 0).map_err(into_io)
    }
}

/// Keeps the timer of the maps that are pinned in this directory from giving up streams for the
/// next seconds.
///
/// # Errors
/// There is no such timer, or its heartbeat has another form.
pub(super) fn hold_off(pins: &Path) -> io::Result<()> {
    let map = MapData::from_pin(pins.join(abi::MAP_AGEING)).and_then(Map::from_map_data);
    map.and_then(Array::try_from).map_err(into_io).and_then(Heartbeat::begin).map(drop)
}

fn expiry(orphan_timeout: Option<Duration>, linger: Duration) -> Expiry {
    let gone_after = orphan_timeout.map_or(GONE_AFTER, |timeout| timeout.min(GONE_AFTER));
    Expiry {
        heartbeat_ns: 0,
        gone_after_ns: nanoseconds(gone_after),
        orphan_timeout_ns: orphan_timeout.map_or(u64::MAX, nanoseconds),
        linger_ns: nanoseconds(linger),
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Loads the program of the timer, and starts the timer with this program. Until now the timer may
/// have run the program of an earlier process.
///
/// # Errors
/// The kernel has no such timers: before Linux 5.15, or with PREEMPT_RT.
pub(super) fn start_timer(ebpf: &mut Ebpf) -> Result<(), LoadError> {
    let name = abi::PROG_PACKET_EXPIRE;
    let program: &mut SchedClassifier = loader::program(ebpf, name)?;
    program.load().map_err(|error| loader::not_verified(name, error))?;
    let run = TestRunOptions { data_in: Some(&FRAME), ..TestRunOptions::new() };
    let result = program.test_run(run).map_err(|error| LoadError::refused(name, error))?;
    // From now on the timer keeps the program loaded.
    program.unload().map_err(|error| LoadError::refused(name, error))?;
    match result.return_value.cast_signed() {
        0 => Ok(()),
        error => Err(LoadError::refused("the timer", io::Error::from_raw_os_error(-error))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_gone_before_its_streams_are() {
        let seconds = |seconds| Duration::from_secs(seconds);
        let value = expiry(Some(seconds(3600)), seconds(60));
        assert_eq!((value.gone_after_ns, value.orphan_timeout_ns), (30_000_000_000, 3_600_000_000_000));
        assert_eq!(value.linger_ns, 60_000_000_000);
        let value = expiry(Some(seconds(5)), seconds(60));
        assert_eq!((value.gone_after_ns, value.orphan_timeout_ns), (5_000_000_000, 5_000_000_000));
        let value = expiry(None, seconds(60));
        assert_eq!((value.gone_after_ns, value.orphan_timeout_ns), (30_000_000_000, u64::MAX));
    }
}
