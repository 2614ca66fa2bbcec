//! One connection of the pool, which serves one request after the other.

use std::future::{Future as _, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::TrySendError;
use hyper::client::conn::http1::{self, Connection, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::upstream::connect::MAX_BUFFER;

/// How often a connection that wakes itself while it is polled is polled again at once, before others have
/// their turn.
const POLLS: usize = 4;

pub(super) struct PooledConn {
    sender: SendRequest<Outgoing>,
    /// `None`: it has ended.
    connection: Option<Connection<TokioIo<TcpStream>, Outgoing>>,
    relay_waker: Arc<RelayWaker>,
    /// Wakes by way of `relay_waker`.
    waker: Waker,
}

impl PooledConn {
    /// Speaks HTTP on a new connection.
    pub(super) async fn new(socket: TcpStream) -> hyper::Result<Self> {
        let (sender, connection) =
            http1::Builder::new().max_buf_size(MAX_BUFFER).handshake(TokioIo::new(socket)).await?;
        let relay_waker = Arc::new(RelayWaker::default());
        let waker = Waker::from(Arc::clone(&relay_waker));
        Ok(Self { sender, connection: Some(connection), relay_waker, waker })
    }

    /// Sends a request and waits for the head of its response. An error holds the request if nothing of
    /// it was written.
    pub(super) async fn exchange(
        &mut self,
        request: Request<Outgoing>,
    ) -> Result<Response<Incoming>, TrySendError<Request<Outgoing>>> {
        let mut response = pin!(self.sender.try_send_request(request));
        poll_fn(|cx| {
            self.poll_with(cx, |this, cx| {
                this.poll_connection(cx);
                response.as_mut().poll(cx)
            })
        })
        .await
    }

    /// The next piece of a response's body.
    pub(super) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
        body: &mut Incoming,
    ) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        self.poll_with(cx, |this, cx| {
            let frame = Pin::new(&mut *body).poll_frame(cx);
            if frame.is_ready() {
                return frame;
            }
            this.poll_connection(cx);
            Pin::new(&mut *body).poll_frame(cx)
        })
    }

    /// Waits until another request can be sent; false: the connection has ended.
    pub(super) async fn ready(&mut self) -> bool {
        poll_fn(|cx| {
            self.poll_with(cx, |this, cx| {
                this.poll_connection(cx);
                this.sender.poll_ready(cx).map(|ready| ready.is_ok())
            })
        })
        .await
    }

    /// Whether another request can be sent.
    pub(super) fn is_ready(&self) -> bool {
        self.connection.is_some() && self.sender.is_ready()
    }

    /// Wakes nobody until it is polled again.
    pub(super) fn let_go(&self) {
        self.relay_waker.set_holder(None);
    }

    fn poll_connection(&mut self, cx: &mut Context<'_>) {
        if let Some(connection) = &mut self.connection
            && Pin::new(connection).poll(cx).is_ready()
        {
            // Errors are given to the request or to the body; a request that was not begun is given
            // back when this is dropped.
            self.connection = None;
        }
    }

    /// Polls with the connection's own waker, which wakes the task of `cx` from now on. Parts of hyper
    /// that wake each other while they are polled in here do not wake the task.
    fn poll_with<R>(
        &mut self,
        cx: &mut Context<'_>,
        mut poll: impl FnMut(&mut Self, &mut Context<'_>) -> Poll<R>,
    ) -> Poll<R> {
        self.relay_waker.set_holder(Some(cx.waker()));
        let waker = self.waker.clone();
        for _ in 0..POLLS {
            self.relay_waker.mute();
            let polled = poll(self, &mut Context::from_waker(&waker));
            let woken = self.relay_waker.unmute();
            if polled.is_ready() || !woken {
                return polled;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl std::fmt::Debug for PooledConn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PooledConn").field("connection", &self.connection).finish_non_exhaustive()
    }
}

/// The waker of a connection that goes from task to task: passes each wake on to the task that holds the connection.
#[derive(Debug, Default)]
struct RelayWaker {
    holder: Mutex<Option<Waker>>,
    woken: AtomicBool,
    /// Being polled: whoever polls looks at `woken` afterwards.
    muted: AtomicBool,
}

impl RelayWaker {
    fn set_holder(&self, waker: Option<&Waker>) {
        let mut holder = self.holder.lock().unwrap_or_else(PoisonError::into_inner);
        match (&mut *holder, waker) {
            (Some(old), Some(new)) => old.clone_from(new),
            (holder, new) => *holder = new.cloned(),
        }
    }

    fn mute(&self) {
        self.muted.store(true, Ordering::SeqCst);
        self.woken.store(false, Ordering::SeqCst);
    }

    /// Whether there was a wake since it was muted.
    fn unmute(&self) -> bool {
        // In this order, and the other way round in `wake`: one of the two sees what the other did.
        self.muted.store(false, Ordering::SeqCst);
        self.woken.load(Ordering::SeqCst)
    }
}

impl Wake for RelayWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::SeqCst);
        if !self.muted.load(Ordering::SeqCst)
            && let Some(holder) = &*self.holder.lock().unwrap_or_else(PoisonError::into_inner)
        {
            holder.wake_by_ref();
        }
    }
}

/// The body of a request on its way to an endpoint.
#[derive(Debug)]
pub(super) struct Outgoing {
    body: Incoming,
    /// Lets go when the body has been written.
    _sending: Option<Arc<()>>,
}

impl Outgoing {
    pub(super) fn new(body: Incoming, sending: Option<Arc<()>>) -> Self {
        Self { body, _sending: sending }
    }
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        Pin::new(&mut self.get_mut().body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
