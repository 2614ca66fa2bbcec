//! One downstream connection, from accept to close, or to the stream that it becomes.

use std::convert::Infallible;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1::{self, UpgradeableConnection};
use hyper::service::{Service, service_fn};
use prometheus::IntGauge;
use socket2::SockRef;
use steer_kernel::net::{canonical, node};
use steer_policy::http1::framing::Limits;
use steer_policy::routing;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, Sleep, sleep_until, timeout};

use super::exchange::Exchange;
use super::fault::Fault;
use super::forward::{self, ResponseBody};
use super::generation::ServedListener;
use super::guard::Guard;
use super::turn::{ConnectionTimeouts, Overdue};
use super::worker::Load;
use super::{Downstream, Phase, Shared};
use crate::splice::Session;
use crate::upstream::mss::ClientTcp;

/// hyper's own limits are looser than the guard's, which answers first.
const HYPER_MIN_BUFFER: usize = 8192;
/// hyper keeps room for so many headers on the stack.
const HYPER_HEADERS: usize = 100;
/// `http::HeaderMap` cannot hold many more, and hyper sets so much room aside for each head.
const MAX_HEADERS: usize = 16 * 1024;
/// How long, and for how many bytes, a closed connection is read on, so that what the client was still
/// sending does not reset the last response away (RFC 9112, 9.6).
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 1024 * 1024;
/// A deadline that every other one is before.
const NEVER: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

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
        splicer.carry(session).await;
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
    let local = match client.local_addr() {
        Ok(local) => local,
        Err(error) => {
            tracing::debug!(%remote, %error, "the client was gone at once");
            return None;
        }
    };
    let options = &listener.config.options;
    let exchange = Arc::new(Exchange::new(ConnectionTimeouts {
        head: options.request_headers_timeout,
        idle: options.idle_timeout,
    }));
    let limits = Limits {
        head_bytes: options.max_request_headers_bytes,
        headers: options.max_request_headers_count.min(MAX_HEADERS),
    };
    let client_tcp = shared.ports.as_ref().and_then(|_ports| ClientTcp::of(&client));
    let guard = Guard::new(client, limits, Arc::clone(&exchange));
    let downstream = Arc::new(Downstream {
        connection: routing::Connection {
            remote: canonical(remote),
            local: canonical(local),
            node: shared.node,
            interface_index: node::interface_index,
        },
        client_tcp,
        exchange: Arc::clone(&exchange),
        listener,
        shared,
    });

    let mut builder = http1::Builder::new();
    builder.header_read_timeout(None).max_buf_size(HYPER_MIN_BUFFER.max(limits.head_bytes + 1));
    if limits.headers > HYPER_HEADERS {
        builder.max_headers(limits.headers);
    }
    let service = service_fn(|request: Request<Incoming>| {
        let downstream = Arc::clone(&downstream);
        async move { Ok::<_, Infallible>(forward::respond(downstream, request).await) }
    });
    let mut connection = builder.serve_connection(guard, service).with_upgrades();
    let ended = drive(&mut connection, &exchange, phases).await;

    let (guard, read_by_hyper) = match connection.into_parts() {
        Some(parts) => (parts.io, parts.read_buf),
        // hyper gives a connection up like this after any request with an `upgrade` header.
        None => {
            let parts = exchange.take_upgrade()?.await.ok()?.downcast::<Guard>().ok()?;
            (parts.io, parts.read_buf)
        }
    };
    match (ended, exchange.take_switched()) {
        (Ended::Closed, Some(switched)) => {
            let (socket, held) = guard.into_parts();
            return Some(Session {
                downstream: socket,
                upstream: switched.upstream,
                source: switched.source,
                to_upstream: compact(&[&read_by_hyper, &held]),
                to_downstream: compact(&[&switched.to_downstream]),
                idle_timeout: switched.idle_timeout,
                guard: switched.guard,
            });
        }
        (Ended::Closed, None) => linger(guard).await,
        (Ended::Failed(error), _) => {
            if error.is_parse() {
                // hyper has answered it.
                downstream.count_hyper_refusal();
            }
            tracing::debug!(%remote, error = &error as &dyn std::error::Error, "connection failed");
            if exchange.would_look_complete() {
                reset(&guard);
            }
        }
        (Ended::Overdue, _) => {
            downstream.count_fault(Fault::StreamIdle);
            reset(&guard);
        }
    }
    None
}

/// How a connection ended that did not become a stream.
enum Ended {
    /// In order: the write side is shut down.
    Closed,
    Failed(hyper::Error),
    /// In the middle of a response on which nothing moved.
    Overdue,
}

/// Polls hyper's connection, and beside it what the process wants and the one timer that all timeouts share.
async fn drive<S>(
    connection: &mut UpgradeableConnection<Guard, S>,
    exchange: &Exchange,
    phases: watch::Receiver<Phase>,
) -> Ended
where
    S: Service<Request<Incoming>, Response = Response<ResponseBody>, Error = Infallible>,
{
    let mut timer: Pin<Box<Sleep>> = Box::pin(sleep_until(Instant::now() + NEVER));
    let mut next_phase = pin!(Phase::Open.next(phases));
    poll_fn(|cx| {
        loop {
            match Pin::new(&mut *connection).poll(cx) {
                Poll::Ready(Ok(())) => return Poll::Ready(Ended::Closed),
                Poll::Ready(Err(error)) => return Poll::Ready(Ended::Failed(error)),
                Poll::Pending => {}
            }
            if let Poll::Ready((phase, phases)) = next_phase.as_mut().poll(cx) {
                next_phase.set(phase.next(phases));
                match phase {
                    Phase::Stopping => Pin::new(&mut *connection).graceful_shutdown(),
                    Phase::Open | Phase::Paused | Phase::Leaving { .. } => exchange.leave(),
                }
                continue;
            }
            let Some(deadline) = exchange.deadline().map(Instant::from_std) else { return Poll::Pending };
            // A deadline moves with each request, mostly further away: that the timer learns when it fires.
            if deadline < timer.deadline() {
                timer.as_mut().reset(deadline);
            }
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if timer.deadline() < deadline {
                timer.as_mut().reset(deadline);
                continue;
            }
            match exchange.overdue() {
                Overdue::CloseIdle => Pin::new(&mut *connection).graceful_shutdown(),
                Overdue::Answer => {}
                Overdue::Abort => return Poll::Ready(Ended::Overdue),
            }
        }
    })
    .await
}

/// Finishes the connection, and reads on for a moment after the last response.
async fn linger(guard: Guard) {
    if guard.has_finished() {
        return;
    }
    let (mut socket, mut unread) = guard.into_parts();
    // hyper has done so already, unless it took the connection for upgraded. A second time fails.
    socket.shutdown().await.ok();
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

/// Makes closing the socket a RST, so that a response without a length does not look complete.
fn reset(guard: &Guard) {
    if let Err(error) = SockRef::from(guard.socket()).set_linger(Some(Duration::ZERO)) {
        tracing::debug!(%error, "cannot reset the connection");
    }
}

/// The bytes without the buffer around them: it would live as long as the stream.
fn compact(parts: &[&[u8]]) -> Bytes {
    if parts.iter().all(|part| part.is_empty()) { Bytes::new() } else { parts.concat().into() }
}
