//! One downstream connection, from accept to close, or to the stream that it becomes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use prometheus::IntGauge;
use steer_kernel::tcp::socket::reset_on_close;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use super::downstream::{Arrived, Downstream};
use super::exchange::{Next, exchange, refuse};
use super::generation::ServedListener;
use super::worker::Load;
use super::{Phase, Shared};
use crate::io::Io;
use crate::splice::Session;

/// How long, and for how many bytes, a closed connection is read on, so that what the client was still
/// sending does not reset the last response away (RFC 9112, 9.6).
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 1024 * 1024;

/// A connection that nobody serves yet.
#[derive(Debug)]
pub(super) struct Accepted {
    pub(super) client: std::net::TcpStream,
    pub(super) remote: SocketAddr,
    pub(super) load: Load,
    pub(super) speaking: Speaking,
}

/// Held by a connection while it speaks HTTP.
#[derive(Debug)]
pub(super) struct Speaking {
    open: IntGauge,
    _alive: mpsc::Sender<()>,
}

impl Speaking {
    pub(super) fn new(open: IntGauge, alive: mpsc::Sender<()>) -> Self {
        open.inc();
        Self { open, _alive: alive }
    }
}

impl Drop for Speaking {
    fn drop(&mut self) {
        self.open.dec();
    }
}

/// Serves one connection, on the runtime that it stays with.
pub(super) async fn run(
    listener: Arc<ServedListener>,
    shared: Arc<Shared>,
    accepted: Accepted,
    phases: watch::Receiver<Phase>,
) {
    let Accepted { client, remote, load: _load, speaking } = accepted;
    let client = match TcpStream::from_std(client) {
        Ok(client) => client,
        Err(error) => return tracing::error!(%remote, %error, "cannot wait for a connection"),
    };
    let splicer = Arc::clone(&shared.splicer);
    // Boxed, so that a stream's task does not keep room for what its HTTP life needed.
    let session = Box::pin(serve_http(listener, shared, client, remote, phases)).await;
    drop(speaking);
    if let Some(session) = session {
        // Boxed for the same reason: a connection that waits for a request has no stream.
        Box::pin(splicer.carry(session)).await;
    }
}

/// Answers requests until the connection ends, or turns into a stream.
async fn serve_http(
    listener: Arc<ServedListener>,
    shared: Arc<Shared>,
    client: TcpStream,
    remote: SocketAddr,
    phases: watch::Receiver<Phase>,
) -> Option<Session> {
    let mut downstream = match Downstream::new(listener, shared, client, remote, phases) {
        Ok(downstream) => downstream,
        Err(error) => {
            tracing::debug!(%remote, %error, "the client was gone at once");
            return None;
        }
    };
    loop {
        // Boxed, so that an idle connection does not keep room for a request.
        let next = match downstream.next_head().await {
            Arrived::Head(len) => Box::pin(exchange(&mut downstream, len)).await,
            Arrived::Fault(fault) => Box::pin(refuse(&mut downstream, fault)).await,
            Arrived::Nothing => Next::Close,
        };
        match next {
            Next::Request => {}
            Next::Close => {
                linger(downstream.io).await;
                return None;
            }
            Next::Drop => return None,
            Next::Reset => {
                reset_on_close(downstream.io.socket());
                return None;
            }
            Next::Stream(switched) => return Some(switched.session(downstream.io)),
        }
    }
}

/// Finishes the connection, and reads on for a moment after the last response.
async fn linger(io: Io) {
    let ended = io.has_ended();
    let (mut socket, mut unread) = io.into_parts();
    if ended || socket.shutdown().await.is_err() {
        return;
    }
    let drained = async {
        let mut total = 0;
        while total < LINGER_BYTES {
            unread.clear();
            unread.reserve(4096);
            match socket.read_buf(&mut unread).await {
                Ok(0) | Err(_) => break,
                Ok(len) => total += len,
            }
        }
    };
    // The socket is closed now, whether all was read or not.
    timeout(LINGER, drained).await.ok();
}
