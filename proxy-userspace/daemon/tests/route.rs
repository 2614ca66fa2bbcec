//! The command line of `steer route`: its formats, defaults and exit codes. (The suite `vectors`
//! tests that it decides as Envoy does.)

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Write;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

const CONFIG: &str = r#"
listeners:
- name: front
  address: 0.0.0.0:8080
  virtual_hosts:
  - name: cookies
    domains: [cookies.example]
    routes:
    - cluster: sio
      hash_policy: [{ cookie: { name: sid, ttl: 60s, path: / } }]
  - name: all
    domains: ["*"]
    routes:
    - match: { prefix: /app }
      cluster: sio
      hash_policy: [{ header: x-forwarded-for }]
    - match: { prefix: /down }
      cluster: down
      hash_policy: [{ header: x-forwarded-for }]
- name: edge
  address: 127.0.0.1:8081
  use_remote_address: true
  routes:
  - cluster: sio
    hash_policy: [{ header: x-forwarded-for }]
    upgrade_configs: [websocket]
clusters:
- name: sio
  lb_policy: ring_hash
  endpoints: [10.10.62.120:3000, 10.10.62.121:3000]
- name: down
  lb_policy: maglev
  healthy_panic_threshold: 0
  endpoints: [{ address: 10.10.62.122:3000, health_status: UNHEALTHY }]
"#;

fn steer(arguments: &[&str], stdin: &str) -> Output {
    let mut config = tempfile::NamedTempFile::new().unwrap();
    config.write_all(CONFIG.as_bytes()).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_steer"))
        .args(["route", "-c"])
        .arg(config.path())
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn lines(output: &Output) -> Vec<Value> {
    let text = std::str::from_utf8(&output.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The only answer to a request that is given by flags.
fn one(arguments: &[&str]) -> Value {
    let output = steer(arguments, "");
    assert!(output.status.success(), "{output:?}");
    let [answer] = lines(&output).try_into().unwrap();
    answer
}

/// The answers to a batch, and whether the exit code was 0.
fn batch(requests: &[Value], arguments: &[&str]) -> (Vec<Value>, bool) {
    let text: String = requests.iter().map(|request| format!("{request}\n")).collect();
    let output = steer(&[&["--batch", "-"], arguments].concat(), &text);
    (lines(&output), output.status.success())
}

#[test]
fn a_request_by_flags() {
    let output = steer(
        &["--path", "/app?x", "--method", "POST", "--header", "X-Forwarded-For:  a\t", "--host", "h"],
        "",
    );
    let expected = concat!(
        r#"{"cluster":"sio","endpoint":"10.10.62.121:3000","hash":"d24ec4f1a98c6e5b","#,
        r#""set_cookie":[],"error":null}"#,
        "\n"
    );
    assert_eq!(std::str::from_utf8(&output.stdout).unwrap(), expected);
    assert!(output.status.success());
}

#[test]
fn without_a_hash_no_endpoint_is_named() {
    let answer = one(&["--path", "/app"]);
    let expected = json!({
        "cluster": "sio", "endpoint": null, "hash": null, "set_cookie": [], "error": null,
    });
    assert_eq!(answer, expected);
}

#[test]
fn refusals_are_answers() {
    let refused = |arguments: &[&str]| {
        let answer = one(arguments);
        assert_eq!(answer["endpoint"], Value::Null);
        (answer["cluster"].clone(), answer["error"].as_str().unwrap().to_owned())
    };
    assert_eq!(refused(&["--path", "/nowhere"]), (Value::Null, "no route".into()));
    let down = ["--path", "/down", "--header", "x-forwarded-for: a"];
    assert_eq!(refused(&down), ("down".into(), "no healthy upstream".into()));
    assert_eq!(refused(&["--path", "/down"]), ("down".into(), "no healthy upstream".into()));
    let upgrade = ["--path", "/app", "--header", "connection: upgrade", "--header", "upgrade: websocket"];
    assert_eq!(refused(&upgrade), (Value::Null, "upgrade not allowed".into()));
    assert_eq!(one(&[&upgrade[..], &["--listener", "edge"]].concat())["error"], Value::Null);
    let hosts = ["--host", "a", "--header", "host: b"];
    assert_eq!(refused(&hosts), (Value::Null, "not exactly one host".into()));
    assert_eq!(refused(&["--method", "OPTIONS", "--path", "*"]), (Value::Null, "bad request target".into()));
}

#[test]
fn the_local_address_or_a_name_chooses_the_listener() {
    // Only the listener `edge` adds the source address to x-forwarded-for.
    let hash =
        |arguments: &[&str]| one(&[&["--source", "203.0.113.7:1"], arguments].concat())["hash"].clone();
    let edge = hash(&["--listener", "edge"]);
    assert_eq!(edge, format!("{:016x}", xxhash_rust::xxh64::xxh64(b"203.0.113.7", 0)));
    assert_eq!(hash(&["--local", "127.0.0.1:8081"]), edge);
    assert_eq!(hash(&["--local", "192.0.2.1:8081"]), edge);
    assert_eq!(hash(&["--local", "127.0.0.1:8080", "--path", "/app"]), Value::Null);
    assert_eq!(hash(&["--path", "/app"]), Value::Null);
    let output = steer(&["--listener", "back"], "");
    assert!(!output.status.success());
    assert!(lines(&output)[0]["error"].as_str().unwrap().contains("\"back\""));
}

#[test]
fn clients_on_loopback_are_named_by_the_node_address() {
    let hash = one(&["--listener", "edge", "--node-address", "192.0.2.2"])["hash"].clone();
    assert_eq!(hash, format!("{:016x}", xxhash_rust::xxh64::xxh64(b"192.0.2.2", 0)));
}

#[test]
fn made_cookies_name_source_and_local() {
    let made = |source: &[&str], both: &[u8]| {
        let answer = one(&[&["--host", "cookies.example"], source].concat());
        let value = format!("{:016x}", xxhash_rust::xxh64::xxh64(both, 0));
        let cookie = format!("sid=\"{value}\"; Max-Age=60; Path=/; HttpOnly");
        assert_eq!(answer["set_cookie"], json!([cookie]));
        assert_eq!(answer["hash"], format!("{:016x}", xxhash_rust::xxh64::xxh64(value.as_bytes(), 0)));
        assert!(answer["endpoint"].is_string());
    };
    made(&[], b"127.0.0.1:50000127.0.0.1:8080");
    made(&["--source", "[2001:DB8::1]:7", "--local", "[::1]:8080"], b"[2001:db8::1]:7[::1]:8080");
    made(&["--source", "203.0.113.7"], b"203.0.113.7:50000127.0.0.1:8080");
}

#[test]
fn a_batch_takes_bytes_and_defaults() {
    let (answers, good) = batch(
        &[
            json!({ "host": "h", "path": "/app", "method": "GET", "headers": [["X-Forwarded-For", "a"]] }),
            json!({ "path": { "hex": "2f617070" }, "headers": [["x-forwarded-for", { "hex": "ff80" }]] }),
            json!({ "host": null, "path": "/app", "source": null, "local": null, "headers": [] }),
            json!({ "listener": "edge", "source": "203.0.113.7:1" }),
            json!({}),
        ],
        &[],
    );
    assert!(good);
    let hashes: Vec<_> = answers.iter().map(|answer| answer["hash"].as_str().unwrap_or("-")).collect();
    let of = |bytes: &[u8]| format!("{:016x}", xxhash_rust::xxh64::xxh64(bytes, 0));
    assert_eq!(hashes, [&*of(b"a"), &*of(b"\xff\x80"), "-", &*of(b"203.0.113.7"), "-"]);
    assert_eq!(answers[4]["error"], "no route");
}

#[test]
fn a_bad_line_is_answered_and_does_not_stop_the_batch() {
    let mut text = String::from("\n");
    let bad = [
        "{",
        "[]",
        r#"{"hots":"h"}"#,
        r#"{"headers":[["x-a",{"hex":"f"}]]}"#,
        r#"{"headers":[["x-a",{"hex":"zz"}]]}"#,
        r#"{"headers":[["x-a",{"hex":"00"}]]}"#,
        r#"{"headers":[["x a","b"]]}"#,
        r#"{"headers":[["x-a",7]]}"#,
        r#"{"path":"/app#frag"}"#,
        r#"{"path":"/a b"}"#,
        r#"{"path":""}"#,
        r#"{"method":"G T"}"#,
        r#"{"source":"nobody"}"#,
        r#"{"local":"127.0.0.1"}"#,
        r#"{"listener":"back"}"#,
    ];
    for line in bad {
        text.push_str(line);
        text.push('\n');
    }
    text.push_str(r#"{"path":"/app","headers":[["x-forwarded-for","a"]]}"#);
    let output = steer(&["--batch", "-"], &text);
    assert_eq!(output.status.code(), Some(1));
    let answers = lines(&output);
    assert_eq!(answers.len(), bad.len() + 1);
    for (line, answer) in bad.iter().zip(&answers) {
        assert!(answer["error"].is_string(), "{line}: {answer}");
        assert_eq!(answer["endpoint"], Value::Null);
    }
    assert_eq!(answers[bad.len()]["endpoint"], "10.10.62.121:3000");
    assert!(String::from_utf8(output.stderr).unwrap().contains("15 of the lines"));
}
