//! How long echoes take around restarts, and in between.

use std::fmt;
use std::time::{Duration, Instant};

/// The part of the time between two restarts that belongs to the earlier one; the rest is compared with it.
const AT: Duration = Duration::from_secs(1);

/// When echoes came, and how long after their messages.
#[derive(Debug, Default)]
pub(crate) struct Echoes {
    at_restarts: Vec<Duration>,
    between: Vec<Duration>,
}

impl Echoes {
    /// Adds those that came after the restart that began at `restart`, and before the next one.
    pub(crate) fn add(&mut self, restart: Instant, echoes: &[(Instant, Duration)]) {
        for (came, took) in echoes {
            let times = if *came < restart + AT { &mut self.at_restarts } else { &mut self.between };
            times.push(*took);
        }
    }
}

impl fmt::Display for Echoes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "echoes                       number      p50      p99    p99.9      max, ms")?;
        for (name, times) in
            [("in the second of a restart", &self.at_restarts), ("in between", &self.between)]
        {
            let mut sorted = times.clone();
            sorted.sort_unstable();
            let [p50, p99, p999, max] = [0.5, 0.99, 0.999, 1.0].map(|quantile| at(&sorted, quantile));
            writeln!(f, "{name:<26} {:>8} {p50:>8.2} {p99:>8.2} {p999:>8.2} {max:>8.2}", sorted.len())?;
        }
        Ok(())
    }
}

/// In milliseconds.
fn at(sorted: &[Duration], quantile: f64) -> f64 {
    let index = (sorted.len().saturating_sub(1) as f64 * quantile).round() as usize;
    sorted.get(index).map_or(0.0, |time| time.as_secs_f64() * 1e3)
}
