//! What the runner and the load generator exchange: one [`Load`] as JSON on the command line, one
//! [`Measured`] as JSON on standard output.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// One run of the load generator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Load {
    /// The addresses to which connections go, in turn: the proxy's listener, or the endpoint's own
    /// addresses.
    pub(crate) targets: Vec<SocketAddr>,
    /// Time before the span that the result does not include. Connections are opened in it and,
    /// with a splice, handed over.
    pub(crate) warm_up_ms: u64,
    pub(crate) span_ms: u64,
    /// The processes of the proxy. Their CPU time is read at the start and the end of the span.
    pub(crate) watched: Vec<u32>,
    pub(crate) work: Work,
}

/// The work of a run. Every connection has its own `x-forwarded-for`, which the proxies hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Work {
    /// One message is under way on each `WebSocket`. Latency is the time from its write to the end
    /// of its echo. With `rate`, all `WebSockets` together send at most so many messages a second,
    /// in bursts of a millisecond.
    Echo {
        connections: usize,
        /// At least 8, because a message begins with its number.
        bytes: usize,
        #[serde(default)]
        rate: Option<u32>,
    },
    /// As many bytes as possible, in frames of 64 KiB.
    Bulk { streams: usize, direction: Way },
    /// The endpoint pushes to `active` of `connections` `WebSockets`, which it chooses anew each
    /// second. It pushes again when the client has answered. Latency is the time from the
    /// endpoint's write to the client's read. Both are on one machine and use one clock.
    FanOut { connections: usize, active: usize, bytes: usize },
    /// Connect, upgrade, one echo of 64 B, close; `parallel` connections at a time. Latency is the
    /// time of all four steps.
    Upgrades { parallel: usize },
    /// HTTP requests on kept connections. With GET, the response has `bytes`. With POST, the
    /// request has `bytes`.
    Polling { connections: usize, bytes: usize, method: Method },
    /// Opens `WebSockets`, echoes once on each, prints one line `ready N` (N: how many are open),
    /// and holds them until standard input ends.
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
    /// Messages, upgrades or requests that were completed. For bulk: frames of 64 KiB.
    pub(crate) operations: u64,
    /// Payload of both directions.
    pub(crate) bytes: u64,
    pub(crate) seconds: f64,
    pub(crate) latency: Option<Latency>,
    pub(crate) machine: MachineCpu,
    /// User and system time of the watched processes.
    pub(crate) watched_ms: f64,
    /// Failed connections and wrong messages. A run with errors does not count.
    pub(crate) errors: u64,
}

/// All times are in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) max: f64,
}

/// The times of `/proc/stat` in milliseconds, summed over all CPUs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct MachineCpu {
    pub(crate) user: f64,
    pub(crate) system: f64,
    /// The time of irq and softirq.
    pub(crate) interrupts: f64,
    pub(crate) idle: f64,
    pub(crate) steal: f64,
}
