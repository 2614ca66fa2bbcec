//! `steer run` as a process: its first output, its exit codes, and its log when descriptors run out.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

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

/// A try to accept fails each 100 ms until a descriptor is given back.
#[test]
fn the_admin_listener_says_once_that_descriptors_have_run_out() {
    let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (listen, admin) = (free(), free());
    let mut steer = Command::new("sh")
        .args(["-c", "ulimit -n 64 && exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_steer"), "run"])
        .args(["--listen", &listen, "--backend", "127.0.0.1:9", "--hash", "header:x-a"])
        .args(["--splice", "relay", "--admin", &admin])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let log = BufReader::new(steer.stderr.take().unwrap());
    let (said, seen) = mpsc::channel();
    let reader =
        thread::spawn(move || log.lines().map_while(Result::ok).for_each(|line| drop(said.send(line))));
    let line_with = |text: &str| {
        let line = std::iter::from_fn(|| seen.recv_timeout(Duration::from_secs(20)).ok());
        line.into_iter().find(|line| line.contains(text)).unwrap_or_else(|| panic!("no line with {text:?}"))
    };
    line_with("ready");
    let clients: Vec<_> = (0..100).map(|_| TcpStream::connect(&admin).unwrap()).collect();
    line_with("cannot accept an admin connection");
    let another = seen.recv_timeout(Duration::from_millis(500));
    steer.kill().unwrap();
    steer.wait().unwrap();
    reader.join().unwrap();
    assert_eq!(another, Err(RecvTimeoutError::Timeout));
    drop(clients);
}
