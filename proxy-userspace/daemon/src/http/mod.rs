//! HTTP/1.1 between clients and endpoints: listeners, requests, upgrades, and what the client is told
//! when something fails. In reading order:
//!
//! `listener` accepts and deals to the `worker`s · `generation` is what they serve by · `server` runs one connection · `guard` (with `http1` of `steer-policy`) lets only
//! sound requests through to hyper, one at a time · `forward` answers a request · `upgrade` turns one
//! into a stream · `exchange` is what these share, `turn` what follows for it and for how long, `phase` what the process wants of them · `fault` is the table of failures.
//!
//! It ends where a stream begins: both sockets go to [`crate::splice`], and this module does not learn
//! how they are carried.

mod exchange;
pub mod fault;
mod forward;
mod generation;
mod guard;
pub mod listener;
mod phase;
mod server;
mod turn;
mod upgrade;
mod worker;

use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use steer_policy::http1::head::Malformed;
use steer_policy::routing;

use crate::splice::Splicer;
use crate::streams::Streams;
use crate::streams::ports::SourcePorts;
use crate::telemetry::Metrics;
use crate::upstream::mss::ClientTcp;
use crate::upstream::pool::Pool;
use exchange::Exchange;
use fault::Fault;
use generation::ServedListener;

pub use generation::Generation;
pub use listener::{bind, inherit, limit_mss, serve};
pub use phase::Phase;
pub use worker::Worker;

/// What all connections of a worker share.
#[derive(Debug)]
pub struct Shared {
    /// The current one; another configuration replaces it.
    pub generation: Arc<ArcSwap<Generation>>,
    /// The worker's own: its connections are polled on its thread.
    pub pool: Pool,
    /// The source ports of streams; `None`: the kernel chooses them.
    pub ports: Option<SourcePorts>,
    pub splicer: Arc<Splicer>,
    pub streams: Arc<Streams>,
    pub metrics: Arc<Metrics>,
    /// See [`routing::Connection::node`].
    pub node: IpAddr,
}

/// What is known of one downstream connection. Nothing of it outlives the connection's last request:
/// an upgraded stream does not hold a configuration.
#[derive(Debug)]
struct Downstream {
    /// As it was when the connection was accepted.
    listener: Arc<ServedListener>,
    shared: Arc<Shared>,
    connection: routing::Connection,
    /// Of interest to the connection that a stream gets.
    client_tcp: Option<ClientTcp>,
    exchange: Arc<Exchange>,
}

impl Downstream {
    /// The connection's listener in the current generation. A listener that was removed goes on for its connections as
    /// it was, until they are closed.
    fn current_listener(&self) -> Arc<ServedListener> {
        let current = self.shared.generation.load().listener(&self.listener.config.name);
        current.unwrap_or_else(|| Arc::clone(&self.listener))
    }

    fn count_fault(&self, fault: Fault) {
        self.shared.metrics.faults.with_label_values(&[fault.kind()]).inc();
    }

    /// A request that hyper refused, though the guard found nothing wrong with it.
    fn count_hyper_refusal(&self) {
        self.count_fault(Fault::Malformed(Malformed::RequestLine));
        self.shared.metrics.requests.with_label_values(&["", "400"]).inc();
    }
}
