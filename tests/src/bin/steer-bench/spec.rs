//! What the runner and the load generator say to each other: one [`Load`] as JSON on the command line, one
//! [`Measured`] as JSON on standard output.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// One run of the load generator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Load {
    /// Where connections go, in turn: the proxy's listener, or the addresses of the endpoint itself.
    pub(crate) targets: Vec<SocketAddr>,
    /// Dropped from the result; connections are made and, where that is so, spliced meanwhile.
    pub(crate) warm_up_ms: u64,
    pub(crate) span_ms: u64,
    /// The processes of the proxy, whose CPU time is noted at begin and end of the span.
    pub(crate) watched: Vec<u32>,
    pub(crate) work: Work,
}

/// What is done in a run. Every connection has an `x-forwarded-for` of its own, which is what is hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Work {
    /// One message under way on each `WebSocket`: latency is from its write to the end of its echo. With `rate`, no
    /// more than so many messages a second on all together, in bursts of a millisecond.
    Echo {
        connections: usize,
        /// At least 8: a message begins with its number.
        bytes: usize,
        #[serde(default)]
        rate: Option<u32>,
    },
    /// As much as goes, in frames of 64 KiB.
    Bulk { streams: usize, direction: Way },
    /// The endpoint pushes to `active` of `connections` `WebSockets`, chosen anew each second, and again when the client
    /// has answered; latency is from the endpoint's write to the client's read (one clock: they are on one machine).
    FanOut { connections: usize, active: usize, bytes: usize },
    /// Connect, upgrade, one echo of 64 B, close; so many at a time. Latency is that of the whole.
    Upgrades { parallel: usize },
    /// HTTP requests on connections that are kept. GET: the answer has `bytes`; POST: the request has.
    Polling { connections: usize, bytes: usize, method: Method },
    /// Opens `WebSockets`, echoes once on each, prints one line `ready N` (N: how many it got), and holds them until its
    /// standard input ends.
    Hold { connections: usize },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Way {
    /// From client to endpoint.
    Upload,
    Download,
    Both,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub(crate) enum Method {
    Get,
    Post,
}

/// What happened within the span.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Measured {
    /// Messages, upgrades or requests that were completed; of bulk: 64 KiB frames.
    pub(crate) operations: u64,
    /// Payload, of both directions.
    pub(crate) bytes: u64,
    pub(crate) seconds: f64,
    pub(crate) latency: Option<Latency>,
    pub(crate) machine: MachineCpu,
    /// User and system time of the watched processes.
    pub(crate) watched_ms: f64,
    /// Connections that failed or messages that were wrong; a run with any is no measurement.
    pub(crate) errors: u64,
}

/// Microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) max: f64,
}

/// `/proc/stat`, all CPUs together, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct MachineCpu {
    pub(crate) user: f64,
    pub(crate) system: f64,
    /// irq and softirq.
    pub(crate) interrupts: f64,
    pub(crate) idle: f64,
    pub(crate) steal: f64,
}
