//! Makes files from invented results.

use serde_json::json;

use super::*;
use crate::results::{Host, LeftOut};
use crate::subjects::Kind;

/// A page that has all its places, with nothing in them.
fn blank(page: &str) -> Result<String> {
    let (_, places) = pages().into_iter().find(|(name, _)| *name == page).context("a page")?;
    Ok(places.iter().map(|place| format!("<!-- bench:{place} -->\n<!-- /bench -->\n")).collect())
}

/// Reads a file of the repository.
fn read(path: &str) -> Result<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    fs::read_to_string(root.join(path)).with_context(|| format!("cannot read {path}"))
}

/// A report with values for every figure. The values differ by subject and load.
fn made_up() -> Report {
    let loads = [
        (
            "echo",
            json!({"connections": 1, "bytes": 64}),
            "messages_per_s p50_us p99_us p999_us cpu_ms_per_100k",
        ),
        (
            "echo",
            json!({"connections": 100, "bytes": 64}),
            "messages_per_s p50_us p99_us p999_us cpu_ms_per_100k",
        ),
        ("echo", json!({"connections": 100, "bytes": 64, "rate": 20000}), "messages_per_s cpu_ms_per_100k"),
        ("echo", json!({"connections": 1000, "bytes": 4096}), "messages_per_s p99_us"),
        ("bulk", json!({"connections": 1, "direction": "upload"}), "gbit_per_s"),
        ("bulk", json!({"connections": 8, "direction": "both"}), "gbit_per_s"),
        ("fan_out", json!({"connections": 5000, "active": 50, "bytes": 64}), "messages_per_s p99_us"),
        ("upgrades", json!({"connections": 64}), "upgrades_per_s p99_us"),
        ("polling", json!({"connections": 64, "bytes": 200, "method": "GET"}), "requests_per_s p99_us"),
        ("polling", json!({"connections": 64, "bytes": 16384, "method": "POST"}), "requests_per_s p99_us"),
        (
            "memory",
            json!({"connections": 5000}),
            "bytes_per_stream process_bytes_per_stream map_bytes_per_stream",
        ),
        ("memory", json!({"connections": "most"}), "bytes_per_stream streams idle_process_bytes"),
        (
            "programs",
            json!({"program": "packet_ingress", "load": "echo 64 B"}),
            "ns_per_packet packets_per_s",
        ),
    ];
    let mut results = Vec::new();
    for (number, (workload, params, metrics)) in loads.iter().enumerate() {
        let kinds = Kind::ALL.iter().enumerate();
        for (rank, kind) in kinds.filter(|(_, kind)| *workload != "memory" || **kind != Kind::Direct) {
            for metric in metrics.split(' ') {
                let median = 1e6 / (3 + rank + 10 * number) as f64;
                results.push(Series {
                    workload: (*workload).into(),
                    params: serde_json::from_value(params.clone()).unwrap(),
                    subject: kind.name().into(),
                    metric: metric.into(),
                    median,
                    min: median * 0.9,
                    max: median * 1.1,
                    runs: vec![median * 0.9, median, median * 1.1],
                    steal_percent: vec![0.0, 1.0 / 3.0, 2.0],
                });
            }
        }
    }
    let host = Host {
        started: 1_795_446_909,
        took_seconds: 100,
        profile: "quick".into(),
        rounds: 5,
        span_seconds: 1.5,
        descriptors: 20_000,
        kernel: "6.18".into(),
        cpu: "a processor".into(),
        cpus: 2,
        memory_bytes: 8 << 30,
        steal_percent: 1.5,
        repeated_runs: 3,
        versions: BTreeMap::from([("nginx".into(), "nginx/1.22.1".into())]),
        configs: BTreeMap::from([("nginx".into(), "events {}\n".into())]),
    };
    let left_out = LeftOut {
        workload: "echo".into(),
        params: BTreeMap::from([("connections".into(), json!(5000))]),
        subject: "envoy".into(),
        reason: "it has too few descriptors".into(),
    };
    Report { host, results, left_out: vec![left_out] }
}

#[test]
fn the_same_report_gives_the_same_files_and_reads_back() {
    let report = made_up();
    let once = files(&report, blank).unwrap();
    let json = &once[Path::new("docs/bench/results.json")];
    let read: Report = serde_json::from_str(json).unwrap();
    let again = files(&read, |page| Ok(once[Path::new(page)].clone())).unwrap();
    assert_eq!(once, again);
}

#[test]
fn every_figure_is_drawn_and_in_its_place() {
    let files = files(&made_up(), blank).unwrap();
    let page = &files[Path::new("docs/benchmarks.md")];
    for name in figures::names() {
        let picture = &files[&Path::new(PICTURES).join(format!("{name}.svg"))];
        assert!(picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>"), "{name}: {picture}");
        assert!(page.contains(&format!("](bench/{name}.svg)")), "{name}: {page}");
    }
    assert!(!page.contains("Not measured in this run"), "{page}");
    assert!(page.contains("envoy with connections 5000: it has too few descriptors."), "{page}");
    assert!(page.contains("| 100 WebSockets, 20,000/s |"), "{page}");
    assert!(page.contains("| 64 B | 100 WebSockets | 76.9k | 71.4k (0.93) |"), "{page}");
}

#[test]
fn what_was_not_measured_is_said() {
    let mut report = made_up();
    report.results.retain(|series| series.workload != "bulk" && series.subject != "nginx");
    let files = files(&report, blank).unwrap();
    let page = &files[Path::new("docs/benchmarks.md")];
    assert!(page.contains("<!-- bench:bulk -->\nNot measured in this run.\n<!-- /bench -->"), "{page}");
    assert!(page.contains("| Bulk: Gbit/s | direct | ≥ 0.95 | – | not measured |"), "{page}");
    assert!(!files.contains_key(Path::new("docs/bench/bulk.svg")));
    assert!(files[Path::new("README.md")].contains("messages/s | 0.93 | 1.21 | – | 1.36 |"), "{files:#?}");
}

#[test]
fn the_worst_case_counts() {
    let mut report = made_up();
    for series in &mut report.results {
        let is_it = series.workload == "bulk"
            && series.subject == "steer-packet"
            && series.params["connections"] == 8;
        if is_it {
            series.median = 1.0;
        }
    }
    let files = files(&report, blank).unwrap();
    let page = &files[Path::new("docs/benchmarks.md")];
    assert!(page.contains("| Bulk: Gbit/s | haproxy | ≥ 2 | 0.00 | **missed** |"), "{page}");
}

#[test]
fn the_pages_have_every_place() {
    files(&made_up(), read).unwrap();
}

/// Nobody writes a number on the pages by hand, and no picture is from another run.
#[test]
fn the_repository_shows_what_its_results_say() {
    let results = read("docs/bench/results.json").unwrap();
    let report: Report = serde_json::from_str(&results).unwrap();
    for (path, content) in files(&report, read).unwrap() {
        let name = path.display();
        assert!(
            read(path.to_str().unwrap()).unwrap() == content,
            "{name} is not what `cargo xtask bench --report` writes"
        );
    }
}
