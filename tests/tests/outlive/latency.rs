//! How long echoes take in the second after each restart, compared with the other seconds.

use std::fmt;
use std::time::{Duration, Instant};

/// The length of a window of time. Echoes of one window are evaluated together.
const WINDOW: Duration = Duration::from_secs(1);

/// The times from message to echo, for the echoes of one window.
type Window = Vec<Duration>;

/// The windows of a whole test.
#[derive(Debug, Default)]
pub(crate) struct Echoes {
    at_restarts: Vec<Window>,
    between: Vec<Window>,
}

impl Echoes {
    /// Adds the echoes that came after the restart at `restart`, and before the next restart. An
    /// echo is the time at which it came, and how long after its message that was.
    pub(crate) fn add(&mut self, restart: Instant, echoes: &[(Instant, Duration)]) {
        let mut windows: Vec<Window> = Vec::new();
        for (came, took) in echoes {
            let index = (came.saturating_duration_since(restart).as_nanos() / WINDOW.as_nanos()) as usize;
            windows.resize_with(windows.len().max(index + 1), Window::new);
            windows[index].push(*took);
        }
        let mut windows = windows.into_iter();
        self.at_restarts.extend(windows.next());
        self.between.extend(windows);
    }
}

impl fmt::Display for Echoes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<20}{:>28}{:>26}", "echoes, in ms", "", "p99 of single seconds")?;
        writeln!(f, "{:<20} number    p50    p99  p99.9    max   lowest  median highest", "")?;
        for (name, windows) in [("seconds of restarts", &self.at_restarts), ("those between", &self.between)]
        {
            let mut all = windows.concat();
            all.sort_unstable();
            let [p50, p99, p999, max] = [0.5, 0.99, 0.999, 1.0].map(|quantile| at(&all, quantile));
            let mut seconds: Vec<_> = windows.iter().map(p99_of).collect();
            seconds.sort_by(f64::total_cmp);
            let [lowest, median, highest] = [0, seconds.len() / 2, seconds.len().saturating_sub(1)]
                .map(|index| seconds.get(index).copied());
            write!(f, "{name:<20} {:>6} {p50:>6.2} {p99:>6.2} {p999:>6.2} {max:>6.2} ", all.len())?;
            for figure in [lowest, median, highest] {
                write!(f, " {:>7.2}", figure.unwrap_or_default())?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

fn p99_of(window: &Window) -> f64 {
    let mut sorted = window.clone();
    sorted.sort_unstable();
    at(&sorted, 0.99)
}

/// A quantile, in milliseconds.
fn at(sorted: &[Duration], quantile: f64) -> f64 {
    let index = (sorted.len().saturating_sub(1) as f64 * quantile).round() as usize;
    sorted.get(index).map_or(0.0, |time| time.as_secs_f64() * 1e3)
}
