//! The body of an endpoint's response.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use hyper::body::{Body as _, Frame, Incoming, SizeHint};

use super::Key;
use super::connection::PooledConn;
use super::idle::Idle;

/// Polls the connection that it comes on, and gives it back to the pool at its end. Dropped before, it closes
/// the connection.
#[derive(Debug)]
pub struct Body {
    incoming: Incoming,
    /// `None`: somebody else polls the connection, or it has been given back.
    lent: Option<Lent>,
}

#[derive(Debug)]
struct Lent {
    key: Key,
    connection: Box<PooledConn>,
    idle: Arc<Idle>,
}

impl Body {
    /// The body of a response that came on `connection`.
    pub(super) fn new(incoming: Incoming, key: Key, connection: Box<PooledConn>, idle: Arc<Idle>) -> Self {
        let mut body = Self { incoming, lent: Some(Lent { key, connection, idle }) };
        if body.incoming.is_end_stream() {
            // Nobody polls a body that is at its end.
            body.give_back();
        }
        body
    }

    fn give_back(&mut self) {
        if let Some(Lent { key, connection, idle }) = self.lent.take()
            && connection.is_ready()
        {
            idle.put(key, connection);
        }
    }
}

/// A body whose connection is polled elsewhere.
impl From<Incoming> for Body {
    fn from(incoming: Incoming) -> Self {
        Self { incoming, lent: None }
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        let this = self.get_mut();
        let Some(lent) = &mut this.lent else { return Pin::new(&mut this.incoming).poll_frame(cx) };
        let frame = ready!(lent.connection.poll_frame(cx, &mut this.incoming));
        // Whoever knows that this was the last piece does not ask for another.
        let more = matches!(&frame, Some(Ok(frame)) if frame.is_data());
        if !more || this.incoming.is_end_stream() {
            this.give_back();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}
