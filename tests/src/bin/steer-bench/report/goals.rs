//! The goals of the packet splice compared with the other subjects, and whether it reaches them.

use serde_json::Value;

use crate::results::{Report, Series};
use crate::subjects::Kind;

/// A metric of one case or of several. The worst case counts.
pub(super) struct Measure {
    pub(super) what: &'static str,
    workload: &'static str,
    metric: &'static str,
    /// The numbers among the parameters of its cases. 0: the case does not have the parameter.
    params: &'static [(&'static str, u64)],
    pub(super) better: Better,
    pub(super) goals: &'static [Goal],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Better {
    More,
    Less,
}

/// The bound for the ratio to a subject, or for the value itself if there is no subject.
pub(super) type Goal = (Option<Kind>, f64);

pub(super) const MEASURES: [Measure; 10] = [
    Measure {
        what: "Echo of 64 B on 100 WebSockets: messages/s",
        workload: "echo",
        metric: "messages_per_s",
        params: &[("connections", 100), ("bytes", 64), ("rate", 0)],
        better: Better::More,
        goals: &[
            (Some(Kind::Direct), 0.95),
            (Some(Kind::Haproxy), 1.5),
            (Some(Kind::Nginx), 1.5),
            (Some(Kind::Envoy), 2.2),
        ],
    },
    Measure {
        what: "The same: p99 latency",
        workload: "echo",
        metric: "p99_us",
        params: &[("connections", 100), ("bytes", 64), ("rate", 0)],
        better: Better::Less,
        goals: &[(Some(Kind::Direct), 1.15)],
    },
    Measure {
        what: "Echo of 64 B on 100 WebSockets, also at a given rate: CPU time of the machine per message",
        workload: "echo",
        metric: "cpu_ms_per_100k",
        params: &[("connections", 100), ("bytes", 64)],
        better: Better::Less,
        goals: &[(Some(Kind::Direct), 1.05)],
    },
    Measure {
        what: "The same: CPU time of the proxy's process, ms in a second",
        workload: "echo",
        metric: "process_cpu_ms",
        params: &[("connections", 100), ("bytes", 64), ("rate", 0)],
        better: Better::Less,
        // One tick of the kernel's clock.
        goals: &[(None, 4.0)],
    },
    Measure {
        what: "Echo of 64 B on 1 WebSocket: median latency",
        workload: "echo",
        metric: "p50_us",
        params: &[("connections", 1), ("bytes", 64)],
        better: Better::Less,
        goals: &[(Some(Kind::Direct), 1.05)],
    },
    Measure {
        what: "Bulk: Gbit/s",
        workload: "bulk",
        metric: "gbit_per_s",
        params: &[],
        better: Better::More,
        goals: &[
            (Some(Kind::Direct), 0.95),
            (Some(Kind::Haproxy), 2.0),
            (Some(Kind::Nginx), 2.0),
            (Some(Kind::Envoy), 2.0),
        ],
    },
    Measure {
        what: "Upgrades/s",
        workload: "upgrades",
        metric: "upgrades_per_s",
        params: &[],
        better: Better::More,
        goals: &[(Some(Kind::Haproxy), 1.0), (Some(Kind::Envoy), 2.0)],
    },
    Measure {
        what: "Polling: requests/s",
        workload: "polling",
        metric: "requests_per_s",
        params: &[],
        better: Better::More,
        goals: &[(Some(Kind::Haproxy), 0.9), (Some(Kind::Nginx), 1.0), (Some(Kind::Envoy), 2.0)],
    },
    Measure {
        what: "Memory for each of 5,000 idle WebSockets, bytes",
        workload: "memory",
        metric: "bytes_per_stream",
        params: &[("connections", 5000)],
        better: Better::Less,
        goals: &[(None, 1024.0)],
    },
    Measure {
        what: "Memory for each further one, bytes",
        workload: "memory",
        metric: "further_stream_bytes",
        params: &[],
        better: Better::Less,
        goals: &[(None, 1024.0)],
    },
];

impl Measure {
    /// The packet splice as a multiple of `base`: the worst of all cases in which both were
    /// measured.
    pub(super) fn ratio(&self, report: &Report, base: Kind) -> Option<f64> {
        let base = |ours: &Series| {
            let is_it = |it: &&Series| {
                (&it.workload, &it.metric, &it.params) == (&ours.workload, &ours.metric, &ours.params)
                    && it.subject == base.name()
            };
            report.results.iter().find(is_it).map(|it| it.median)
        };
        let of_each = |ours: &Series| base(ours).filter(|base| *base > 0.0).map(|base| ours.median / base);
        self.worst(self.series(report, Kind::SteerPacket).filter_map(of_each))
    }

    /// The value itself: the worst of all cases.
    pub(super) fn value(&self, report: &Report, subject: Kind) -> Option<f64> {
        self.worst(self.series(report, subject).map(|series| series.median))
    }

    fn series<'a>(&'a self, report: &'a Report, subject: Kind) -> impl Iterator<Item = &'a Series> {
        report.results.iter().filter(move |series| {
            let has = |(name, number): &(&str, u64)| {
                series.params.get(*name).map_or(Some(0), Value::as_u64) == Some(*number)
            };
            series.workload == self.workload
                && series.metric == self.metric
                && series.subject == subject.name()
                && self.params.iter().all(has)
        })
    }

    fn worst(&self, values: impl Iterator<Item = f64>) -> Option<f64> {
        match self.better {
            Better::More => values.reduce(f64::min),
            Better::Less => values.reduce(f64::max),
        }
    }

    /// Whether `value` is within `bound`.
    pub(super) fn reaches(&self, value: f64, bound: f64) -> bool {
        match self.better {
            Better::More => value >= bound,
            Better::Less => value <= bound,
        }
    }
}
