//! Waits until something becomes true, with a deadline. No test sleeps for a guessed time.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

const INTERVAL: Duration = Duration::from_millis(20);

/// Calls `probe` until it returns `Ok(Some(value))`, and returns that value. Fails at once when
/// `probe` fails, because waiting does not help then. Fails after `patience` with `what` in the
/// text.
pub fn eventually<T>(
    what: &str,
    patience: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(value) = probe().with_context(|| format!("while waiting for {what}"))? {
            return Ok(value);
        }
        anyhow::ensure!(Instant::now() < deadline, "no {what} within {patience:?}");
        std::thread::sleep(INTERVAL);
    }
}
