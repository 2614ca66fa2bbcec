//! Every metric of Steer, by name. Only the metrics of what BPF programs count are elsewhere: the
//! module that loads the programs [registers](Metrics::register) them. Labels are clusters,
//! endpoints, listeners and closed enums; never a client.

use std::sync::Arc;

use prometheus::{
    Encoder, GaugeVec, Histogram, HistogramOpts, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder,
};

#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    pub downstream_connections: IntGaugeVec,
    pub downstream_connections_total: IntCounterVec,
    pub requests: IntCounterVec,
    pub faults: IntCounterVec,
    pub request_seconds: Histogram,
    pub picks: IntCounterVec,
    pub ring_version: IntGaugeVec,
    pub endpoints: IntGaugeVec,
    pub upstream_connects: IntCounterVec,
    pub streams: IntGaugeVec,
    pub streams_opened: IntCounterVec,
    pub streams_adopted: IntCounterVec,
    pub streams_closed: IntCounterVec,
    pub stream_bytes: IntCounterVec,
    pub splice_fallbacks: IntCounterVec,
    pub splice_coverage: GaugeVec,
    pub sock_gated: IntCounterVec,
    pub packet_streams: IntGaugeVec,
    pub source_ports: IntGaugeVec,
    pub hand_overs: IntCounterVec,
    pub hand_over_seconds: Histogram,
    pub splice_seconds: Histogram,
}

impl Metrics {
    pub fn new() -> Arc<Self> {
        let registry = Registry::new();
        let counter = |name, help, labels: &[&str]| {
            registered(&registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let gauge = |name, help, labels: &[&str]| {
            registered(&registry, IntGaugeVec::new(Opts::new(name, help), labels))
        };

        let metrics = Self {
            downstream_connections: gauge(
                "steer_downstream_connections",
                "Downstream HTTP connections open now (an upgraded one counts as a stream instead).",
                &["listener"],
            ),
            downstream_connections_total: counter(
                "steer_downstream_connections_total",
                "Downstream connections accepted.",
                &["listener"],
            ),
            requests: counter(
                "steer_requests_total",
                "Requests answered, by status code; cluster is empty where no route matched.",
                &["cluster", "code"],
            ),
            faults: counter(
                "steer_faults_total",
                "Requests that Steer answered itself, or connections it closed, by cause.",
                &["kind"],
            ),
            request_seconds: registered(
                &registry,
                Histogram::with_opts(
                    HistogramOpts::new(
                        "steer_request_duration_seconds",
                        "From a request's head to its response's head (for an upgrade: to the 101).",
                    )
                    .buckets(vec![
                        0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
                        30.0,
                    ]),
                ),
            ),
            picks: counter(
                "steer_endpoint_picks_total",
                "Requests sent to an endpoint, by how it was chosen: hash, or random if the request had no key.",
                &["cluster", "endpoint", "by"],
            ),
            ring_version: gauge(
                "steer_ring_version",
                "Version of the cluster's ring or table; grows by one with each change.",
                &["cluster"],
            ),
            endpoints: gauge(
                "steer_endpoints",
                "Endpoints of the cluster; in_ring says whether they get requests.",
                &["cluster", "in_ring"],
            ),
            upstream_connects: counter(
                "steer_upstream_connects_total",
                "Connections opened to endpoints, by result: ok, refused, timeout, error.",
                &["cluster", "result"],
            ),
            streams: gauge(
                "steer_streams",
                "Upgraded streams alive now, by what carries them.",
                &["cluster", "path"],
            ),
            streams_opened: counter("steer_streams_opened_total", "Upgraded streams opened.", &["cluster"]),
            streams_adopted: counter(
                "steer_streams_adopted_total",
                "Upgraded streams taken over from an earlier process.",
                &["cluster"],
            ),
            streams_closed: counter(
                "steer_streams_closed_total",
                "Upgraded streams that ended, by how they ended.",
                &["cluster", "end"],
            ),
            stream_bytes: counter(
                "steer_stream_bytes_total",
                "Payload bytes of upgraded streams, live ones included.",
                &["cluster", "direction"],
            ),
            splice_fallbacks: counter(
                "steer_splice_fallback_total",
                "Streams (socket splice: also single directions) that are relayed instead of spliced, by reason.",
                &["reason"],
            ),
            splice_coverage: registered(
                &registry,
                GaugeVec::new(
                    Opts::new(
                        "steer_splice_coverage_ratio",
                        "Share of the streams older than a second that the kernel carries, 0 to 1.",
                    ),
                    &["cluster"],
                ),
            ),
            sock_gated: counter(
                "steer_sock_splice_gated_total",
                "Directions that left the socket splice for the relay because their reader fell behind.",
                &["cluster"],
            ),
            packet_streams: gauge(
                "steer_packet_streams",
                "Records of the packet splice: those in use (used), and the most that fit (limit).",
                &["kind"],
            ),
            source_ports: gauge(
                "steer_source_ports",
                "Source ports for streams to the endpoint, over all source addresses: those in use (used), and all (limit).",
                &["endpoint", "kind"],
            ),
            hand_overs: counter(
                "steer_hand_overs_total",
                "Streams handed to the packet splice, by how: quiet or busy streams, or failed or expired hand-overs.",
                &["how"],
            ),
            hand_over_seconds: registered(
                &registry,
                Histogram::with_opts(
                    HistogramOpts::new(
                        "steer_hand_over_duration_seconds",
                        "From the decision for the packet splice until the stream's sockets are closed.",
                    )
                    .buckets(vec![
                        0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
                    ]),
                ),
            ),
            splice_seconds: registered(
                &registry,
                Histogram::with_opts(
                    HistogramOpts::new(
                        "steer_splice_seconds",
                        "From the relayed 101 until the kernel alone carries the stream's packets.",
                    )
                    .buckets(vec![
                        0.0001, 0.001, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.045, 0.05, 0.06,
                        0.08, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0,
                    ]),
                ),
            ),
            registry,
        };
        metrics.add_build_info();
        Arc::new(metrics)
    }

    fn add_build_info(&self) {
        let info = registered(
            &self.registry,
            IntGaugeVec::new(
                Opts::new("steer_build_info", "Always 1; the version is in the label."),
                &["version"],
            ),
        );
        info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
    }

    /// Adds a collector, which is asked for its metrics at each scrape.
    pub fn register(&self, collector: Box<dyn prometheus::core::Collector>) -> prometheus::Result<()> {
        self.registry.register(collector)
    }

    /// Removes a collector that [`register`](Self::register) has added.
    pub fn unregister(&self, collector: Box<dyn prometheus::core::Collector>) -> prometheus::Result<()> {
        self.registry.unregister(collector)
    }

    /// All metrics in Prometheus' text format.
    pub fn render(&self) -> String {
        let mut text = Vec::new();
        // Encoding fails only for a metric family without a name or samples, which `register`
        // refuses, or if the writer fails, but a Vec does not fail.
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            tracing::error!(%error, "cannot encode the metrics");
        }
        String::from_utf8_lossy(&text).into_owned()
    }
}

/// Names, labels and help texts are constants above. So a panic here is a mistake in this file, and
/// every start shows it.
fn registered<C>(registry: &Registry, collector: prometheus::Result<C>) -> C
where
    C: prometheus::core::Collector + Clone + 'static,
{
    let collector = collector.expect("metric descriptions are valid");
    registry.register(Box::new(collector.clone())).expect("metric names are unique");
    collector
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rendering_is_prometheus_text() {
        let metrics = Metrics::new();
        metrics.picks.with_label_values(&["sio", "192.0.2.9:3000", "hash"]).inc();
        let text = metrics.render();
        assert!(
            text.contains(
                "steer_endpoint_picks_total{by=\"hash\",cluster=\"sio\",endpoint=\"192.0.2.9:3000\"} 1\n"
            ),
            "{text}"
        );
        assert!(text.contains("# TYPE steer_endpoint_picks_total counter\n"), "{text}");
        assert!(text.contains("steer_build_info{version=\""), "{text}");
    }
}
