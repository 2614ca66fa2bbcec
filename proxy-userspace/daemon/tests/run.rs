//! `steer run` ends before it serves: its first output, and its exit codes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Write as _;
use std::process::{Command, Output};

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_steer")).arg("run").args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn a_bad_configuration_has_an_exit_code_of_its_own() {
    let mut file = tempfile::NamedTempFile::with_suffix(".yaml").unwrap();
    file.write_all(b"clusters: []\n").unwrap();
    let output = run(&["-c", file.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(78), "EX_CONFIG");
    assert!(text(&output.stderr).contains("`listeners` is missing"), "{}", text(&output.stderr));
    let output = run(&["-c", "/nowhere/steer.yaml"]);
    assert_eq!(output.status.code(), Some(78));
    assert!(text(&output.stderr).contains("/nowhere/steer.yaml"));
}

#[test]
fn the_first_line_tells_what_runs_where() {
    let log = text(&run(&["-c", "/nowhere/steer.yaml", "--log-format", "json"]).stderr);
    let said = serde_json::from_str::<serde_json::Value>(log.lines().next().unwrap()).unwrap().to_string();
    for part in
        ["starting", env!("CARGO_PKG_VERSION"), "commit", "kernel", "capabilities", "/nowhere/steer.yaml"]
    {
        assert!(said.contains(part), "{part} in {said}");
    }
}

#[test]
fn a_bad_log_level_is_no_bad_configuration() {
    let output = run(&["-c", "/nowhere/steer.yaml", "--log-level", "info,="]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("--log-level"), "{}", text(&output.stderr));
}
