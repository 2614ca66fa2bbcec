//! `--check FILE`: is Steer slower than in a stored run, compared with the direct connection?
//!
//! The check compares ratios, not absolute values. So the stored run may be from another hour, but
//! not from another machine: other machines have other ratios.

use std::fmt::Write as _;

use crate::results::{Params, Report};
use crate::subjects::Kind;

/// A smaller change is not reported, however certain it is.
const LEAST: f64 = 0.05;

/// The metrics that are compared, and whether more is better.
const METRICS: [(&str, bool); 9] = [
    ("messages_per_s", true),
    ("requests_per_s", true),
    ("upgrades_per_s", true),
    ("gbit_per_s", true),
    ("p50_us", false),
    ("p99_us", false),
    ("cpu_ms_per_100k", false),
    ("cpu_ms_per_gb", false),
    ("bytes_per_stream", false),
];

/// A ratio to the direct connection, for each round if there are rounds. The value itself if the
/// direct connection does not have the metric.
#[derive(Debug, Clone, PartialEq)]
struct Ratio {
    /// The ratio of the medians.
    value: f64,
    /// The bounds of the middle half of the rounds.
    low: f64,
    high: f64,
}

/// What became worse: one line for each, none if nothing did. Also how many values were compared.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) compared: usize,
    pub(crate) regressions: Vec<String>,
}

/// A regression is worse by more than [`LEAST`], and the middle halves of the rounds do not
/// overlap.
pub(crate) fn compare(stored: &Report, now: &Report) -> Verdict {
    let mut verdict = Verdict::default();
    for case in now.cases() {
        for kind in Kind::ALL.into_iter().filter(|kind| kind.is_steer()) {
            for (metric, more_is_better) in METRICS {
                let both = ratio(stored, case, kind, metric).zip(ratio(now, case, kind, metric));
                let Some((before, after)) = both else { continue };
                verdict.compared += 1;
                let (change, apart) = if more_is_better {
                    (before.value / after.value - 1.0, after.high < before.low)
                } else {
                    (after.value / before.value - 1.0, after.low > before.high)
                };
                if change > LEAST && apart {
                    verdict.regressions.push(line(case, kind, metric, &before, &after));
                }
            }
        }
    }
    verdict
}

fn line(case: (&str, &Params), kind: Kind, metric: &str, before: &Ratio, after: &Ratio) -> String {
    let mut text = case.0.to_owned();
    for (name, value) in case.1 {
        // Writing to a string cannot fail.
        write!(text, " {name}={value}").ok();
    }
    let change = (after.value / before.value - 1.0) * 100.0;
    format!(
        "{text} {kind} {metric}: {:.3} ({:.3} to {:.3}), was {:.3} ({:.3} to {:.3}), {change:+.0} %",
        after.value, after.low, after.high, before.value, before.low, before.high
    )
}

fn ratio(report: &Report, case: (&str, &Params), kind: Kind, metric: &str) -> Option<Ratio> {
    let of = |kind: Kind| report.series(case, kind.name(), metric);
    let steer = of(kind)?;
    let Some(direct) = of(Kind::Direct) else {
        let (low, high) = middle_half(steer.runs.clone())?;
        return Some(Ratio { value: steer.median, low, high });
    };
    // Both values of a round were measured shortly after each other, under the same conditions.
    let by_round = steer.runs.iter().zip(&direct.runs).map(|(steer, direct)| steer / direct).collect();
    let (low, high) = middle_half(by_round)?;
    let value = steer.median / direct.median;
    value.is_finite().then_some(Ratio { value, low, high })
}

/// The least and the greatest value without the lower and the upper quarter.
fn middle_half(mut values: Vec<f64>) -> Option<(f64, f64)> {
    values.retain(|value| value.is_finite());
    values.sort_by(f64::total_cmp);
    let skipped = values.len() / 4;
    Some((*values.get(skipped)?, *values.get(values.len() - 1 - skipped)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::nowhere;
    use crate::results::Series;

    fn report(steer: [f64; 5]) -> Report {
        let params = Params::new();
        let series = |subject, metric, runs: [f64; 5]| {
            Series::new(("echo", &params), subject, metric, runs.to_vec(), vec![0.0; 5])
        };
        let results = vec![
            series("direct", "messages_per_s", [100.0, 110.0, 90.0, 100.0, 100.0]),
            series("steer-packet", "messages_per_s", steer),
        ];
        Report { host: nowhere(), results, left_out: Vec::new() }
    }

    #[test]
    fn a_clear_loss_is_a_regression_and_noise_or_a_gain_is_not() {
        let stored = report([100.0, 110.0, 90.0, 95.0, 100.0]);
        assert_eq!(compare(&stored, &stored).compared, 1);
        for fine in [[99.0, 108.0, 60.0, 96.0, 101.0], [130.0; 5], [97.0, 105.0, 88.0, 97.0, 96.0]] {
            assert_eq!(compare(&stored, &report(fine)).regressions, Vec::<String>::new());
        }
        let lost = compare(&stored, &report([80.0, 85.0, 70.0, 80.0, 81.0])).regressions;
        assert_eq!(lost.len(), 1);
        assert!(lost[0].contains("steer-packet messages_per_s: 0.800"), "{}", lost[0]);
    }
}
