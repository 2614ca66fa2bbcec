//! Listening sockets: bind, accept, drain.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderValue;
use prometheus::IntGauge;
use socket2::SockRef;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};

use super::{Shared, server};
use crate::config;
use crate::kernel::repair;

/// Connections that the kernel has completed and that wait to be accepted.
const BACKLOG: i32 = 4096;
/// When file descriptors or memory have run out, somebody must give some back first.
const BACK_OFF: Duration = Duration::from_millis(100);

/// What is the same for all connections of a listener.
#[derive(Debug)]
pub(super) struct Front {
    pub(super) config: Arc<config::Listener>,
    pub(super) shared: Arc<Shared>,
    pub(super) server_name: HeaderValue,
}

/// Held by a connection while it speaks HTTP.
#[derive(Debug)]
pub(super) struct Speaking {
    open: IntGauge,
    _alive: mpsc::Sender<()>,
}

impl Speaking {
    fn new(open: IntGauge, alive: mpsc::Sender<()>) -> Self {
        open.inc();
        Self { open, _alive: alive }
    }
}

impl Drop for Speaking {
    fn drop(&mut self) {
        self.open.dec();
    }
}

/// Binds a listening socket, without accepting yet.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(
        socket2::Domain::for_address(address),
        socket2::Type::STREAM,
        Some(socket2::Protocol::TCP),
    )?;
    // Without the capability for it no stream is spliced, either.
    let _without_it = repair::select_send_queue(&socket);
    // Otherwise a restart fails while old connections are in TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Announces no larger segments to the clients that connect from now on.
pub fn limit_mss(socket: &TcpListener, mss: u16) -> io::Result<()> {
    SockRef::from(socket).set_tcp_mss(mss.into())
}

/// Serves a listener until `drain` becomes true, and then until every request in flight has been
/// answered. Upgraded streams are not waited for; their tasks go on.
pub async fn serve(
    config: Arc<config::Listener>,
    socket: TcpListener,
    shared: Arc<Shared>,
    mut drain: watch::Receiver<bool>,
) {
    // A header value by the checks of the configuration.
    let server_name = HeaderValue::from_str(&config.options.server_name)
        .unwrap_or_else(|_invalid| HeaderValue::from_static("steer"));
    let front = Arc::new(Front { config, shared, server_name });
    let metrics = &front.shared.telemetry.metrics;
    let name = front.config.name.as_str();
    let open = metrics.downstream_connections.with_label_values(&[name]);
    let accepted_total = metrics.downstream_connections_total.with_label_values(&[name]);
    // Every connection holds a sender while it speaks HTTP.
    let (alive, mut all_done) = mpsc::channel::<()>(1);
    let mut failing = false;

    loop {
        let accepted = tokio::select! {
            biased;
            _ = drain.wait_for(|drain| *drain) => break,
            accepted = socket.accept() => accepted,
        };
        match accepted {
            Ok((client, remote)) => {
                failing = false;
                accepted_total.inc();
                let speaking = Speaking::new(open.clone(), alive.clone());
                tokio::spawn(server::run(Arc::clone(&front), client, remote, drain.clone(), speaking));
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
    drop(socket);
    drop(alive);
    let _none_left = all_done.recv().await;
}

/// Whether the error is about this process or host, not about one connection (accept(2)).
fn is_exhausted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}
