//! The share of the live streams that the kernel carries, and why it does not carry the others.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proxy_common::reason::Reason;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, interval_at};

use crate::streams::{Path, Stream, Streams};
use crate::telemetry::Metrics;

/// A younger stream may still be on its way to the kernel, so it does not count.
const SETTLED: Duration = Duration::from_secs(1);
const LOG_EVERY: Duration = Duration::from_secs(3600);

/// The settled streams of one cluster. A row of `/flows/summary`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Coverage {
    pub cluster: String,
    /// Live streams that are older than a second.
    pub streams: u64,
    /// Those of `streams` that the kernel carries.
    pub spliced: u64,
    /// The rest of `streams`, by reason; the largest group comes first.
    pub relayed: Vec<Relayed>,
}

/// The settled streams that are relayed for one reason.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Relayed {
    /// A label of [`Reason`]; `null`: the configuration asks for the relay, or the hand-over of the
    /// streams is not over.
    pub reason: Option<String>,
    pub streams: u64,
    /// What an operator can do, so that further streams are spliced.
    pub fix: Option<String>,
}

impl Coverage {
    /// From 0 to 1. A cluster without a settled stream is not listed.
    pub fn ratio(&self) -> f64 {
        self.spliced as f64 / self.streams as f64
    }
}

/// Looks at all live streams. The result is sorted by the names of the clusters.
pub fn survey(streams: &Streams) -> Vec<Coverage> {
    let alive = streams.snapshot();
    of(alive.iter().filter(|stream| stream.age() > SETTLED).map(|stream| seen(stream)))
}

/// The cluster of a stream and, if the stream is relayed, the reason.
type Seen<'s> = (&'s str, Result<(), Option<Reason>>);

fn seen(stream: &Stream) -> Seen<'_> {
    let relayed = stream.path() == Path::Relay;
    (&stream.info.cluster, if relayed { Err(stream.reason()) } else { Ok(()) })
}

fn of<'s>(streams: impl Iterator<Item = Seen<'s>>) -> Vec<Coverage> {
    let mut clusters = BTreeMap::<_, (u64, BTreeMap<Option<&str>, (u64, Option<&str>)>)>::new();
    for (cluster, carried) in streams {
        let (spliced, relayed) = clusters.entry(cluster).or_default();
        match carried {
            Ok(()) => *spliced += 1,
            Err(reason) => {
                let fix = reason.and_then(super::fix);
                relayed.entry(reason.map(Reason::as_str)).or_insert((0, fix)).0 += 1;
            }
        }
    }
    let coverage = |(cluster, (spliced, relayed)): (&str, (u64, BTreeMap<_, _>))| {
        let mut relayed: Vec<_> = relayed
            .into_iter()
            .map(|(reason, (streams, fix)): (Option<&str>, (u64, Option<&str>))| Relayed {
                reason: reason.map(str::to_owned),
                streams,
                fix: fix.map(str::to_owned),
            })
            .collect();
        relayed.sort_by_key(|group| std::cmp::Reverse(group.streams));
        let streams = spliced + relayed.iter().map(|group| group.streams).sum::<u64>();
        Coverage { cluster: cluster.to_owned(), streams, spliced, relayed }
    };
    clusters.into_iter().map(coverage).collect()
}

/// Brings `steer_splice_coverage_ratio` up to date; called before a scrape.
pub fn publish(streams: &Streams, metrics: &Metrics) {
    // A cluster without streams has no share.
    metrics.splice_coverage.reset();
    for coverage in survey(streams) {
        metrics.splice_coverage.with_label_values(&[&coverage.cluster]).set(coverage.ratio());
    }
}

/// Logs the share of each cluster once an hour. Never returns.
pub async fn log_hourly(streams: Arc<Streams>) {
    let mut hours = interval_at(Instant::now() + LOG_EVERY, LOG_EVERY);
    loop {
        hours.tick().await;
        for coverage in survey(&streams) {
            let most = coverage.relayed.first();
            tracing::info!(
                cluster = coverage.cluster,
                streams = coverage.streams,
                spliced = coverage.spliced,
                relayed = describe(&coverage.relayed),
                fix = most.and_then(|group| group.fix.as_deref()),
                "share of the streams that the kernel carries; /flows/summary has every reason with its fix"
            );
        }
    }
}

/// The groups in words: `timestamps_differ 12, no reason 1`. Empty if no stream is relayed.
pub fn describe(relayed: &[Relayed]) -> String {
    let text = |Relayed { reason, streams, .. }: &Relayed| {
        format!("{} {streams}", reason.as_deref().unwrap_or("no reason"))
    };
    relayed.iter().map(text).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_counted_by_cluster_and_reason_with_the_largest_group_first() {
        let seen = [
            ("b", Ok(())),
            ("a", Err(Some(Reason::FamiliesDiffer))),
            ("a", Err(Some(Reason::Conntrack))),
            ("a", Ok(())),
            ("a", Err(Some(Reason::Conntrack))),
            ("a", Err(None)),
        ];
        let found = of(seen.into_iter());
        assert_eq!(
            found.iter().map(|c| (&*c.cluster, c.streams, c.spliced)).collect::<Vec<_>>(),
            [("a", 5, 1), ("b", 1, 1)]
        );
        assert!((found[0].ratio() - 0.2).abs() < 1e-9 && (found[1].ratio() - 1.0).abs() < 1e-9);
        let groups: Vec<_> = found[0].relayed.iter().map(|g| (g.reason.as_deref(), g.streams)).collect();
        assert_eq!(groups, [(Some("conntrack"), 2), (None, 1), (Some("families_differ"), 1)]);
        assert!(found[0].relayed[0].fix.as_ref().unwrap().contains("notrack"));
        assert_eq!(describe(&found[0].relayed), "conntrack 2, no reason 1, families_differ 1");
        assert_eq!(describe(&found[1].relayed), "");
    }
}
