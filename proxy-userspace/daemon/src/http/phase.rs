//! The life-cycle phase of a listener and its connections.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::sync::watch;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Connections are accepted and served.
    Open,
    /// They are served, but nobody is accepted for a moment: who connects waits in the backlog.
    Paused,
    /// Another process accepts. Each connection is closed with its next response, which says so; one that is idle is kept
    /// for a while, since to close it could cross with a request.
    Leaving {
        /// But none accepts at this address: who waits in the backlog is still accepted.
        alone: bool,
    },
    /// Nobody is accepted, requests in flight are answered, idle connections are closed.
    Stopping,
}

impl Phase {
    /// Returns when connections have something else to do than in this phase; never, if nobody is left to want something.
    async fn next(self, mut phases: watch::Receiver<Self>) -> (Self, watch::Receiver<Self>) {
        let told = |phase: &Self| !matches!(phase, Self::Open | Self::Paused) && *phase != self;
        let phase = phases.wait_for(told).await.map(|phase| *phase);
        match phase {
            Ok(phase) => (phase, phases),
            Err(_) => std::future::pending().await,
        }
    }
}

/// A connection's view of the phase.
pub(super) struct Phases {
    now: watch::Receiver<Phase>,
    next: Pin<Box<dyn Future<Output = (Phase, watch::Receiver<Phase>)> + Send>>,
}

impl Phases {
    pub(super) fn new(phases: watch::Receiver<Phase>) -> Self {
        Self { now: phases.clone(), next: Box::pin(Phase::Open.next(phases)) }
    }

    /// Whether the next response is to be the connection's last one.
    pub(super) fn is_leaving(&self) -> bool {
        !matches!(*self.now.borrow(), Phase::Open | Phase::Paused)
    }

    /// The phase, when connections have something else to do than before.
    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Phase> {
        let (phase, phases) = ready!(self.next.as_mut().poll(cx));
        self.next = Box::pin(phase.next(phases));
        Poll::Ready(phase)
    }
}

impl fmt::Debug for Phases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Phases").field(&self.now.borrow()).finish()
    }
}
