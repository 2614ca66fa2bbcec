//! `steer_sock_map_entries`: the entries in the kernel's maps, counted at each scrape.

use std::sync::Arc;

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntGaugeVec, Opts};
use steer_kernel::bpf::sock::maps::SockMaps;

pub(super) struct MapEntries {
    maps: Arc<SockMaps>,
    gauge: IntGaugeVec,
}

impl MapEntries {
    pub(super) fn new(maps: Arc<SockMaps>) -> prometheus::Result<Self> {
        let opts = Opts::new(
            "steer_sock_map_entries",
            "Entries of the socket splice's BPF maps; all 0 while no stream is spliced.",
        );
        Ok(Self { maps, gauge: IntGaugeVec::new(opts, &["map"])? })
    }
}

impl Collector for MapEntries {
    fn desc(&self) -> Vec<&Desc> {
        self.gauge.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let entries = self.maps.entries();
        for (map, count) in [
            ("target", entries.target),
            ("source", entries.source),
            ("flow", entries.flow),
            ("credit", entries.credit),
        ] {
            self.gauge.with_label_values(&[map]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.gauge.collect()
    }
}
