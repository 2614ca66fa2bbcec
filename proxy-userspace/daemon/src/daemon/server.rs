//! The server: the listeners with their connections, the admin server and the streams.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use proxy_common::instance::Instance;
use steer_kernel::bpf::packet::pinned;
use steer_kernel::failpoint;
use steer_kernel::net::node;
use steer_policy::config::{Config, Listener, SpliceMode};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::sockets::Sockets;
use crate::admin::Admin;
use crate::http::{self, Generation, Phase, Shared, Worker};
use crate::splice::packet::Predecessor;
use crate::splice::{Splicer, coverage};
use crate::streams::Streams;
use crate::streams::ports::SourcePorts;
use crate::takeover::{Request, TakeoverError};
use crate::telemetry::Metrics;
use crate::upstream::pool::Pool;
use crate::upstream::{Clusters, connect, mss};

/// How often to check whether the last stream has ended.
const LOOK: Duration = Duration::from_millis(100);

pub(super) struct Server {
    config: Config,
    metrics: Arc<Metrics>,
    streams: Arc<Streams>,
    admin: Arc<Admin>,
    splicer: Arc<Splicer>,
    ports: Option<SourcePorts>,
    listeners: Vec<Serving>,
    /// One task for each listener. A task ends with the last connection of its listener.
    tasks: JoinSet<()>,
    admin_socket: Option<Arc<tokio::net::TcpListener>>,
    /// Also writes what the log says from time to time.
    admin_server: JoinSet<()>,
}

struct Serving {
    listener: Listener,
    /// `None` once the listener does not accept any more.
    socket: Option<Arc<TcpListener>>,
    phase: watch::Sender<Phase>,
}

impl Server {
    /// Adopts the streams of the process `before`, and serves.
    ///
    /// # Errors
    /// The streams cannot be adopted. Or the configuration requires the packet splice, and the
    /// packet splice cannot start.
    pub(super) fn start(
        config: Config,
        clusters: Clusters,
        metrics: Arc<Metrics>,
        sockets: Sockets,
        before: Predecessor,
        runtimes: Vec<Handle>,
    ) -> anyhow::Result<Self> {
        let goes_on = matches!(before, Predecessor::Draining(_));
        let streams = Streams::new(&metrics);
        let admin = Admin::new(Arc::clone(&metrics), Arc::clone(&streams));
        let admin_socket = sockets.admin.map(Arc::new);
        let mut admin_server = JoinSet::new();
        let serve_admin = || admin_socket.clone().map(|socket| Arc::clone(&admin).serve(socket));
        if !goes_on {
            // /healthz already answers, and /readyz says that the process is not ready.
            serve_admin().map(|serving| admin_server.spawn(serving));
        }
        let splicer = Arc::new(Splicer::start(Arc::clone(&metrics), Arc::clone(&streams), &config, before)?);
        let ports = if splicer.needs_source_ports() { source_ports(&config, &metrics)? } else { None };
        ports.iter().for_each(|ports| warn_of_neighbours(ports, &config.instance));
        // From here on no step may fail: dropping the adopted streams would end them.
        if splicer.needs_source_ports() {
            splicer.adopt(ports.as_ref(), &config, goes_on);
        }
        failpoint::reached("take_adopted");
        if goes_on {
            serve_admin().map(|serving| admin_server.spawn(serving));
        }
        let mut server = Self {
            config,
            metrics,
            streams,
            admin,
            splicer,
            ports,
            listeners: Vec::new(),
            tasks: JoinSet::new(),
            admin_socket,
            admin_server,
        };
        server.listen(sockets.listeners, &Arc::new(clusters), runtimes);
        server.admin_server.spawn(coverage::log_hourly(Arc::clone(&server.streams)));
        server.admin.set_ready(true);
        Ok(server)
    }

    fn listen(&mut self, sockets: Vec<TcpListener>, clusters: &Arc<Clusters>, runtimes: Vec<Handle>) {
        self.config.clusters.iter().for_each(connect::warn_of_absent_sources);
        let generation = Generation::new(&self.config.listeners, clusters);
        let generation = Arc::new(ArcSwap::from_pointee(generation));
        let node = node::node_address();
        let worker = |runtime| {
            let shared = Shared {
                generation: Arc::clone(&generation),
                pool: Pool::default(),
                ports: self.ports.clone(),
                splicer: Arc::clone(&self.splicer),
                streams: Arc::clone(&self.streams),
                metrics: Arc::clone(&self.metrics),
                node,
            };
            Worker::new(runtime, Arc::new(shared))
        };
        let workers: Vec<_> = runtimes.into_iter().map(worker).collect();
        for (listener, socket) in self.config.listeners.iter().zip(sockets) {
            let socket = Arc::new(socket);
            let phase = watch::Sender::new(Phase::Open);
            let serving = Serving { listener: listener.clone(), socket: Some(socket), phase };
            self.listeners.push(serving);
        }
        self.limit_mss();
        for serving in &self.listeners {
            let Some(socket) = &serving.socket else { continue };
            let name = serving.listener.name.clone();
            let phases = serving.phase.subscribe();
            self.tasks.spawn(http::serve(name, Arc::clone(socket), workers.clone(), phases));
        }
    }

    /// The addresses of its listeners.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        self.listeners.iter().map(|serving| serving.listener.address).collect()
    }

    /// How many upgraded streams there are.
    pub(super) fn streams(&self) -> usize {
        self.streams.len()
    }

    /// How many connections speak HTTP.
    pub(super) fn connections(&self) -> i64 {
        let open = &self.metrics.downstream_connections;
        self.listeners.iter().map(|serving| open.with_label_values(&[&serving.listener.name]).get()).sum()
    }

    /// Whether another process can take over from this one.
    pub(super) fn can_give(&self) -> bool {
        self.splicer.can_give_away()
    }

    /// Lets another process take over. To be called only if [`can_give`](Self::can_give) returns
    /// true.
    ///
    /// # Errors
    /// The takeover failed, and this process serves as before.
    pub(super) async fn give(&mut self, request: Request) -> Result<(), TakeoverError> {
        request.prepare(&self.descriptors()).await?;
        self.tell(|_| Phase::Paused);
        let lock = self.splicer.give_away().await;
        failpoint::reached("give_paused");
        match request.complete(lock.as_ref()).await {
            Ok(addresses) => {
                // From now on only the other process holds the lock.
                drop(lock);
                self.leave(&addresses);
                Ok(())
            }
            Err(error) => {
                match (request.end().await, lock) {
                    (Ok(()), Some(lock)) => self.splicer.take_back(lock, self.ports.as_ref(), &self.config),
                    (Ok(()), None) => {}
                    (Err(error), _) => tracing::error!(
                        %error,
                        "cannot end the process that should have taken over; new streams are relayed until this process is restarted"
                    ),
                }
                self.limit_mss();
                self.tell(|_| Phase::Open);
                Err(error)
            }
        }
    }

    /// The descriptors of all listening sockets.
    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let listeners = self.listeners.iter().filter_map(|serving| serving.socket.as_deref());
        let listeners = listeners.map(|socket| socket.as_fd());
        listeners.chain(self.admin_socket.as_ref().map(|socket| socket.as_fd())).collect()
    }

    /// Leaves new connections to another process, which accepts connections at these addresses.
    fn leave(&mut self, addresses: &[SocketAddr]) {
        self.tell(|address| Phase::Leaving { alone: !addresses.contains(&address) });
        self.close();
    }

    /// Stops accepting.
    pub(super) fn stop(&mut self) {
        self.admin.set_ready(false);
        self.tell(|_| Phase::Stopping);
        self.listeners.iter_mut().for_each(|serving| serving.socket = None);
    }

    fn close(&mut self) {
        self.admin_server.abort_all();
        self.admin_socket = None;
        self.listeners.iter_mut().for_each(|serving| serving.socket = None);
    }

    fn tell(&self, phase: impl Fn(SocketAddr) -> Phase) {
        for serving in &self.listeners {
            serving.phase.send_replace(phase(serving.listener.address));
        }
    }

    /// Returns when no request is in flight and no connection waits for a request.
    pub(super) async fn no_requests(&mut self) {
        while self.tasks.join_next().await.is_some() {}
    }

    /// Returns when also no stream is left.
    pub(super) async fn nothing_left(&mut self) {
        self.no_requests().await;
        while self.streams() > 0 {
            sleep(LOOK).await;
        }
    }

    /// Called at the end of the process: leaves the streams that the kernel carries to the next
    /// process, or ends them.
    pub(super) async fn end(&self) {
        self.splicer.stop().await;
    }

    /// Limits the MSS announced to clients to what endpoints accept (packet splice only).
    fn limit_mss(&self) {
        if !self.splicer.needs_source_ports() {
            return;
        }
        // What the configuration says is not changed by what endpoints say.
        let learns = self.config.packet_splice.mss.is_none();
        for Serving { listener, socket, .. } in &self.listeners {
            let Some(socket) = socket else { continue };
            let (name, mss) = (&listener.name, mss::for_listener(listener, &self.config));
            match self.splicer.limit_mss(socket, listener.address, mss, learns) {
                Ok(()) => tracing::debug!(listener = name, mss, "the limit for the MSS of clients"),
                Err(error) => tracing::warn!(listener = name, mss, %error, "cannot limit the MSS"),
            }
        }
    }
}

/// Warns of other instances that may use the same source ports. If two instances also have an
/// endpoint in common, each takes packets of the other's connections for packets of its own
/// streams.
fn warn_of_neighbours(ports: &SourcePorts, own: &Instance) {
    match pinned::neighbours(own) {
        Ok(neighbours) => {
            for other in neighbours.iter().filter(|other| ports.may_meet(&other.reserved)) {
                tracing::warn!(
                    other = other.name,
                    "another Steer in this network namespace may use the same source ports: if both have an endpoint in \
                     common, give each its own packet_splice.source_ports or source_addresses"
                );
            }
        }
        Err(error) => {
            let error: &dyn std::error::Error = &error;
            tracing::debug!(error, "cannot look for other instances");
        }
    }
}

/// The source ports for the packet splice. `None`: there are none, and streams are relayed.
fn source_ports(config: &Config, metrics: &Metrics) -> anyhow::Result<Option<SourcePorts>> {
    let configured = config.packet_splice.source_ports.as_deref();
    match SourcePorts::start(configured, metrics) {
        Ok(ports) => Ok(Some(ports)),
        Err(error) if config.splice == SpliceMode::Packet => Err(error.into()),
        Err(error) => {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "no source ports for the packet splice, streams are relayed");
            Ok(None)
        }
    }
}
