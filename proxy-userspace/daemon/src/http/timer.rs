//! The one timer of a connection, which all of its time limits share.

use std::future::Future as _;
use std::pin::Pin;
use std::task::Context;
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

/// A deadline that every other one is before.
const NEVER: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

#[derive(Debug)]
pub(super) struct Timer {
    sleep: Pin<Box<Sleep>>,
}

impl Timer {
    pub(super) fn new() -> Self {
        Self { sleep: Box::pin(sleep_until(Instant::now() + NEVER)) }
    }

    /// Whether `deadline` has passed; if not, the task of `cx` is woken then. `None`: never.
    pub(super) fn has_passed(&mut self, cx: &mut Context<'_>, deadline: Option<std::time::Instant>) -> bool {
        let Some(deadline) = deadline.map(Instant::from_std) else { return false };
        // A deadline moves with each request, mostly further away: the timer learns that when it
        // fires.
        if deadline < self.sleep.deadline() {
            self.sleep.as_mut().reset(deadline);
        }
        while self.sleep.as_mut().poll(cx).is_ready() {
            if self.sleep.deadline() >= deadline {
                return true;
            }
            self.sleep.as_mut().reset(deadline);
        }
        false
    }
}
