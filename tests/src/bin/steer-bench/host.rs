//! The machine and its software, as the results describe them.

use std::collections::BTreeMap;
use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};

use crate::plan::Plan;
use crate::results::Host;
use crate::subjects::{Programs, Subject};

/// What is known before the first run.
pub(crate) fn describe(
    plan: &Plan,
    programs: &Programs,
    subjects: &[Subject<'_>],
    descriptors: u64,
) -> Result<Host> {
    let mut versions = BTreeMap::new();
    let mut configs = BTreeMap::new();
    for subject in subjects {
        let name = subject.kind().name().to_owned();
        if let Some(version) = programs.version(subject.kind())? {
            configs.insert(name.clone(), subject.config().to_owned());
            versions.insert(name, version);
        }
    }
    Ok(Host {
        started: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        took_seconds: 0,
        profile: plan.profile.name().to_owned(),
        rounds: plan.size.rounds,
        span_seconds: plan.size.span.as_secs_f64(),
        kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        cpu: field(&read("/proc/cpuinfo")?, "model name")
            .unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        cpus: std::thread::available_parallelism().context("cannot count the processors")?.get(),
        memory_bytes: memory_bytes(&read("/proc/meminfo")?).context("/proc/meminfo has no MemTotal")?,
        descriptors,
        steal_percent: 0.0,
        repeated_runs: 0,
        versions,
        configs,
    })
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {path}"))
}

/// The value of the first line `NAME : VALUE`.
fn field(text: &str, name: &str) -> Option<String> {
    let value = |line: &str| {
        line.strip_prefix(name)?.trim_start().strip_prefix(':').map(str::trim).map(str::to_owned)
    };
    text.lines().find_map(value)
}

fn memory_bytes(text: &str) -> Option<u64> {
    field(text, "MemTotal")?.strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// A host for tests.
#[cfg(test)]
pub(crate) fn nowhere() -> Host {
    Host {
        started: 0,
        took_seconds: 0,
        profile: "quick".to_owned(),
        rounds: 5,
        span_seconds: 1.0,
        kernel: "6.18".to_owned(),
        cpu: "a processor".to_owned(),
        cpus: 2,
        memory_bytes: 1 << 30,
        descriptors: 1024,
        steal_percent: 0.0,
        repeated_runs: 0,
        versions: BTreeMap::new(),
        configs: BTreeMap::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found() {
        assert_eq!(
            field("a\t: x\nmodel name\t: Some CPU @ 2 GHz\n", "model name").unwrap(),
            "Some CPU @ 2 GHz"
        );
        assert_eq!(memory_bytes("MemTotal:       16 kB\nMemFree: 3 kB\n"), Some(16_384));
    }
}
