//! The metrics of streams. A stream finds the metrics of its cluster once, when it is opened.

use std::sync::atomic::Ordering;

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec};
use strum::VariantArray as _;

use super::{End, Path, Stream};
use crate::telemetry::Metrics;

/// The directions of `steer_stream_bytes_total`, in the order of [`Counts::bytes`].
const DIRECTIONS: [&str; 2] = ["to_upstream", "to_downstream"];

/// The metrics of all clusters.
#[derive(Debug)]
pub(super) struct Families {
    alive: IntGaugeVec,
    opened: IntCounterVec,
    adopted: IntCounterVec,
    closed: IntCounterVec,
    bytes: IntCounterVec,
}

/// The metrics of one cluster.
#[derive(Debug)]
pub(super) struct Counts {
    /// By [`Path`].
    alive: Vec<IntGauge>,
    pub(super) opened: IntCounter,
    pub(super) adopted: IntCounter,
    /// By [`End`].
    closed: Vec<IntCounter>,
    bytes: [IntCounter; 2],
}

impl Families {
    pub(super) fn new(metrics: &Metrics) -> Self {
        Self {
            alive: metrics.streams.clone(),
            opened: metrics.streams_opened.clone(),
            adopted: metrics.streams_adopted.clone(),
            closed: metrics.streams_closed.clone(),
            bytes: metrics.stream_bytes.clone(),
        }
    }

    pub(super) fn of_cluster(&self, cluster: &str) -> Counts {
        let alive = |path: &Path| self.alive.with_label_values(&[cluster, path.into_str()]);
        let closed = |end: &End| self.closed.with_label_values(&[cluster, end.into_str()]);
        Counts {
            alive: Path::VARIANTS.iter().map(alive).collect(),
            opened: self.opened.with_label_values(&[cluster]),
            adopted: self.adopted.with_label_values(&[cluster]),
            closed: End::VARIANTS.iter().map(closed).collect(),
            bytes: DIRECTIONS.map(|direction| self.bytes.with_label_values(&[cluster, direction])),
        }
    }
}

impl Counts {
    pub(super) fn alive(&self, path: Path) -> &IntGauge {
        &self.alive[path as usize]
    }

    pub(super) fn closed(&self, end: End) -> &IntCounter {
        &self.closed[end as usize]
    }

    /// Brings the payload bytes up to date with a stream of the cluster.
    pub(super) fn publish_bytes(&self, stream: &Stream) {
        for ((published, now), counter) in stream.published.iter().zip(stream.bytes()).zip(&self.bytes) {
            // fetch_max, so that two scrapes at once count no byte twice.
            let before = published.fetch_max(now, Ordering::Relaxed);
            counter.inc_by(now.saturating_sub(before));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_path_and_each_end_has_its_own_series() {
        let metrics = Metrics::new();
        let counts = Families::new(&metrics).of_cluster("sio");
        for path in Path::VARIANTS {
            counts.alive(*path).inc();
            assert_eq!(metrics.streams.with_label_values(&["sio", path.into_str()]).get(), 1);
        }
        for end in End::VARIANTS {
            counts.closed(*end).inc();
            assert_eq!(metrics.streams_closed.with_label_values(&["sio", end.into_str()]).get(), 1);
        }
    }
}
