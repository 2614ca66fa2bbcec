//! The life of the process: bind all addresses, serve, wait for a signal or a takeover, and stop in
//! order.

mod server;
mod signals;
mod sockets;
mod successor;
mod threads;

use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use steer_policy::config::Config;
use tokio::runtime::Handle;
use tokio::time::sleep;

use self::server::Server;
use self::signals::{Event, Signals};
use self::sockets::{InheritedSockets, Sockets};
use self::successor::Successor;
use self::threads::Threads;
use crate::splice::packet::Predecessor;
use crate::systemd::{self, State};
use crate::takeover::{ControlSocket, Request, Takeover};
use crate::telemetry::Metrics;
use crate::upstream::Clusters;

/// How long the requests in flight may take to finish after the first signal.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the remaining tasks may take to end.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// Runs until a signal asks for a stop, or until another process has taken over and the last stream
/// and connection have ended. With `takes_over`, takes over from the running process of the
/// instance, if there is one. To be called before the process has opened any descriptor.
///
/// # Errors
/// A port cannot be bound, a runtime cannot start, or the other process refuses. Then nothing was
/// served.
pub fn run(config: Config, takes_over: bool) -> anyhow::Result<()> {
    let inherited = InheritedSockets::new(systemd::listen_fds());
    raise_fd_limit();
    // This thread accepts, answers operators and looks after spliced streams; the workers serve
    // connections.
    let runtime = threads::runtime()?;
    let workers = Threads::start(std::thread::available_parallelism().map_or(1, usize::from))?;
    let served = runtime.block_on(async {
        let mut signals = Signals::new()?;
        let server = start(config, takes_over, inherited, workers.runtimes()).await?;
        server.serve(&mut signals).await;
        Ok(())
    });
    // Streams that are still open are cut here: their tasks end with their runtime.
    workers.end(END_TIMEOUT);
    runtime.shutdown_timeout(END_TIMEOUT);
    served
}

/// The serving process.
struct Daemon {
    server: Server,
    drain_timeout: Duration,
    /// `None`: no process can ask to take over.
    control: Option<ControlSocket>,
}

async fn start(
    config: Config,
    takes_over: bool,
    mut inherited: InheritedSockets,
    runtimes: Vec<Handle>,
) -> anyhow::Result<Daemon> {
    let mut takeover = if takes_over { Takeover::begin(&config.instance).await? } else { None };
    match &mut takeover {
        Some(takeover) => {
            tracing::info!(pid = takeover.pid(), "taking over");
            inherited.add(std::mem::take(&mut takeover.sockets));
        }
        None if takes_over => {
            tracing::info!(instance = %config.instance, "no process of the instance runs: starting as usual");
        }
        None => {}
    }
    let metrics = Metrics::new();
    let sockets = Sockets::open(&config, &mut inherited)?;
    inherited.warn_of_unused();
    let clusters = Clusters::new(&config, &metrics);
    let (confirmation, predecessor) = match takeover {
        Some(takeover) => {
            let (confirmation, lock) = takeover.prepared().await?;
            (Some(confirmation), lock.map_or(Predecessor::Exited, Predecessor::Draining))
        }
        None => (None, Predecessor::Exited),
    };
    let (instance, drain_timeout) = (config.instance.clone(), config.drain_timeout);
    let server = Server::start(config, clusters, metrics, sockets, predecessor, runtimes)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "ready");
    let was_taken = confirmation.is_some();
    if let Some(confirmation) = confirmation {
        confirmation.ready(server.addresses()).await;
    }
    systemd::notify(State::Ready);
    let control = ControlSocket::open(&instance, was_taken);
    let warn = |error: &_| {
        tracing::warn!(error = error as &dyn std::error::Error, "no process can take over from this one");
    };
    Ok(Daemon { server, drain_timeout, control: control.inspect_err(warn).ok() })
}

impl Daemon {
    async fn serve(mut self, signals: &mut Signals) {
        let signal = match self.wait(signals).await {
            ExitReason::Stop(signal) => {
                systemd::notify(State::Stopping);
                signal
            }
            ExitReason::TakenOver => match self.drain(signals).await {
                Some(signal) => signal,
                None => return,
            },
        };
        self.stop(signal, signals).await;
    }

    /// Serves until a signal asks for a stop, or until another process has taken over.
    async fn wait(&mut self, signals: &mut Signals) -> ExitReason {
        let mut successor = Successor::none();
        loop {
            tokio::select! {
                event = signals.next() => match event {
                    Event::Stop(signal) => return ExitReason::Stop(signal),
                    Event::Upgrade if successor.is_running() => {
                        tracing::warn!("ignoring SIGUSR2: a takeover is already under way");
                    }
                    Event::Upgrade => start_successor(&mut successor),
                },
                ended = successor.ended() => {
                    let how = ended.map_or_else(|error| error.to_string(), |status| status.to_string());
                    tracing::error!(how, "the process that was started to take over has ended; this process goes on");
                    systemd::notify(State::Ready);
                }
                request = asked(&mut self.control) => tokio::select! {
                    given = self.give(request) => if given { return ExitReason::TakenOver },
                    signal = signals.stop() => return ExitReason::Stop(signal),
                },
            }
        }
    }

    /// Lets the process that asks take over; returns whether it has done so.
    async fn give(&mut self, request: Request) -> bool {
        let pid = request.pid();
        tracing::info!(pid, version = request.version, "another process takes over");
        if !self.server.can_give() {
            request
                .refuse("spliced streams would end, since they have no pins (see its log): stop the old process first")
                .await;
            return false;
        }
        systemd::notify(State::Reloading);
        match self.server.give(request).await {
            Ok(()) => {
                systemd::notify(State::TakenOver { pid });
                true
            }
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::error!(pid, error, "the other process has not taken over; this process goes on");
                systemd::notify(State::Ready);
                false
            }
        }
    }

    /// Finishes the relayed streams and the HTTP connections, up to `drain_timeout`. A signal ends
    /// the wait, and its name is returned.
    async fn drain(&mut self, signals: &mut Signals) -> Option<&'static str> {
        // The file of the control socket belongs to the other process now.
        if let Some(control) = self.control.take() {
            control.leave();
        }
        let (streams, connections) = (self.server.streams(), self.server.connections());
        tracing::info!(
            streams,
            connections,
            drain_timeout = ?self.drain_timeout,
            "another process has taken over: this process ends when these relayed streams and HTTP connections have ended"
        );
        tokio::select! {
            () = self.server.nothing_left() => {
                tracing::info!("all streams and connections have ended: the process ends");
                return None;
            }
            () = sleep(self.drain_timeout) => {}
            signal = signals.stop() => return Some(signal),
        }
        let (streams, connections) = (self.server.streams(), self.server.connections());
        tracing::warn!(streams, connections, "drain_timeout is over: these streams and connections are cut");
        None
    }

    async fn stop(&mut self, signal: &str, signals: &mut Signals) {
        let streams = self.server.streams();
        tracing::info!(
            signal,
            streams,
            "stopping: refusing new connections, finishing the requests in flight, ending relayed streams"
        );
        self.server.stop();
        tokio::select! {
            () = self.server.no_requests() => {}
            () = sleep(STOP_TIMEOUT) => {
                tracing::warn!(seconds = STOP_TIMEOUT.as_secs(), "some requests did not finish in time");
            }
            signal = signals.stop() => tracing::warn!(signal, "second signal, stopping at once"),
        }
        self.server.end().await;
    }
}

/// Why the process does not serve any more.
enum ExitReason {
    /// The signal with this name asked for a stop.
    Stop(&'static str),
    /// Another process has the listening sockets, and the streams that the kernel carries.
    TakenOver,
}

/// Waits for the next process that asks to take over.
async fn asked(control: &mut Option<ControlSocket>) -> Request {
    match control {
        Some(control) => control.request().await,
        None => std::future::pending().await,
    }
}

fn start_successor(successor: &mut Successor) {
    systemd::notify(State::Reloading);
    match successor.start() {
        Ok(pid) => tracing::info!(pid, "started a process to take over"),
        Err(error) => {
            tracing::error!(%error, "cannot start a process to take over; this one goes on");
            systemd::notify(State::Ready);
        }
    }
}

/// A relayed stream holds two descriptors, and the soft limit is 1,024 almost everywhere.
fn raise_fd_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        match limit.maximum {
            Some(maximum) => tracing::warn!(%error, "cannot raise the limit of open files to {maximum}"),
            None => tracing::warn!(%error, "cannot remove the limit of open files"),
        }
    }
}
