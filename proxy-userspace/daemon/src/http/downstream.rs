//! One downstream connection: what it waits for, and until when.

use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use steer_kernel::net::{canonical, node};
use steer_policy::http1::scan::{HeadScan, Limits, Scanned};
use steer_policy::routing;
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::Shared;
use super::fault::Fault;
use super::generation::ServedListener;
use super::phase::{Phase, Phases};
use super::timer::Timer;
use crate::io::Io;
use crate::upstream::mss::ClientTcp;

/// How much of what a client sends ahead (pipelined requests, data after an upgrade) is taken from
/// the socket before its turn; the rest waits in the kernel.
const MAX_AHEAD: usize = 16 * 1024;
/// A connection that is to be closed with its next response is not waited for longer than this, which
/// is more than the time between two polls of socket.io (25 s).
const LEAVING_IDLE: Duration = Duration::from_secs(30);

/// What is known of one downstream connection. Nothing of it outlives the connection's last request:
/// an upgraded stream does not hold a configuration.
#[derive(Debug)]
pub(super) struct Downstream {
    /// As it was when the connection was accepted.
    listener: Arc<ServedListener>,
    pub(super) shared: Arc<Shared>,
    pub(super) connection: routing::Connection,
    /// Of interest to the connection that a stream gets.
    pub(super) client_tcp: Option<ClientTcp>,
    pub(super) io: Io,
    timer: Timer,
    phases: Phases,
    /// Since when the next response is to be the last one.
    leaving: Option<Instant>,
}

/// What a client has sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrived {
    /// A head of this length is unread.
    Head(usize),
    /// What is unread is not a request.
    Fault(Fault),
    /// No request, and none is waited for any more.
    Nothing,
}

/// Time limits of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Waits {
    /// Until the response head; starts anew with each piece of the request's body, so that a long
    /// upload is not mistaken for a slow endpoint. `None` after the head, too.
    pub(super) response: Option<Duration>,
    /// Nothing moves on the downstream connection, in either direction.
    pub(super) idle: Option<Duration>,
    /// When a byte last moved on the downstream connection.
    pub(super) moved: Instant,
}

impl Waits {
    fn deadline(&self) -> Option<Instant> {
        let limit = match (self.response, self.idle) {
            (Some(response), Some(idle)) => response.min(idle),
            (response, idle) => response.or(idle)?,
        };
        Some(self.moved + limit)
    }

    /// What it means that the deadline has passed.
    fn fault(&self) -> Fault {
        match (self.response, self.idle) {
            (Some(response), Some(idle)) if idle < response => Fault::StreamIdle,
            (Some(_), _) => Fault::ResponseTimeout,
            (None, _) => Fault::StreamIdle,
        }
    }
}

impl Downstream {
    /// # Errors
    /// The client was gone at once.
    pub(super) fn new(
        listener: Arc<ServedListener>,
        shared: Arc<Shared>,
        socket: TcpStream,
        remote: SocketAddr,
        phases: watch::Receiver<Phase>,
    ) -> io::Result<Self> {
        let connection = routing::Connection {
            remote: canonical(remote),
            local: canonical(socket.local_addr()?),
            node: shared.node,
            interface_index: node::interface_index,
        };
        Ok(Self {
            client_tcp: shared.ports.as_ref().and_then(|_ports| ClientTcp::of(&socket)),
            listener,
            shared,
            connection,
            io: Io::new(socket),
            timer: Timer::new(),
            phases: Phases::new(phases),
            leaving: None,
        })
    }

    /// The connection's listener in the current generation. A listener that was removed goes on for its
    /// connections as it was, until they are closed.
    pub(super) fn current_listener(&self) -> Arc<ServedListener> {
        let current = self.shared.generation.load().listener(&self.listener.config.name);
        current.unwrap_or_else(|| Arc::clone(&self.listener))
    }

    pub(super) fn count_fault(&self, fault: Fault) {
        self.shared.metrics.faults.with_label_values(&[fault.kind()]).inc();
    }

    /// Whether the next response is to be the last one.
    pub(super) fn is_leaving(&self) -> bool {
        self.phases.is_leaving()
    }

    /// Waits for the next request.
    pub(super) async fn next_head(&mut self) -> Arrived {
        let options = &self.listener.config.options;
        let (head, idle) = (options.request_headers_timeout, options.idle_timeout);
        let mut scan = HeadScan::new(Limits {
            head_bytes: options.max_request_headers_bytes,
            headers: options.max_request_headers_count,
        });
        let since = Instant::now();
        let mut began = None;
        poll_fn(|cx| {
            loop {
                match scan.next(self.io.unread()) {
                    Scanned::Head(len) => return Poll::Ready(Arrived::Head(len)),
                    Scanned::Malformed(why) => return Poll::Ready(Arrived::Fault(Fault::Malformed(why))),
                    Scanned::Blank(len) => {
                        self.io.consume(len);
                        continue;
                    }
                    Scanned::Incomplete => {}
                }
                match self.io.poll_fill(cx) {
                    Poll::Ready(Ok(1..)) => continue,
                    Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(Arrived::Nothing),
                    Poll::Pending => {}
                }
                if let Poll::Ready(phase) = self.phases.poll_next(cx) {
                    if phase == Phase::Stopping {
                        return Poll::Ready(Arrived::Nothing);
                    }
                    self.leaving.get_or_insert_with(Instant::now);
                    continue;
                }
                let (deadline, late) = if self.io.unread().is_empty() {
                    let left = self.leaving.map(|left| since.max(left) + LEAVING_IDLE);
                    (idle.map(|limit| since + limit).into_iter().chain(left).min(), Arrived::Nothing)
                } else {
                    let began = *began.get_or_insert_with(Instant::now);
                    (head.map(|limit| began + limit), Arrived::Fault(Fault::HeadTimeout))
                };
                return if self.timer.has_passed(cx, deadline) { Poll::Ready(late) } else { Poll::Pending };
            }
        })
        .await
    }

    /// Whether the client has gone. What it sends meanwhile waits for its turn.
    pub(super) fn poll_gone(&mut self, cx: &mut Context<'_>) -> bool {
        while self.io.unread().len() < MAX_AHEAD && !self.io.has_ended() {
            if self.io.poll_fill(cx).is_pending() {
                return false;
            }
        }
        self.io.has_ended()
    }

    /// Whether the request's time is up.
    pub(super) fn poll_late(&mut self, cx: &mut Context<'_>, waits: &Waits) -> Option<Fault> {
        self.timer.has_passed(cx, waits.deadline()).then(|| waits.fault())
    }

    /// Waits for `future`, unless the client goes or the request's time is up.
    pub(super) async fn unless_over<F: Future>(
        &mut self,
        waits: &Waits,
        future: F,
    ) -> Result<F::Output, Fault> {
        let mut future = pin!(future);
        poll_fn(|cx| {
            if let Poll::Ready(output) = future.as_mut().poll(cx) {
                return Poll::Ready(Ok(output));
            }
            if self.poll_gone(cx) {
                return Poll::Ready(Err(Fault::ClientGone));
            }
            match self.poll_late(cx, waits) {
                Some(fault) => Poll::Ready(Err(fault)),
                None => Poll::Pending,
            }
        })
        .await
    }

    /// Writes all of `bytes`. Returns whether the client has taken them in time.
    pub(super) async fn write(&mut self, bytes: &[u8], idle: Option<Duration>) -> bool {
        let mut waits = Waits { response: None, idle, moved: Instant::now() };
        let mut written = 0;
        poll_fn(|cx| {
            while written < bytes.len() {
                match self.io.poll_write(cx, &bytes[written..]) {
                    Poll::Ready(Ok(len)) => {
                        written += len;
                        waits.moved = Instant::now();
                    }
                    Poll::Ready(Err(_broken)) => return Poll::Ready(false),
                    Poll::Pending if self.poll_late(cx, &waits).is_some() => return Poll::Ready(false),
                    Poll::Pending => return Poll::Pending,
                }
            }
            Poll::Ready(true)
        })
        .await
    }
}
