//! What a process and the host hold, from /proc.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// What a process holds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Footprint {
    pub(crate) descriptors: usize,
    pub(crate) resident_bytes: u64,
}

impl Footprint {
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).context("reading a status")?;
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).context("listing descriptors")?.count();
        Ok(Self { descriptors, resident_bytes: field(&status, "VmRSS:")? })
    }
}

/// The time of a process's threads, together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ThreadTime {
    running: Duration,
    /// Ready to run, while all processors ran others.
    waiting: Duration,
}

impl ThreadTime {
    /// Reads /proc/PID/task/*/schedstat (Documentation/scheduler/sched-stats.rst).
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let mut time = Self { running: Duration::ZERO, waiting: Duration::ZERO };
        for task in fs::read_dir(format!("/proc/{pid}/task")).context("listing threads")? {
            // The thread may have ended meanwhile.
            let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
            let mut fields = text.split_whitespace().map(|ns| ns.parse().map(Duration::from_nanos));
            time.running += fields.next().context("no time of running")??;
            time.waiting += fields.next().context("no time of waiting")??;
        }
        Ok(time)
    }

    /// How many times longer the process's work has taken since `before` than on processors of its
    /// own.
    pub(crate) fn slowdown_since(self, before: Self) -> f64 {
        let running = self.running.saturating_sub(before.running).as_secs_f64();
        let waiting = self.waiting.saturating_sub(before.waiting).as_secs_f64();
        if running > 0.0 { 1.0 + waiting / running } else { 1.0 }
    }
}

/// The memory that the host can still give to processes, in bytes.
pub(crate) fn memory_available() -> Result<u64> {
    field(&fs::read_to_string("/proc/meminfo").context("reading meminfo")?, "MemAvailable:")
}

/// The largest receive and send buffers that TCP may choose in this namespace, in bytes.
pub(crate) fn largest_tcp_buffers() -> Result<[u64; 2]> {
    let largest = |name: &str| {
        let text = fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).context("reading a limit")?;
        text.split_whitespace()
            .nth(2)
            .and_then(|max| max.parse().ok())
            .context("the limit does not have a maximum")
    };
    Ok([largest("tcp_rmem")?, largest("tcp_wmem")?])
}

/// The value of a line of the form `name 123 kB`, in bytes.
fn field(text: &str, name: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().with_context(|| format!("{name}{line}"))?;
    Ok(kib * 1024)
}
