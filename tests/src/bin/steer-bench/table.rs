//! Prints the results for a terminal of 120 columns.

use std::fmt::Write as _;

use serde_json::Value;

use crate::outlive;
use crate::results::{Params, Report, Series};
use crate::subjects::Kind;

/// What is shown of a workload: the metric by which subjects are compared, the title of its column,
/// and further metrics.
struct Columns {
    compared: &'static str,
    title: &'static str,
    /// Header and metric.
    others: &'static [(&'static str, &'static str)],
}

const LATENCY: &[(&str, &str)] = &[
    ("p50 us", "p50_us"),
    ("p99 us", "p99_us"),
    ("p99.9", "p999_us"),
    ("cpu ms/100k", "cpu_ms_per_100k"),
    ("+proxy", "proxy_cpu_ms_per_100k"),
    ("process", "process_cpu_ms"),
];

fn columns(workload: &str) -> Columns {
    let (compared, title, others) = match workload {
        "bulk" => {
            let others: &[_] = &[
                ("cpu ms/GB", "cpu_ms_per_gb"),
                ("+proxy", "proxy_cpu_ms_per_gb"),
                ("process", "process_cpu_ms"),
            ];
            ("gbit_per_s", "Gbit/s", others)
        }
        "polling" => ("requests_per_s", "requests/s", LATENCY),
        "upgrades" => ("upgrades_per_s", "upgrades/s", LATENCY),
        "memory" => {
            let others: &[_] = &[
                ("streams", "streams"),
                ("process", "process_bytes_per_stream"),
                ("maps", "map_bytes_per_stream"),
                ("kernel", "kernel_bytes_per_stream"),
            ];
            ("bytes_per_stream", "bytes/stream", others)
        }
        "programs" => {
            let others: &[_] = &[("packets/s", "packets_per_s")];
            ("ns_per_packet", "ns/packet", others)
        }
        outlive::WORKLOAD => {
            let others: &[_] = &[
                ("later", "streams_lost_later"),
                ("wrong", "streams_wrong"),
                ("refused", "refused"),
                ("failed", "failed"),
                ("slow", "slow"),
                ("nobody ms", "unserved_ms"),
                ("gap ms", "longest_gap_ms"),
                ("before", "quiet_longest_gap_ms"),
                ("p99 ms", "echo_p99_ms"),
                ("before", "quiet_echo_p99_ms"),
                ("procs", "processes"),
                ("MiB", "process_mib"),
            ];
            ("streams_lost", "streams lost", others)
        }
        _ => ("messages_per_s", "messages/s", LATENCY),
    };
    Columns { compared, title, others }
}

/// The explanation of the columns of `outlive`.
const OUTLIVE: &str = "\
Streams lost: closed, reset or silent within 4 s after the event; later: in the 5 s after that; wrong: with a wrong byte.
New connections, one each 5 ms: refused; failed: reset, or no answer in 3 s; slow: answered after 0.5 s; nobody: the
longest time without any answer. Gap, p99: longest and 99 % of echoes in the same 4 s, and in the 4 s before. Procs,
MiB: all processes of the proxy at the end of the 4 s.";

/// The subjects to which each row has a ratio, one column for each. The rows of `outlive` have no
/// ratios.
fn compared_with(workload: &str) -> &'static [Kind] {
    if workload == outlive::WORKLOAD { &[] } else { &[Kind::Direct, Kind::Haproxy, Kind::Nginx, Kind::Envoy] }
}

/// One block of rows for each case.
pub(crate) fn render(report: &Report) -> String {
    let mut text = String::new();
    for case in report.cases() {
        block(&mut text, report, case);
    }
    let is_outlive = |case: &(&str, &Params)| case.0 == outlive::WORKLOAD;
    let host = &report.host;
    // Writing to a string cannot fail.
    match report.cases().iter().all(is_outlive) {
        true => writeln!(text, "{OUTLIVE} {:.1} % stolen.", host.steal_percent),
        false => writeln!(
            text,
            "Median of {} rounds of {:.1} s; spread: (max - min) / median; x: ratio of medians; cpu: of the whole machine;\n\
             +proxy: more than the direct connection; process: the proxy's own, ms per second; {:.1} % stolen, {} runs repeated.",
            host.rounds, host.span_seconds, host.steal_percent, host.repeated_runs
        ),
    }
    .ok();
    text
}

fn block(text: &mut String, report: &Report, case: (&str, &Params)) {
    let columns = columns(case.0);
    let mut header = format!("{:<13} {:>12}", "", columns.title);
    if !compared_with(case.0).is_empty() {
        write!(header, " {:>7}", "spread").ok();
    }
    for kind in compared_with(case.0) {
        write!(header, " {:>8}", format!("x {kind}")).ok();
    }
    for (title, _) in columns.others {
        write!(header, " {title:>width$}", width = width_of(title)).ok();
    }
    writeln!(text, "{}\n{header}", title(case)).ok();
    let mut remarks = Vec::new();
    for kind in Kind::ALL {
        if let Some(series) = report.series(case, kind.name(), columns.compared) {
            row(text, report, case, &columns, series);
            remarks.extend(remark(report, case, series));
        }
    }
    let left_out = report.left_out.iter().filter(|left| (left.workload.as_str(), &left.params) == case);
    remarks.extend(left_out.map(|left| format!("{}: left out, {}", left.subject, left.reason)));
    for remark in remarks {
        writeln!(text, "  {remark}").ok();
    }
    text.push('\n');
}

fn row(text: &mut String, report: &Report, case: (&str, &Params), columns: &Columns, series: &Series) {
    write!(text, "{:<13} {:>12}", series.subject, number(series.median)).ok();
    if !compared_with(case.0).is_empty() {
        let spread = (series.max - series.min) / series.median * 100.0;
        write!(text, " {spread:>6.0}%").ok();
    }
    for kind in compared_with(case.0) {
        let other = report.series(case, kind.name(), columns.compared);
        let ratio = other
            .filter(|other| other.median > 0.0 && other.subject != series.subject)
            .map_or_else(|| "-".to_owned(), |other| format!("{:.2}", series.median / other.median));
        write!(text, " {ratio:>8}").ok();
    }
    for (title, metric) in columns.others {
        let value = report.series(case, &series.subject, metric);
        let value = value.map_or_else(|| "-".to_owned(), |value| number(value.median));
        write!(text, " {value:>width$}", width = width_of(title)).ok();
    }
    text.push('\n');
}

/// A remark on Steer's splice in this case.
fn remark(report: &Report, case: (&str, &Params), series: &Series) -> Option<String> {
    let percent = report.series(case, &series.subject, "spliced_percent")?.median;
    let time = report.series(case, &series.subject, "splice_us");
    let time = time.map_or_else(String::new, |time| format!(", {} us after the 101", number(time.median)));
    Some(format!("{}: {percent:.1} % of the streams were spliced{time}", series.subject))
}

fn title((workload, params): (&str, &Params)) -> String {
    let params = params.iter().map(|(name, value)| match value {
        Value::String(value) => format!("{name} {value}"),
        value => format!("{name} {value}"),
    });
    format!("{workload}: {}", params.collect::<Vec<_>>().join(", "))
}

fn width_of(title: &str) -> usize {
    title.len().max(7)
}

/// Prints at least three digits. Whole numbers below 10,000 are printed unchanged.
fn number(value: f64) -> String {
    match value.abs() {
        size if size < 10_000.0 && size.fract() == 0.0 => format!("{value:.0}"),
        size if size >= 10_000.0 => thousands(value),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn thousands(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    format!("{}{}", if value < 0.0 { "-" } else { "" }, groups.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_at_least() {
        assert_eq!(number(1_234_567.8), "1,234,568");
        assert_eq!(number(-12_345.0), "-12,345");
        assert_eq!(number(9999.6), "10000");
        assert_eq!(number(12.34), "12.3");
        assert_eq!(number(0.5), "0.50");
        assert_eq!(number(0.0), "0");
    }
}
