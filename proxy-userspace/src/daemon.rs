//! The life of the process: bind everything, serve, wait for a signal, stop in order.

mod threads;

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use self::threads::Threads;
use crate::admin::Admin;
use crate::config::{Config, Listener, SpliceMode};
use crate::http::{self, Shared, Worker};
use crate::routing;
use crate::splice::Splicer;
use crate::telemetry::Telemetry;
use crate::upstream::pool::Pool;
use crate::upstream::ports::SourcePorts;
use crate::upstream::{Clusters, mss};

/// How long requests in flight may take to finish after the first signal.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// What is left of the tasks may take so long to end.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// A port cannot be bound, or a runtime cannot start; nothing has been served then.
pub fn run(config: Config) -> anyhow::Result<()> {
    raise_fd_limit();
    // This thread accepts, answers operators and looks after spliced streams; the workers serve connections.
    let runtime = threads::runtime()?;
    let workers = Threads::start(std::thread::available_parallelism().map_or(1, usize::from))?;
    let served = runtime.block_on(serve(config, workers.runtimes()));
    // Streams that are still open are cut here: their tasks end with their runtime.
    workers.end(END_TIMEOUT);
    runtime.shutdown_timeout(END_TIMEOUT);
    served
}

async fn serve(config: Config, runtimes: Vec<Handle>) -> anyhow::Result<()> {
    let mut stop = Stop::new()?;
    let telemetry = Telemetry::new();
    let admin = Admin::new(Arc::clone(&telemetry));
    let bound = bind(&config.listeners)?;
    let mut always = JoinSet::new();
    if let Some(address) = config.admin {
        if !address.ip().is_loopback() {
            tracing::warn!(%address, "the admin listener has no access control and is not on loopback");
        }
        let bound = http::bind(address).and_then(|socket| socket.into_inner().try_into());
        let socket: tokio::net::TcpListener = bound.with_context(|| {
            format!(
                "cannot bind the admin listener to {address}: choose another with --admin, or --admin off"
            )
        })?;
        tracing::info!(%address, "admin");
        always.spawn(Arc::clone(&admin).serve(socket));
    }
    let splicer = Arc::new(Splicer::start(Arc::clone(&telemetry), &config)?);
    let ports = if splicer.needs_source_ports() { source_ports(&config, &telemetry)? } else { None };
    if splicer.needs_source_ports() {
        splicer.adopt(ports.as_ref(), &config);
        limit_mss(&bound, &config);
    }
    let clusters = Arc::new(Clusters::new(&config, &telemetry));
    let pool = Pool::new(&config, &telemetry, ports.as_ref());
    let node = routing::node_address();
    let worker = |runtime| {
        let shared = Shared {
            clusters: Arc::clone(&clusters),
            pool: pool.another(),
            splicer: Arc::clone(&splicer),
            telemetry: Arc::clone(&telemetry),
            splice_mode: config.splice,
            node,
        };
        Worker::new(runtime, Arc::new(shared))
    };
    let workers: Vec<_> = runtimes.into_iter().map(worker).collect();

    let (drain, draining) = watch::channel(false);
    let mut listeners = JoinSet::new();
    for (listener, socket) in bound {
        listeners.spawn(http::serve(Arc::new(listener), socket, workers.clone(), draining.clone()));
    }
    admin.set_ready(true);
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "ready");

    let signal = stop.wait().await;
    admin.set_ready(false);
    let streams = telemetry.flows.len();
    tracing::info!(
        signal,
        streams,
        "stopping: no new connections, requests in flight finish, relayed streams end"
    );
    drain.send_replace(true);
    let finished = async { while listeners.join_next().await.is_some() {} };
    tokio::select! {
        () = finished => {}
        () = tokio::time::sleep(DRAIN_TIMEOUT) => {
            tracing::warn!(seconds = DRAIN_TIMEOUT.as_secs(), "some requests did not finish in time");
        }
        signal = stop.wait() => tracing::warn!(signal, "second signal, stopping at once"),
    }
    splicer.stop().await;
    Ok(())
}

/// The ports of streams that the kernel is to carry; without any, streams are relayed.
fn source_ports(config: &Config, telemetry: &Telemetry) -> anyhow::Result<Option<SourcePorts>> {
    let configured = config.packet_splice.source_ports.as_deref();
    match SourcePorts::start(configured, telemetry) {
        Ok(ports) => Ok(Some(ports)),
        Err(error) if config.splice == SpliceMode::Packet => Err(error.into()),
        Err(error) => {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "no source ports for the packet splice, streams are relayed");
            Ok(None)
        }
    }
}

/// Has clients send only what endpoints can take, where packets may be passed on as they come.
fn limit_mss(bound: &[(Listener, AsyncFd<TcpListener>)], config: &Config) {
    for (listener, socket) in bound {
        let Some(mss) = mss::for_listener(listener, config) else { continue };
        match http::limit_mss(socket, mss) {
            Ok(()) => tracing::debug!(listener = listener.name, mss, "largest segment that clients may send"),
            Err(error) => tracing::warn!(listener = listener.name, mss, %error, "cannot limit the MSS"),
        }
    }
}

/// Binds every listener before any of them serves, so that a bad address stops the start.
fn bind(listeners: &[Listener]) -> anyhow::Result<Vec<(Listener, AsyncFd<TcpListener>)>> {
    let bind = |listener: &Listener| {
        let (name, address) = (&listener.name, listener.address);
        let socket =
            http::bind(address).with_context(|| format!("cannot bind listener {name} to {address}"))?;
        tracing::info!(listener = name, %address, "listening");
        Ok((listener.clone(), socket))
    };
    listeners.iter().map(bind).collect()
}

/// The signals that ask for an orderly stop.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
    quit: Signal,
}

impl Stop {
    fn new() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen to signals");
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            quit: listen(SignalKind::quit())?,
        })
    }

    /// The name of the next one.
    async fn wait(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.quit.recv() => "SIGQUIT",
        }
    }
}

/// A relayed stream holds two descriptors, and the soft limit is 1,024 almost everywhere.
fn raise_fd_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a live rlimit.
    let read = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    if read == 0 && limit.rlim_cur < limit.rlim_max {
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: as above; the value is within the hard limit.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
            let error = std::io::Error::last_os_error();
            tracing::warn!(%error, "cannot raise the limit of open files to {}", limit.rlim_max);
        }
    }
}
