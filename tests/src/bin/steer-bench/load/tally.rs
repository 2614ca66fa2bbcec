//! Counts what was done within the span.

use anyhow::{Context as _, Result};
use hdrhistogram::Histogram;

use crate::machine::{Cpu, monotonic_ns, process_ms};
use crate::spec::{Latency, Measured};

/// The longest latency that the histogram can hold, in nanoseconds.
const LONGEST: u64 = 60_000_000_000;

pub(super) struct Tally {
    recording: bool,
    operations: u64,
    bytes: u64,
    /// In nanoseconds, to three digits.
    latency: Histogram<u64>,
}

/// The clocks at the start of the span.
pub(super) struct Begin {
    pub(super) at: u64,
    machine: Cpu,
    watched_ms: f64,
}

impl Tally {
    pub(super) fn new() -> Result<Self> {
        let latency = Histogram::new_with_bounds(1, LONGEST, 3).context("no histogram")?;
        Ok(Self { recording: false, operations: 0, bytes: 0, latency })
    }

    /// Counts an operation that took from `since` to `now` and moved `bytes` of payload.
    pub(super) fn done(&mut self, since: u64, now: u64, bytes: usize) {
        if self.recording {
            self.latency.saturating_record(now.saturating_sub(since));
            self.count(1, bytes);
        }
    }

    /// Counts operations whose latency is not known.
    pub(super) fn count(&mut self, operations: u64, bytes: usize) {
        if self.recording {
            self.operations += operations;
            self.bytes += bytes as u64;
        }
    }

    pub(super) fn begin(&mut self, watched: &[u32]) -> Result<Begin> {
        self.recording = true;
        Ok(Begin { watched_ms: sum_ms(watched)?, machine: Cpu::now()?, at: monotonic_ns() })
    }

    pub(super) fn end(&mut self, begin: &Begin, watched: &[u32], errors: u64) -> Result<Measured> {
        let (now, machine, watched_ms) = (monotonic_ns(), Cpu::now()?, sum_ms(watched)?);
        self.recording = false;
        let us = |ns: u64| ns as f64 / 1000.0;
        let latency = (!self.latency.is_empty()).then(|| Latency {
            p50: us(self.latency.value_at_quantile(0.5)),
            p99: us(self.latency.value_at_quantile(0.99)),
            p999: us(self.latency.value_at_quantile(0.999)),
            max: us(self.latency.max()),
        });
        Ok(Measured {
            operations: self.operations,
            bytes: self.bytes,
            seconds: (now - begin.at) as f64 / 1e9,
            latency,
            machine: machine.since(&begin.machine),
            watched_ms: watched_ms - begin.watched_ms,
            errors,
        })
    }
}

fn sum_ms(processes: &[u32]) -> Result<f64> {
    processes.iter().map(|pid| process_ms(*pid)).sum()
}
