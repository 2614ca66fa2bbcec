//! `steer_packet_total`: what the programs count, read at each scrape.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, Opts};
use proxy_common::stat::Stat;

use super::owned_record::RecordPool;

#[derive(Debug, Clone)]
pub(super) struct Counters {
    records: Arc<RecordPool>,
    totals: IntCounterVec,
    /// The counts at the last scrape. Locked, since two scrapes at once must not count a packet
    /// twice.
    before: Arc<Mutex<HashMap<Stat, u64>>>,
}

impl Counters {
    pub(super) fn new(records: Arc<RecordPool>) -> prometheus::Result<Self> {
        let opts = Opts::new(
            "steer_packet_total",
            "Packets that the packet splice's programs saw, by what became of them.",
        );
        Ok(Self { records, totals: IntCounterVec::new(opts, &["what"])?, before: Arc::default() })
    }
}

impl Collector for Counters {
    fn desc(&self) -> Vec<&Desc> {
        self.totals.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        match self.records.kernel.stats() {
            Ok(stats) => {
                let mut before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
                for (stat, now) in stats {
                    let before = before.insert(stat, now).unwrap_or(0);
                    self.totals.with_label_values(&[stat.as_str()]).inc_by(now.saturating_sub(before));
                }
            }
            Err(error) => tracing::warn!(%error, "cannot read the counts of the programs"),
        }
        self.totals.collect()
    }
}
