//! `steer run` as a process: its first output, its exit codes, and its log when descriptors run out.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

const UPGRADE: &[u8] =
    b"GET / HTTP/1.1\r\nhost: a\r\nx-a: 1\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
    sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
const SWITCHED: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
    sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

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

/// A relayed stream through a real process, as `steer flows --summary` and the metrics count it.
#[test]
fn the_summary_counts_a_relayed_stream_once_it_is_a_second_old() {
    let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (listen, admin) = (free(), free());
    let endpoint = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut steer = Command::new(env!("CARGO_BIN_EXE_steer"))
        .args(["run", "--listen", &listen, "--backend", &endpoint.local_addr().unwrap().to_string()])
        .args(["--hash", "header:x-a", "--splice", "relay", "--admin", &admin])
        .args(["--instance", &format!("summary-{}", std::process::id())])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(steer.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(log.any(|line| line.contains("ready")));
    let summary = |more: &[&str]| {
        let arguments = [&["flows", "--summary", "--admin", &admin], more].concat();
        let output = Command::new(env!("CARGO_BIN_EXE_steer")).args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    assert!(summary(&[]).starts_with("there is no stream older than a second"), "{}", summary(&[]));

    let serving = thread::spawn(move || {
        let (mut upstream, _) = endpoint.accept().unwrap();
        assert!(upstream.read(&mut [0; 1024]).unwrap() > 0);
        upstream.write_all(SWITCHED).unwrap();
        upstream
    });
    let mut client = TcpStream::connect(&listen).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    client.write_all(UPGRADE).unwrap();
    let mut answer = [0; 12];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(text(&answer), "HTTP/1.1 101");
    let upstream = serving.join().unwrap();

    let deadline = Instant::now() + Duration::from_secs(20);
    while summary(&["--json"]).trim() == "[]" {
        assert!(Instant::now() < deadline, "the stream does not count");
        #[expect(clippy::disallowed_methods, reason = "the test has no runtime")]
        thread::sleep(Duration::from_millis(100));
    }
    let json: serde_json::Value = serde_json::from_str(&summary(&["--json"])).unwrap();
    assert_eq!((&json[0]["streams"], &json[0]["spliced"]), (&1.into(), &0.into()), "{json}");
    assert!(summary(&[]).contains("0.0 %"), "{}", summary(&[]));
    let mut scrape = TcpStream::connect(&admin).unwrap();
    scrape.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut metrics = String::new();
    scrape.read_to_string(&mut metrics).unwrap();
    assert!(metrics.contains("steer_splice_coverage_ratio{cluster="), "{metrics}");
    steer.kill().unwrap();
    steer.wait().unwrap();
    drop((client, upstream));
}
