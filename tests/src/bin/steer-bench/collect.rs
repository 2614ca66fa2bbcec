//! Turns the runs of a case into its series.

use crate::plan::Case;
use crate::results::{Series, median};
use crate::spec::{Measured, Work};
use crate::subjects::Kind;

/// A run that counts.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    pub(crate) measured: Measured,
    /// See module `spliced`.
    pub(crate) spliced_percent: Option<f64>,
    pub(crate) splice_us: Option<f64>,
}

impl Run {
    /// The share of the machine's time that the hypervisor gave to other guests.
    pub(crate) fn steal_percent(&self) -> f64 {
        let cpu = &self.measured.machine;
        let all = cpu.user + cpu.system + cpu.interrupts + cpu.idle + cpu.steal;
        if all > 0.0 { cpu.steal / all * 100.0 } else { 0.0 }
    }

    /// Operations per second. For bulk: Gbit per second.
    pub(crate) fn rate(&self, work: Work) -> f64 {
        match work {
            Work::Bulk { .. } => self.measured.bytes as f64 * 8.0 / 1e9 / self.measured.seconds,
            _ => self.measured.operations as f64 / self.measured.seconds,
        }
    }

    /// Milliseconds of all processors for 100,000 operations. For bulk: for 10^9 bytes.
    fn cpu(&self, work: Work) -> f64 {
        let cpu = &self.measured.machine;
        let amount = match work {
            Work::Bulk { .. } => self.measured.bytes as f64 / 1e9,
            _ => self.measured.operations as f64 / 1e5,
        };
        (cpu.user + cpu.system + cpu.interrupts) / amount
    }
}

/// The name of [`Run::rate`] among the metrics.
pub(crate) const fn rate_metric(work: Work) -> &'static str {
    match work {
        Work::Echo { .. } | Work::FanOut { .. } => "messages_per_s",
        Work::Bulk { .. } => "gbit_per_s",
        Work::Polling { .. } => "requests_per_s",
        Work::Upgrades { .. } | Work::Hold { .. } => "upgrades_per_s",
    }
}

/// All metrics of all subjects that have runs.
pub(crate) fn series(case: &Case, runs: &[(Kind, Vec<Run>)]) -> Vec<Series> {
    let (cpu, proxy_cpu) = match case.work {
        Work::Bulk { .. } => ("cpu_ms_per_gb", "proxy_cpu_ms_per_gb"),
        _ => ("cpu_ms_per_100k", "proxy_cpu_ms_per_100k"),
    };
    let cpu_of = |runs: &[Run]| runs.iter().map(|run| run.cpu(case.work)).collect::<Vec<_>>();
    let direct = runs.iter().find(|(kind, runs)| *kind == Kind::Direct && !runs.is_empty());
    let direct_cpu = direct.map(|(_, runs)| median(&cpu_of(runs)));

    let mut all = Vec::new();
    for (kind, runs) in runs.iter().filter(|(_, runs)| !runs.is_empty()) {
        // A metric that one run lacks is left out for all runs.
        let mut add = |metric, of: &dyn Fn(&Run) -> Option<f64>| {
            if let Some(values) = runs.iter().map(of).collect::<Option<Vec<_>>>() {
                let steal = runs.iter().map(Run::steal_percent).collect();
                all.push(Series::new(case.key(), kind.name(), metric, values, steal));
            }
        };
        add(rate_metric(case.work), &|run| Some(run.rate(case.work)));
        add("p50_us", &|run| run.measured.latency.map(|latency| latency.p50));
        add("p99_us", &|run| run.measured.latency.map(|latency| latency.p99));
        add("p999_us", &|run| run.measured.latency.map(|latency| latency.p999));
        add(cpu, &|run| Some(run.cpu(case.work)));
        if *kind != Kind::Direct {
            add(proxy_cpu, &|run| Some(run.cpu(case.work) - direct_cpu?));
            add("process_cpu_ms", &|run| Some(run.measured.watched_ms / run.measured.seconds));
        }
        add("spliced_percent", &|run| run.spliced_percent);
        add("splice_us", &|run| run.splice_us);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Plan, Profile, Size};
    use crate::spec::MachineCpu;

    fn run(operations: u64, system: f64) -> Run {
        let machine = MachineCpu { system, idle: 900.0 - system, steal: 100.0, ..MachineCpu::default() };
        let measured = Measured {
            operations,
            bytes: 0,
            seconds: 0.5,
            latency: None,
            machine,
            watched_ms: 10.0,
            errors: 0,
        };
        Run { measured, spliced_percent: None, splice_us: None }
    }

    #[test]
    fn what_the_proxy_adds_is_over_the_median_of_the_direct_connection() {
        let plan =
            Plan::new(Profile::Quick, Size::of(Profile::Quick), &["echo/100x64".to_owned()], &[]).unwrap();
        let runs = [
            (Kind::Direct, vec![run(100_000, 300.0), run(100_000, 200.0), run(100_000, 100.0)]),
            (Kind::Nginx, vec![run(50_000, 200.0)]),
        ];
        let series = series(&plan.cases[0], &runs);
        let median_of = |subject: &str, metric: &str| {
            let of = |series: &&Series| series.subject == subject && series.metric == metric;
            series.iter().find(of).map(|series| series.median)
        };
        assert_eq!(median_of("nginx", "messages_per_s"), Some(100_000.0));
        assert_eq!(median_of("direct", "cpu_ms_per_100k"), Some(200.0));
        assert_eq!(median_of("nginx", "cpu_ms_per_100k"), Some(400.0));
        assert_eq!(median_of("nginx", "proxy_cpu_ms_per_100k"), Some(200.0));
        assert_eq!(median_of("nginx", "process_cpu_ms"), Some(20.0));
        assert_eq!(median_of("direct", "process_cpu_ms"), None);
        assert_eq!(median_of("nginx", "p50_us"), None);
        assert_eq!(series[0].steal_percent, [10.0, 10.0, 10.0]);
    }
}
