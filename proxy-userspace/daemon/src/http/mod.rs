//! HTTP/1.1 between clients and endpoints: listeners, requests, upgrades, and what the client is told
//! when something fails. In reading order:
//!
//! `listener` accepts and deals to the `worker`s · `server` runs one connection · `guard` (with `http1` of `steer-policy`) lets only
//! sound requests through to hyper, one at a time · `forward` answers a request · `upgrade` turns one
//! into a stream · `exchange` is what these share, `phase` what the process wants of them · `fault` is the table of failures.
//!
//! It ends where a stream begins: both sockets go to [`crate::splice`], and this module does not learn
//! how they are carried.

mod exchange;
pub mod fault;
mod forward;
mod guard;
pub mod listener;
mod phase;
mod server;
mod upgrade;
mod worker;

use std::net::IpAddr;
use std::sync::Arc;

use http::HeaderValue;
use steer_policy::config::{self, SpliceMode};
use steer_policy::routing;

use crate::splice::Splicer;
use crate::telemetry::Telemetry;
use crate::upstream::Clusters;
use crate::upstream::mss::ClientTcp;
use crate::upstream::pool::Pool;
use exchange::Exchange;
use fault::Fault;

pub use listener::{bind, inherit, limit_mss, serve};
pub use phase::Phase;
pub use worker::Worker;

/// What all listeners of a configuration share, for one worker.
#[derive(Debug)]
pub struct Shared {
    pub clusters: Arc<Clusters>,
    /// The worker's own: its connections are polled on its thread.
    pub pool: Pool,
    pub splicer: Arc<Splicer>,
    pub telemetry: Arc<Telemetry>,
    pub splice_mode: SpliceMode,
    /// See [`routing::Connection::node`].
    pub node: IpAddr,
}

/// What is known of one downstream connection. Nothing of it outlives the connection's last request:
/// an upgraded stream does not hold a configuration.
#[derive(Debug)]
struct Downstream {
    listener: Arc<config::Listener>,
    shared: Arc<Shared>,
    connection: routing::Connection,
    /// Of interest to the connection that a stream gets.
    client_tcp: Option<ClientTcp>,
    server_name: HeaderValue,
    exchange: Arc<Exchange>,
}

impl Downstream {
    fn count_fault(&self, fault: Fault) {
        self.shared.telemetry.metrics.faults.with_label_values(&[fault.kind()]).inc();
    }

    /// A request that hyper refused, though the guard found nothing wrong with it.
    fn count_hyper_refusal(&self) {
        let metrics = &self.shared.telemetry.metrics;
        metrics.faults.with_label_values(&["request_line"]).inc();
        metrics.requests.with_label_values(&["", "400"]).inc();
    }
}
