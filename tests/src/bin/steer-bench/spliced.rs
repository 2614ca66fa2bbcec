//! How many streams of a run the kernel took over, and how soon. Steer's own counters tell.

use anyhow::Result;
use steer_tests::steer::Steer;

use crate::subjects::{Kind, Subject};

/// The histogram of the time from a 101 to the splice, in seconds.
const HISTOGRAM: &str = "steer_splice_seconds_bucket";

/// Counters of a Steer process since its start.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Counters {
    opened: f64,
    handed_over: f64,
    /// The upper bound of each bucket in seconds, and how many values were not above it. Ordered by
    /// bound.
    buckets: Vec<(f64, f64)>,
}

impl Counters {
    /// `None` for subjects that splice no packets.
    pub(crate) fn of(subject: &Subject<'_>) -> Result<Option<Self>> {
        let packet = subject.steer().filter(|_| subject.kind() == Kind::SteerPacket);
        packet.map(Self::read).transpose()
    }

    fn read(steer: &Steer<'_>) -> Result<Self> {
        let handed_over = |how| steer.metric("steer_hand_overs_total", &[("how", how)]);
        Ok(Self {
            opened: steer.metric("steer_streams_opened_total", &[])?,
            handed_over: handed_over("quiet")? + handed_over("busy")?,
            buckets: buckets(&steer.admin_get("/metrics")?.body),
        })
    }

    /// The streams that were handed over since `before`, in percent of those that were opened.
    /// `None` if no stream was opened.
    pub(crate) fn percent_since(&self, before: &Self) -> Option<f64> {
        let opened = self.opened - before.opened;
        (opened > 0.0).then(|| (self.handed_over - before.handed_over) / opened * 100.0)
    }

    /// The median time to the splice since `before`, in microseconds, as exact as the buckets
    /// allow. `None` if no stream was spliced.
    pub(crate) fn median_us_since(&self, before: &Self) -> Option<f64> {
        let earlier = |bound: f64| before.buckets.iter().find(|(other, _)| *other == bound);
        let counts: Vec<_> = self
            .buckets
            .iter()
            .map(|&(bound, count)| (bound, count - earlier(bound).map_or(0.0, |&(_, count)| count)))
            .collect();
        let half = counts.last().filter(|(_, all)| *all > 0.0)?.1 / 2.0;
        let mut below = (0.0, 0.0);
        for (bound, count) in counts {
            if count >= half && bound.is_finite() {
                let (start, passed) = below;
                return Some((start + (bound - start) * (half - passed) / (count - passed)) * 1e6);
            }
            below = (bound, count);
        }
        None
    }
}

fn buckets(metrics: &str) -> Vec<(f64, f64)> {
    let bucket = |line: &str| {
        let (series, count) = line.strip_prefix(HISTOGRAM)?.rsplit_once(' ')?;
        let (_, bound) = series.split_once("le=\"")?;
        let (bound, _) = bound.split_once('"')?;
        // Rust's parser accepts `+Inf`.
        Some((bound.parse().ok()?, count.parse().ok()?))
    };
    metrics.lines().filter_map(bucket).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(text: &str) -> Counters {
        Counters { opened: 0.0, handed_over: 0.0, buckets: buckets(text) }
    }

    #[test]
    fn the_median_is_interpolated_in_its_bucket() {
        let name = HISTOGRAM;
        let text = |counts: [u32; 3]| {
            let [a, b, c] = counts;
            format!(
                "# HELP x\n{name}{{le=\"0.001\"}} {a}\n{name}{{le=\"0.002\"}} {b}\n{name}{{le=\"+Inf\"}} {c}\nx 3\n"
            )
        };
        let (before, after) = (counters(&text([5, 5, 5])), counters(&text([5, 15, 15])));
        assert_eq!(after.median_us_since(&before).map(f64::round), Some(1500.0));
        assert_eq!(before.median_us_since(&before), None);
    }
}
