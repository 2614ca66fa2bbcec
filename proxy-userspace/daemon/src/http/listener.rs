//! Listening sockets: bind or inherit, accept, drain.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use prometheus::{IntCounter, IntGauge};
use rustix::net::{SocketFlags, acceptfrom_with};
use steer_kernel::ready;
use steer_kernel::tcp::socket;
use tokio::io::Interest;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::Phase;
use super::generation::ServedListener;
use super::server::{self, Accepted, Speaking};
use super::worker::{Worker, choose};

/// Connections that the kernel has completed and that wait to be accepted.
const BACKLOG: i32 = 4096;
/// When file descriptors or memory have run out, somebody must give some back first.
const BACK_OFF: Duration = Duration::from_millis(100);
/// So many workers accept for a listener.
const ACCEPTING_WORKERS: usize = 4;

/// Binds a listening socket, without accepting yet.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(
        socket2::Domain::for_address(address),
        socket2::Type::STREAM,
        Some(socket2::Protocol::TCP),
    )?;
    socket::prepare_for_hand_over(&socket);
    // Otherwise a restart fails while old connections are in TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    listen(socket)
}

/// The same of a socket that was bound, and perhaps listens, in another process.
pub fn inherit(socket: TcpListener) -> io::Result<TcpListener> {
    let socket = socket2::Socket::from(socket);
    socket::prepare_for_hand_over(&socket);
    socket.set_nonblocking(true)?;
    listen(socket)
}

fn listen(socket: socket2::Socket) -> io::Result<TcpListener> {
    socket::prepare(&socket)?;
    socket::watch_peer(&socket)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Serves the listener of this name through the [phases](Phase) that it is told, until it is closed and no connection speaks HTTP any
/// more. Upgraded streams are not waited for; their tasks go on.
///
/// A few workers accept, and keep what they accept as long as the others do not have less to do. All workers that
/// wait for the same socket are woken by each connection, so on a large machine not all of them wait. Sockets of their
/// own (SO_REUSEPORT) would let a second process bind the address unnoticed.
pub async fn serve(
    name: String,
    socket: Arc<TcpListener>,
    workers: Vec<Worker>,
    phases: watch::Receiver<Phase>,
) {
    // Every connection holds a sender while it speaks HTTP.
    let (alive, mut all_done) = mpsc::channel::<()>(1);
    let mut accepting = JoinSet::new();
    for own in 0..workers.len().min(ACCEPTING_WORKERS) {
        let Some(acceptor) = Acceptor::new(&name, &workers, own, &socket, &alive, &phases) else {
            return tracing::error!(
                listener = name,
                "the configuration does not have this listener; nothing is served"
            );
        };
        accepting.spawn_on(acceptor.run(), &workers[own].runtime);
    }
    drop((socket, alive));
    while accepting.join_next().await.is_some() {}
    // Nothing is sent: the channel ends when the last connection drops its sender.
    all_done.recv().await;
}

/// Accepts for one listener on the thread of one worker.
struct Acceptor {
    name: String,
    workers: Vec<Worker>,
    /// The position of the worker on whose thread this runs.
    own: usize,
    socket: Arc<TcpListener>,
    listener: Arc<ServedListener>,
    open: IntGauge,
    accepted_total: IntCounter,
    alive: mpsc::Sender<()>,
    phases: watch::Receiver<Phase>,
}

impl Acceptor {
    fn new(
        name: &str,
        workers: &[Worker],
        own: usize,
        socket: &Arc<TcpListener>,
        alive: &mpsc::Sender<()>,
        phases: &watch::Receiver<Phase>,
    ) -> Option<Self> {
        let shared = &workers[own].shared;
        let metrics = &shared.metrics;
        Some(Self {
            name: name.to_owned(),
            workers: workers.to_vec(),
            own,
            socket: Arc::clone(socket),
            listener: shared.generation.load().listener(name)?,
            open: metrics.downstream_connections.with_label_values(&[name]),
            accepted_total: metrics.downstream_connections_total.with_label_values(&[name]),
            alive: alive.clone(),
            phases: phases.clone(),
        })
    }

    async fn run(mut self) {
        let socket = match ready::listener(Arc::clone(&self.socket)) {
            Ok(socket) => socket,
            Err(error) => return tracing::error!(listener = self.name, %error, "cannot wait for connections"),
        };
        let mut phases = self.phases.clone();
        let mut failing = false;
        loop {
            let phase = *phases.borrow_and_update();
            let accepted = tokio::select! {
                biased;
                told = phases.changed() => if told.is_ok() { continue } else { break },
                accepted = socket.async_io(Interest::READABLE, |socket| accept(socket)), if phase == Phase::Open => accepted,
                () = std::future::ready(()), if !matches!(phase, Phase::Open | Phase::Paused) => break,
            };
            match accepted {
                Ok((client, remote)) => {
                    failing = false;
                    self.deal(client, remote);
                }
                Err(error) if is_exhausted(&error) => {
                    if !failing {
                        tracing::error!(listener = self.name, %error, "cannot accept connections");
                        failing = true;
                    }
                    tokio::time::sleep(BACK_OFF).await;
                }
                // The client was gone before it was accepted.
                Err(error) => tracing::debug!(listener = self.name, %error, "accept failed"),
            }
        }
        if *phases.borrow() == (Phase::Leaving { alone: true }) {
            while let Ok((client, remote)) = accept(socket.get_ref()) {
                self.deal(client, remote);
            }
        }
    }

    /// Starts the task of a connection on the thread of a worker.
    fn deal(&mut self, client: TcpStream, remote: SocketAddr) {
        self.accepted_total.inc();
        let worker = &self.workers[choose(&self.workers, self.own)];
        if let Some(current) = worker.shared.generation.load().listener(&self.name) {
            self.listener = current;
        }
        let speaking = Speaking::new(self.open.clone(), self.alive.clone());
        let accepted = Accepted { client, remote, load: worker.take_on(), speaking };
        let (listener, shared) = (Arc::clone(&self.listener), Arc::clone(&worker.shared));
        worker.runtime.spawn(server::run(listener, shared, accepted, self.phases.clone()));
    }
}

/// Accepts a connection, for whatever runtime is to have it.
fn accept(socket: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    let (client, remote) = acceptfrom_with(socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC)?;
    let remote = remote.and_then(|remote| SocketAddr::try_from(remote).ok());
    Ok((client.into(), remote.ok_or(io::ErrorKind::NotConnected)?))
}

/// Whether the error is about this process or host, not about one connection (accept(2)).
fn is_exhausted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}
