//! Prints on standard error what has been done and how long the rest will take.

use std::time::{Duration, Instant};

/// Counts runs, and compares their time with the plan.
#[derive(Debug)]
pub(crate) struct Progress {
    begin: Instant,
    done: usize,
    all: usize,
    /// The planned time of what is done, and of what is left.
    planned_done: Duration,
    planned_left: Duration,
}

impl Progress {
    /// For `all` runs that will take about `planned`, including the work after them.
    pub(crate) fn new(all: usize, planned: Duration) -> Self {
        let nothing = Duration::ZERO;
        Self { begin: Instant::now(), done: 0, all, planned_done: nothing, planned_left: planned }
    }

    /// A run is done or left out. Its planned time was `planned`.
    pub(crate) fn advance(&mut self, planned: Duration) {
        self.done += 1;
        self.planned_done += planned;
        self.planned_left = self.planned_left.saturating_sub(planned);
    }

    /// The time that is left at the pace so far.
    pub(crate) fn left(&self) -> Duration {
        let pace = if self.planned_done.is_zero() {
            1.0
        } else {
            self.begin.elapsed().as_secs_f64() / self.planned_done.as_secs_f64()
        };
        self.planned_left.mul_f64(pace)
    }

    /// The time that everything will have taken at the pace so far.
    pub(crate) fn total(&self) -> Duration {
        self.begin.elapsed() + self.left()
    }

    /// Prints a line about what was just done.
    pub(crate) fn say(&self, what: &str) {
        let left = self.left().as_secs();
        eprintln!("[{:>3}/{}] {:>2}:{:02} left  {what}", self.done + 1, self.all, left / 60, left % 60);
    }
}
