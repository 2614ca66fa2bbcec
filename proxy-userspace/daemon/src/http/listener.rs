//! Listening sockets: bind or inherit, accept, drain.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{SocketFlags, acceptfrom_with};
use socket2::SockRef;
use steer_kernel::ready;
use steer_kernel::tcp::socket;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};

use super::Phase;
use super::server::{self, Accepted, Speaking};
use super::worker::{Worker, least_loaded};

/// Connections that the kernel has completed and that wait to be accepted.
const BACKLOG: i32 = 4096;
/// When file descriptors or memory have run out, somebody must give some back first.
const BACK_OFF: Duration = Duration::from_millis(100);

/// Binds a listening socket, without accepting yet.
pub fn bind(address: SocketAddr) -> io::Result<AsyncFd<TcpListener>> {
    let socket = socket2::Socket::new(
        socket2::Domain::for_address(address),
        socket2::Type::STREAM,
        Some(socket2::Protocol::TCP),
    )?;
    socket::prepare_for_hand_over(&socket);
    // Otherwise a restart fails while old connections are in TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket::prepare(&socket)?;
    socket.bind(&address.into())?;
    listen(socket)
}

/// The same of a socket that was bound, and perhaps listens, in another process.
pub fn inherit(socket: TcpListener) -> io::Result<AsyncFd<TcpListener>> {
    let socket = socket2::Socket::from(socket);
    socket::prepare_for_hand_over(&socket);
    socket.set_nonblocking(true)?;
    socket::prepare(&socket)?;
    listen(socket)
}

fn listen(socket: socket2::Socket) -> io::Result<AsyncFd<TcpListener>> {
    socket.listen(BACKLOG)?;
    ready::listener(socket.into())
}

/// Announces no larger segments to the clients that connect from now on.
pub fn limit_mss(socket: &AsyncFd<TcpListener>, mss: u16) -> io::Result<()> {
    SockRef::from(socket).set_tcp_mss(mss.into())
}

/// Serves the listener of this name through the [phases](Phase) that it is told, until it is closed and no connection speaks HTTP any
/// more. Upgraded streams are not waited for; their tasks go on.
///
/// One accepts for all: several that wait for the same socket would all be woken by each connection, and
/// sockets of their own (SO_REUSEPORT) would let a second process bind the address unnoticed.
pub async fn serve(
    name: String,
    socket: Arc<AsyncFd<TcpListener>>,
    workers: Vec<Worker>,
    mut phases: watch::Receiver<Phase>,
) {
    let Some(shared) = workers.first().map(|worker| Arc::clone(&worker.shared)) else { return };
    let Some(mut listener) = shared.generation.load().listener(&name) else {
        return tracing::error!(
            listener = name,
            "the configuration does not have this listener; nothing is served"
        );
    };
    let metrics = &shared.metrics;
    let open = metrics.downstream_connections.with_label_values(&[&name]);
    let accepted_total = metrics.downstream_connections_total.with_label_values(&[&name]);
    // Every connection holds a sender while it speaks HTTP.
    let (alive, mut all_done) = mpsc::channel::<()>(1);
    let mut failing = false;
    let mut turn = 0;
    let of_connections = phases.clone();
    let mut deal = |client, remote| {
        accepted_total.inc();
        let chosen = least_loaded(&workers, turn);
        turn = chosen + 1;
        let worker = &workers[chosen];
        if let Some(current) = shared.generation.load().listener(&name) {
            listener = current;
        }
        let speaking = Speaking::new(open.clone(), alive.clone());
        let accepted = Accepted { client, remote, load: worker.take_on(), speaking };
        let (listener, shared) = (Arc::clone(&listener), Arc::clone(&worker.shared));
        worker.runtime.spawn(server::run(listener, shared, accepted, of_connections.clone()));
    };

    loop {
        let phase = *phases.borrow_and_update();
        let accepted = tokio::select! {
            biased;
            told = phases.changed() => if told.is_ok() { continue } else { break },
            accepted = socket.async_io(Interest::READABLE, accept), if phase == Phase::Open => accepted,
            () = std::future::ready(()), if !matches!(phase, Phase::Open | Phase::Paused) => break,
        };
        match accepted {
            Ok((client, remote)) => {
                failing = false;
                deal(client, remote);
            }
            Err(error) if is_exhausted(&error) => {
                if !failing {
                    tracing::error!(listener = name, %error, "cannot accept connections");
                    failing = true;
                }
                tokio::time::sleep(BACK_OFF).await;
            }
            // The client was gone before it was accepted.
            Err(error) => tracing::debug!(listener = name, %error, "accept failed"),
        }
    }
    if *phases.borrow() == (Phase::Leaving { alone: true }) {
        while let Ok((client, remote)) = accept(socket.get_ref()) {
            deal(client, remote);
        }
    }
    drop(socket);
    drop(alive);
    // Nothing is sent: the channel ends when the last connection drops its sender.
    all_done.recv().await;
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
