//! How the machine and its processes spent their CPU time.

use std::fs;
use std::io;

use anyhow::{Context as _, Result};

use crate::spec::MachineCpu;

/// `/proc/stat` at one moment, in ticks of `CLK_TCK` since boot, summed over all CPUs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cpu {
    user: u64,
    system: u64,
    interrupts: u64,
    idle: u64,
    steal: u64,
}

impl Cpu {
    /// # Errors
    /// When `/proc/stat` cannot be read or does not have the form of proc(5).
    pub(crate) fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        let line = text.lines().next().unwrap_or_default();
        Self::parse(line).with_context(|| format!("/proc/stat begins with {line:?}"))
    }

    /// `cpu  user nice system idle iowait irq softirq steal guest guest_nice`; `user` includes
    /// `guest`.
    fn parse(line: &str) -> Option<Self> {
        let mut ticks = line.strip_prefix("cpu ")?.split_whitespace().map(str::parse);
        let mut next = || ticks.next()?.ok();
        let (user, nice, system, idle, iowait): (u64, u64, _, u64, u64) =
            (next()?, next()?, next()?, next()?, next()?);
        let (irq, softirq, steal): (u64, u64, _) = (next()?, next()?, next()?);
        Some(Self { user: user + nice, system, interrupts: irq + softirq, idle: idle + iowait, steal })
    }

    /// The time that was spent since `before`.
    pub(crate) fn since(&self, before: &Self) -> MachineCpu {
        // The kernel's idle time may go back by a tick.
        let ms = |now: u64, before: u64| now.saturating_sub(before) as f64 * 1000.0 / ticks_per_second();
        MachineCpu {
            user: ms(self.user, before.user),
            system: ms(self.system, before.system),
            interrupts: ms(self.interrupts, before.interrupts),
            idle: ms(self.idle, before.idle),
            steal: ms(self.steal, before.steal),
        }
    }
}

fn ticks_per_second() -> f64 {
    // SAFETY: sysconf has no preconditions.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    ticks as f64
}

/// The CPU time that process `pid` has used since its start, in milliseconds. It includes all
/// threads, also those that have ended. It is read from the CPU clock of the process, which does
/// not count in ticks.
///
/// # Errors
/// When there is no such process.
pub(crate) fn process_ms(pid: u32) -> Result<f64> {
    let pid_t = libc::pid_t::try_from(pid).context("not a process id")?;
    let mut clock = 0;
    // SAFETY: `clock` is valid memory for the clock's id.
    let error = unsafe { libc::clock_getcpuclockid(pid_t, &raw mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error))
            .with_context(|| format!("process {pid} has no CPU clock"));
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid memory for a timespec.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error())
            .with_context(|| format!("cannot read the CPU time of process {pid}"));
    }
    Ok(time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 / 1e6)
}

/// Nanoseconds of `CLOCK_MONOTONIC`, the same in all processes of the machine.
pub(crate) fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid memory for a timespec. The clock always exists, so the call cannot
    // fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    // The time since boot is not negative.
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

/// Raises this process' limit of descriptors to the hard limit, and returns it.
///
/// # Errors
/// When the limit can be neither read nor set.
pub(crate) fn raise_descriptor_limit() -> Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is valid memory for an rlimit.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error()).context("cannot read the limit of descriptors");
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is a valid rlimit.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        return Err(io::Error::last_os_error()).context("cannot raise the limit of descriptors");
    }
    Ok(limit.rlim_max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_line_of_all_cpus() {
        let before = Cpu::parse("cpu  10 1 20 300 4 5 6 7 8 9").expect("a line of proc(5)");
        let after = Cpu::parse("cpu  110 1 40 300 4 15 6 8 8 9").expect("a line of proc(5)");
        let tick = 1000.0 / ticks_per_second();
        let expected = MachineCpu {
            user: 100.0 * tick,
            system: 20.0 * tick,
            interrupts: 10.0 * tick,
            idle: 0.0,
            steal: tick,
        };
        assert_eq!(after.since(&before), expected);
        assert!(Cpu::parse("cpu0 1 2 3 4 5 6 7 8").is_none());
        assert!(Cpu::parse("cpu  1 2 3").is_none());
    }

    #[test]
    fn the_time_of_a_process_grows_while_it_works() {
        let own = || process_ms(std::process::id()).expect("this process exists");
        let before = own();
        while own() <= before {}
    }
}
