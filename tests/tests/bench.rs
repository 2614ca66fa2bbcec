//! A small run of the benchmark. It tests that the benchmark measures what it says. Speed does not
//! matter.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use steer_tests::peers::{haproxy, steer_bench_binary};
use steer_tests::require;

const SUBJECTS: [&str; 3] = ["direct", "haproxy", "steer-packet"];
const ROUNDS: usize = 2;

#[test]
fn every_subject_moves_messages_and_the_packet_splice_splices() {
    if !require::root() || !haproxy() {
        return;
    }
    let Some(binary) = steer_bench_binary() else { return };
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("results.json");
    let output = bench(&binary, &file, &[]);
    let report: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();

    assert_eq!(report["left_out"], Value::Array(Vec::new()), "{output}");
    assert_eq!(report["host"]["rounds"], ROUNDS);
    for name in ["haproxy", "steer-packet"] {
        assert!(report["host"]["configs"][name].as_str().unwrap().contains("x-forwarded-for"), "{name}");
        assert!(report["host"]["versions"][name].is_string(), "{name}");
    }
    let results = report["results"].as_array().unwrap();
    let cases: BTreeSet<_> = results.iter().map(|series| series["params"].to_string()).collect();
    assert_eq!(cases.len(), 2, "{cases:?}");
    for subject in SUBJECTS {
        for metric in ["messages_per_s", "p50_us", "p99_us", "p999_us", "cpu_ms_per_100k"] {
            assert!(medians(results, subject, metric, cases.len()).iter().all(|&median| median > 0.0));
        }
    }
    let spliced = medians(results, "steer-packet", "spliced_percent", cases.len());
    assert!(spliced.iter().all(|&percent| percent == 100.0), "{spliced:?}\n{output}");
    assert!(output.contains("x haproxy"), "{output}");

    // A second run has other figures. But a comparison of the results with themselves finds no
    // regression.
    let compared = bench(&binary, &directory.path().join("again.json"), &["--check", file.to_str().unwrap()]);
    assert!(compared.contains(" ratios compared, "), "{compared}");
}

/// Runs the benchmark to its end. Returns its output.
fn bench(binary: &Path, json: &Path, more: &[&str]) -> String {
    let mut command = Command::new(binary);
    command.args(["--quick", "--only", "echo", "--peers", "steer-packet,haproxy", "--span-ms", "200"]);
    command.args(["--rounds", &ROUNDS.to_string(), "--json"]).arg(json).args(more);
    let output = command.output().unwrap();
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    // With --check, exit code 1 means that something became slower.
    let answered = output.status.success() || (!more.is_empty() && output.status.code() == Some(1));
    assert!(answered, "{text}");
    text
}

/// The medians of a metric, one for each of `cases`. Each case has every round.
fn medians(results: &[Value], subject: &str, metric: &str, cases: usize) -> Vec<f64> {
    let series: Vec<_> = results
        .iter()
        .filter(|series| {
            series["workload"] == "echo" && series["subject"] == subject && series["metric"] == metric
        })
        .collect();
    assert_eq!(series.len(), cases, "{subject} {metric}");
    for series in &series {
        assert_eq!(series["runs"].as_array().unwrap().len(), ROUNDS, "{series}");
        assert_eq!(series["steal_percent"].as_array().unwrap().len(), ROUNDS, "{series}");
    }
    series.iter().map(|series| series["median"].as_f64().unwrap()).collect()
}
