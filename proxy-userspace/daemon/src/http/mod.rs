//! HTTP/1.1 between clients and endpoints: listeners, requests, upgrades, and what the client is told
//! when something fails. In reading order:
//!
//! `listener` accepts and deals to the `worker`s · `generation` is what they serve by · `server` runs one
//! connection, `downstream` is what it waits for (with one `timer`) · `exchange` answers one request:
//! head, endpoint, response, or the upgrade to a stream · `transfer` moves a message from one connection
//! to the other · `reply` is the head that the client gets · `phase` is what the process wants of
//! connections · `fault` is the table of failures.
//!
//! One task owns both sockets of an exchange. It ends where a stream begins: both sockets go to
//! [`crate::splice`], and this module does not learn how they are carried.

mod downstream;
mod exchange;
pub mod fault;
mod generation;
pub mod listener;
mod phase;
mod reply;
mod server;
mod timer;
mod transfer;
mod worker;

use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::splice::Splicer;
use crate::streams::Streams;
use crate::streams::ports::SourcePorts;
use crate::telemetry::Metrics;
use crate::upstream::pool::Pool;

pub use generation::Generation;
pub use listener::{bind, inherit, serve};
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
    /// See [`steer_policy::routing::Connection::node`].
    pub node: IpAddr,
}
