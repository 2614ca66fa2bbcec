//! The life-cycle phase of a listener and its connections.

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
    pub(super) async fn next(self, mut phases: watch::Receiver<Self>) -> (Self, watch::Receiver<Self>) {
        let told = |phase: &Self| !matches!(phase, Self::Open | Self::Paused) && *phase != self;
        let phase = phases.wait_for(told).await.map(|phase| *phase);
        match phase {
            Ok(phase) => (phase, phases),
            Err(_) => std::future::pending().await,
        }
    }
}
