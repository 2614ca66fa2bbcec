//! The results, which `--json` writes, and which `--report` and `--check` read.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) host: Host,
    pub(crate) results: Vec<Series>,
    pub(crate) left_out: Vec<LeftOut>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Host {
    /// The start of the run, in seconds since 1970 (UTC).
    pub(crate) started: u64,
    /// The duration of the whole run.
    pub(crate) took_seconds: u64,
    /// `quick`, `standard` or `full`.
    pub(crate) profile: String,
    pub(crate) rounds: usize,
    /// The time that is measured in each round, after the warm-up.
    pub(crate) span_seconds: f64,
    pub(crate) kernel: String,
    pub(crate) cpu: String,
    pub(crate) cpus: usize,
    pub(crate) memory_bytes: u64,
    /// The limit of open descriptors that every process had.
    pub(crate) descriptors: u64,
    /// The share of the CPU time of all CPUs, over all runs that count.
    pub(crate) steal_percent: f64,
    /// Runs that were repeated because too much CPU time was stolen.
    pub(crate) repeated_runs: u64,
    /// `haproxy` -> `HAProxy version 2.6.12-1+deb12u3 ...`
    pub(crate) versions: BTreeMap<String, String>,
    /// The whole configuration of each subject.
    pub(crate) configs: BTreeMap<String, String>,
}

/// The parameters of a load: `connections`, `bytes`, `direction`, `method` ..., those that the
/// workload has.
pub(crate) type Params = BTreeMap<String, Value>;

/// One metric of one subject under one load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Series {
    /// `echo`, `bulk`, `fan_out`, `upgrades`, `polling`, `memory`, `programs`, `outlive`.
    pub(crate) workload: String,
    pub(crate) params: Params,
    /// `direct`, `steer-packet`, `steer-sockmap`, `steer-relay`, `haproxy`, `nginx`, `envoy`.
    pub(crate) subject: String,
    /// One of these:
    ///
    /// | metric | |
    /// |---|---|
    /// | `messages_per_s`, `requests_per_s`, `upgrades_per_s`, `gbit_per_s` | rate; for bulk: payload of both directions |
    /// | `p50_us`, `p99_us`, `p999_us` | latency |
    /// | `cpu_ms_per_100k`, `cpu_ms_per_gb` | machine-wide user, system and interrupt time per 100,000 operations, or 10^9 bytes |
    /// | `proxy_cpu_ms_per_100k`, `proxy_cpu_ms_per_gb` | the same minus the median of the direct connection: what the proxy adds |
    /// | `process_cpu_ms` | user and system time of the proxy's processes, per second |
    /// | `spliced_percent` | `steer-packet`: streams of the run that the kernel took over |
    /// | `splice_us` | `steer-packet`: from the 101 to the splice, median |
    /// | `bytes_per_stream`, `streams` and its parts; `ns_per_packet`, `packets_per_s` | see `memory` and `programs` |
    /// | `streams_lost`, `refused` ... | see `outlive` |
    pub(crate) metric: String,
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    /// One value for each round.
    pub(crate) runs: Vec<f64>,
    /// Share of the CPU time stolen in each run, in percent.
    pub(crate) steal_percent: Vec<f64>,
}

/// A subject that could not do a load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct LeftOut {
    pub(crate) workload: String,
    pub(crate) params: Params,
    pub(crate) subject: String,
    pub(crate) reason: String,
}

impl Report {
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&bytes)
            .with_context(|| format!("{} is not a results file of this benchmark", path.display()))
    }

    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let text = crate::report::json(self)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Every workload with its parameters, in the order of measurement.
    pub(crate) fn cases(&self) -> Vec<(&str, &Params)> {
        let measured = self.results.iter().map(|series| (series.workload.as_str(), &series.params));
        let left_out = self.left_out.iter().map(|left| (left.workload.as_str(), &left.params));
        let mut cases = Vec::new();
        for case in measured.chain(left_out) {
            if !cases.contains(&case) {
                cases.push(case);
            }
        }
        cases
    }

    /// The series of this metric, for one case and subject.
    pub(crate) fn series(&self, case: (&str, &Params), subject: &str, metric: &str) -> Option<&Series> {
        self.results.iter().find(|series| {
            (series.workload.as_str(), &series.params) == case
                && series.subject == subject
                && series.metric == metric
        })
    }
}

impl Series {
    /// Makes a series from the values of all rounds. There is at least one round. `steal_percent`
    /// has one entry for each.
    pub(crate) fn new(
        (workload, params): (&str, &Params),
        subject: &str,
        metric: &str,
        runs: Vec<f64>,
        steal_percent: Vec<f64>,
    ) -> Self {
        Self {
            workload: workload.to_owned(),
            params: params.clone(),
            subject: subject.to_owned(),
            metric: metric.to_owned(),
            median: median(&runs),
            min: runs.iter().copied().fold(f64::INFINITY, f64::min),
            max: runs.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            runs,
            steal_percent,
        }
    }
}

/// The middle value, or the mean of the two in the middle. 0 if there are no values, because JSON
/// has no NaN.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        length if length % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_between_the_halves() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
