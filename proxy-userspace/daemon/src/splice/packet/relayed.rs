//! A session that userspace relays until the hand-over. Until the switch, the session can be given
//! back to the relay.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::lanes::{Fin, Lanes};
use crate::splice::Session;
use crate::splice::relay::Broken;
use crate::streams::End;
use crate::streams::StreamGuard;
use crate::streams::ports::Lease;
use crate::turn::Turn;

pub(super) struct Relayed {
    pub(super) lanes: Lanes,
    pub(super) source: Option<Lease>,
    pub(super) guard: StreamGuard,
    pub(super) idle_timeout: Option<Duration>,
}

impl From<Session> for Relayed {
    fn from(session: Session) -> Self {
        let Session { downstream, upstream, source, to_upstream, to_downstream, idle_timeout, guard } =
            session;
        let lanes = Lanes {
            sockets: [downstream, upstream],
            held: [to_upstream, to_downstream],
            fin: [Fin::NotSeen; 2],
            unread: [true; 2],
            // Without meaning until `Approach::begin` sets them.
            read_end: [0; 2],
            write_end: [0; 2],
            turn: Turn::default(),
        };
        Self { lanes, source, guard, idle_timeout }
    }
}

impl From<Relayed> for Session {
    /// A FIN that was read is not lost: the relay reads it again.
    fn from(relayed: Relayed) -> Self {
        let Relayed { lanes, source, guard, idle_timeout } = relayed;
        let Lanes { sockets: [downstream, upstream], held: [to_upstream, to_downstream], .. } = lanes;
        Self { downstream, upstream, source, to_upstream, to_downstream, idle_timeout, guard }
    }
}

impl Relayed {
    /// Relays for `time`, or until a peer has finished, or until `enough` returns true. FINs are
    /// not passed on. `None`: a connection broke, and the stream is over.
    pub(super) async fn relay(mut self, time: Duration, enough: impl Fn(&Self) -> bool) -> Option<Self> {
        let until = Instant::now() + time;
        let relayed = timeout_at(until, async {
            while !self.has_fin() && !enough(&self) {
                if self.lanes.step(self.guard.stream(), &())? {
                    self.lanes.turn.go_on().await;
                } else {
                    self.lanes.wait().await?;
                }
            }
            Ok(())
        });
        match relayed.await {
            Ok(Err(error)) => {
                self.break_off(&error);
                None
            }
            Ok(Ok(())) | Err(_) => Some(self),
        }
    }

    /// Whether a peer has finished.
    pub(super) fn has_fin(&self) -> bool {
        self.lanes.fin != [Fin::NotSeen; 2]
    }

    /// Ends the stream after one of its connections broke.
    pub(super) fn break_off(self, error: &Broken) {
        let error: &dyn std::error::Error = error;
        tracing::debug!(stream = self.guard.stream().id, error, "stream broke before its hand-over");
        drop(self.lanes);
        self.guard.ended(End::Reset);
    }
}
