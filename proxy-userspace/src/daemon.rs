//! The life of the process: bind everything, serve, wait for a signal, stop in order.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::admin::Admin;
use crate::config::Config;
use crate::http;
use crate::splice::Splicer;
use crate::telemetry::Telemetry;
use crate::upstream::Clusters;

/// How long requests in flight may take to finish after the first SIGTERM.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// A listener cannot be bound, or the runtime cannot start. Nothing serves then.
pub fn run(config: Config) -> anyhow::Result<()> {
    raise_fd_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let served = runtime.block_on(serve(config));
    // Streams that are left are cut here: their tasks end with the runtime.
    runtime.shutdown_timeout(Duration::from_secs(1));
    served
}
