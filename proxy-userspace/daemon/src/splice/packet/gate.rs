//! Guards changes of the maps: this process may change them until it gives them to another process.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use proxy_common::reason::Reason;
use tokio::time::sleep;

/// Set once the maps belong to another process.
const GIVEN_AWAY: u32 = 1 << 31;
/// How often [`Gate::close`] looks. Most changes take microseconds; attaching to an interface takes
/// some milliseconds.
const LOOK: Duration = Duration::from_millis(1);

/// The number of changes of the maps that run now, and whether further changes may begin.
#[derive(Debug, Default)]
pub(super) struct Gate(AtomicU32);

/// As long as this value lives, the maps stay with this process.
pub(super) struct Kept<'a>(&'a AtomicU32);

impl Gate {
    /// To be called before a change of the maps that the next owner must see either whole or not at
    /// all.
    ///
    /// # Errors
    /// The maps belong to another process.
    pub(super) fn keep(&self) -> Result<Kept<'_>, Reason> {
        let kept = Kept(&self.0);
        if self.0.fetch_add(1, Ordering::AcqRel) & GIVEN_AWAY == 0 {
            Ok(kept)
        } else {
            Err(Reason::TakenOver)
        }
    }

    /// Lets no further change begin, and returns when the last running change is over.
    pub(super) async fn close(&self) {
        self.0.fetch_or(GIVEN_AWAY, Ordering::AcqRel);
        while self.0.load(Ordering::Acquire) != GIVEN_AWAY {
            sleep(LOOK).await;
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.0.load(Ordering::Acquire) & GIVEN_AWAY != 0
    }
}

impl Drop for Kept<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_gate_is_closed_when_the_last_change_is_over() {
        let gate = Gate::default();
        let kept = gate.keep().unwrap();
        {
            let mut closing = std::pin::pin!(gate.close());
            let soon = tokio::time::timeout(Duration::from_millis(20), &mut closing).await;
            assert!(soon.is_err() && gate.is_closed());
            assert!(gate.keep().is_err(), "no further change begins");
            drop(kept);
            closing.await;
        }
        assert_eq!(gate.keep().err(), Some(Reason::TakenOver));
    }
}
