//! Whose the maps are: this process', until it gives them away.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use proxy_common::reason::Reason;
use tokio::time::sleep;

/// Set once the maps are another process'.
const GIVEN_AWAY: u32 = 1 << 31;
/// What is under way is over in microseconds; attaching to an interface takes some milliseconds.
const LOOK: Duration = Duration::from_millis(1);

/// How many are changing the maps now, and whether anybody still may.
#[derive(Debug, Default)]
pub(super) struct Gate(AtomicU32);

/// As long as this lives, the maps stay this process'.
pub(super) struct Kept<'a>(&'a AtomicU32);

impl Gate {
    /// To be asked before the maps are changed in a way that their next owner must see whole, or not at all.
    ///
    /// # Errors
    /// They are not this process' any more.
    pub(super) fn keep(&self) -> Result<Kept<'_>, Reason> {
        let kept = Kept(&self.0);
        if self.0.fetch_add(1, Ordering::AcqRel) & GIVEN_AWAY == 0 {
            Ok(kept)
        } else {
            Err(Reason::TakenOver)
        }
    }

    /// Returns when nobody changes the maps any more, or ever will.
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
    async fn it_closes_when_the_last_one_has_left() {
        let gate = Gate::default();
        let kept = gate.keep().unwrap();
        {
            let mut closing = std::pin::pin!(gate.close());
            let soon = tokio::time::timeout(Duration::from_millis(20), &mut closing).await;
            assert!(soon.is_err() && gate.is_closed());
            assert!(gate.keep().is_err(), "nobody else comes in");
            drop(kept);
            closing.await;
        }
        assert_eq!(gate.keep().err(), Some(Reason::TakenOver));
    }
}
