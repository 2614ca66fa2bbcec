//! What is measured, as `--json` writes it and `--report` and `--check` read it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) host: Host,
    pub(crate) results: Vec<Series>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Host {
    /// Seconds since 1970, UTC, at the start.
    pub(crate) started: u64,
    /// `--quick`, `--full`, or neither.
    pub(crate) profile: String,
    pub(crate) kernel: String,
    pub(crate) cpu: String,
    pub(crate) cpus: usize,
    pub(crate) memory_bytes: u64,
    /// Of the time of all CPUs, over all runs that count.
    pub(crate) steal_percent: f64,
    /// Runs that were repeated because too much was stolen.
    pub(crate) repeated_runs: u64,
    /// `haproxy` -> `2.6.12-1+deb12u3` ...
    pub(crate) versions: BTreeMap<String, String>,
    /// The configuration of each subject, whole.
    pub(crate) configs: BTreeMap<String, String>,
}

/// One metric of one subject under one load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Series {
    /// `echo`, `bulk`, `fan_out`, `upgrades`, `polling`, `memory`, `programs`.
    pub(crate) workload: String,
    /// `connections`, `bytes`, `direction`, `method` ..., as far as the workload has them.
    pub(crate) params: BTreeMap<String, Value>,
    /// `direct`, `steer-packet`, `steer-sockmap`, `steer-relay`, `haproxy`, `nginx`, `envoy`.
    pub(crate) subject: String,
    /// `messages_per_s`, `p50_us`, `p99_us`, `p999_us`, `gbit_per_s`, `cpu_ms_per_100k`, `cpu_ms_per_gb`,
    /// `proxy_cpu_ms` (of its process, per second), `requests_per_s`, `upgrades_per_s`, `splice_us`,
    /// `bytes_per_stream`, `streams`, `ns_per_packet`, `packets_per_s`.
    pub(crate) metric: String,
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    /// By round.
    pub(crate) runs: Vec<f64>,
    /// Share of the CPU time stolen in each run, in percent.
    pub(crate) steal_percent: Vec<f64>,
}
