//! Runs the Autobahn fuzzing client against Autobahn's own server. Each case must end through Steer
//! with the same verdict as without Steer, whatever the verdict is. The cases test WebSocket
//! frames, which Steer does not read. In a proxy they find a byte that was changed, lost or held
//! back, and an end of a connection that was passed on too early, too late or not at all.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use steer_tests::eventually::eventually;
use steer_tests::netns::NetNs;
use steer_tests::peers::wstest_binary;
use steer_tests::process::{Orphan, Process, quiet};
use steer_tests::require;
use steer_tests::socketio::text;
use steer_tests::steer::Steer;
use steer_tests::topology::Topology;

/// The name of the path without Steer in the report.
const DIRECT: &str = "direct";
const PATHS: [&str; 3] = ["relay", "sockmap", "packet"];
const PORT: u16 = 9001;
/// The addresses on which the three Steers listen. All use one port, because the server compares
/// the port in the Host header with its own.
const FRONTS: [Ipv4Addr; 3] = [Topology::PROXY, Ipv4Addr::new(10, 71, 0, 3), Ipv4Addr::new(10, 71, 0, 4)];
const PATIENCE: Duration = Duration::from_secs(20);
/// The longest time of the standard form (about a minute on a machine that does nothing else).
const STANDARD_PATIENCE: Duration = Duration::from_secs(400);
const LONG_PATIENCE: Duration = Duration::from_secs(3000);

/// Which cases to run. Each of the 216 compression cases (12 and 13) sends 1,000 messages of one
/// size. They take most of the suite's time, and for a proxy they differ only in the sizes. So the
/// standard form has nine of them, the long form all. The other 301 cases are always run.
const STANDARD: &[&str] = &[
    "1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "9.*", "10.*", "12.1.1", "12.1.11", "12.2.2", "12.3.3",
    "12.4.4", "12.5.1", "13.1.1", "13.4.2", "13.7.3",
];
const LONG: &[&str] = &["*"];

#[test]
fn every_case_ends_through_steer_as_it_ends_without() {
    if !require::root() {
        return;
    }
    let Some(wstest) = wstest_binary() else { return };
    let logs = tempfile::tempdir().unwrap();
    let topology = Topology::new(1).unwrap();
    topology.route_directly().unwrap();
    for front in &FRONTS[1..] {
        topology.proxy.ip(&["address", "add", &format!("{front}/24"), "dev", "clients"]).unwrap();
    }
    let server = SocketAddr::from((Topology::endpoint(0), PORT));
    let _server = echo_server(&wstest, logs.path(), &topology.endpoints[0], server);
    let ways = PATHS.into_iter().zip(FRONTS).map(|(path, ip)| (path, SocketAddr::from((ip, PORT))));
    let fronts: Vec<_> =
        ways.clone().map(|(path, front)| start(path, front, server, &topology.proxy)).collect();
    let agent = |(name, address)| json!({ "agent": name, "url": format!("ws://{address}") });
    let agents: Vec<_> = std::iter::once((DIRECT, server)).chain(ways).map(agent).collect();
    fuzz(&wstest, logs.path(), &topology.clients, &agents);
    let index = fs::read_to_string(logs.path().join("reports/index.json")).unwrap();
    compare(&serde_json::from_str(&index).unwrap());
    check_metrics(&fronts);
}

/// The streams went through Steer, on the path that was configured.
fn check_metrics(fronts: &[Steer<'_>]) {
    for (path, front) in PATHS.iter().zip(fronts) {
        let opened = front.metric("steer_streams_opened_total", &[]).unwrap();
        let refused = |labels: &[_]| front.metric("steer_splice_fallback_total", labels).unwrap();
        let [gated, busy, ended] =
            ["gated", "busy", "not_established"].map(|reason| refused(&[("reason", reason)]));
        let others = refused(&[]) - gated - busy - ended;
        println!(
            "{path}: {opened} streams; to the relay: {gated} gated, {busy} busy, {ended} had ended, \
             {others} for other reasons"
        );
        assert!(opened > 300.0, "{path}: {opened} streams");
        assert_eq!(others, 0.0, "{path}: {}", front.admin_get("/metrics").unwrap().body);
        // In each of the 63 cases that send megabytes at once, both directions may be too busy for
        // the hand-over.
        assert!(gated + busy <= 126.0, "{path}");
        // Short cases in which one side has sent its FIN before the hand-over.
        assert!(ended < opened / 10.0, "{path}");
    }
}

fn start<'n>(path: &str, front: SocketAddr, server: SocketAddr, netns: &'n NetNs) -> Steer<'n> {
    let config = format!(
        "\
listeners:
- address: {front}
  routes:
  - cluster: echo
    hash_policy: [{{ source_ip: true }}]
    upgrade_configs: [websocket]
clusters:
- name: echo
  lb_policy: ring_hash
  endpoints: [{server}]
packet_splice:
  hand_over_after: 0s # most cases are short
"
    );
    Steer::start(&config, Some(netns), &["--splice", path]).unwrap()
}

fn echo_server(wstest: &Path, logs: &Path, netns: &NetNs, address: SocketAddr) -> Process {
    let mut command = quiet(wstest);
    command.args(["-m", "testeeserver", "-w", &format!("ws://{address}")]).current_dir(logs);
    let mut server = Process::start("echo-server", command, logs, Some(netns), Orphan::Dies).unwrap();
    let listening = || {
        server.ensure_running()?;
        Ok(netns.run(|| TcpStream::connect(address)).unwrap().ok())
    };
    eventually("listening echo server", PATIENCE, listening).unwrap();
    server
}

/// Runs the fuzzing client to its end. It tests all agents one after the other.
fn fuzz(wstest: &Path, logs: &Path, netns: &NetNs, agents: &[Value]) {
    let specification = json!({
        "outdir": logs.join("reports"),
        "servers": agents,
        "cases": if require::long() { LONG } else { STANDARD },
        "exclude-cases": [],
        "exclude-agent-cases": {},
    });
    let file = logs.join("fuzzing.json");
    fs::write(&file, specification.to_string()).unwrap();
    let mut command = quiet(wstest);
    command.args(["-m", "fuzzingclient", "-s"]).arg(&file).current_dir(logs);
    let mut client = Process::start("fuzzing-client", command, logs, Some(netns), Orphan::Dies).unwrap();
    let status = client.wait(if require::long() { LONG_PATIENCE } else { STANDARD_PATIENCE }).unwrap();
    assert!(status.success(), "{status}");
}

/// Two verdicts for each case: on the received data, and on how the connection ended.
type Verdicts = BTreeMap<String, (String, String)>;

fn verdicts(index: &Value, agent: &str) -> Verdicts {
    let cases = index[agent].as_object().unwrap_or_else(|| panic!("no report on {agent}"));
    let verdict = |case: &Value| (text(&case["behavior"]), text(&case["behaviorClose"]));
    cases.iter().map(|(id, case)| (id.clone(), verdict(case))).collect()
}

/// Checks that the verdicts through Steer are the direct ones in every case.
fn compare(index: &Value) {
    let direct = verdicts(index, DIRECT);
    let mut counts = BTreeMap::<_, usize>::new();
    direct.values().for_each(|verdict| *counts.entry(verdict).or_default() += 1);
    println!("{} cases; without Steer: {counts:?}", direct.len());
    let fine = counts.get(&("OK".to_owned(), "OK".to_owned())).copied().unwrap_or(0);
    assert!(fine > 300, "too many cases fail without Steer: {counts:?}");
    for path in PATHS {
        let through = verdicts(index, path);
        let cases = direct.keys().chain(through.keys()).collect::<BTreeSet<_>>();
        let differing: Vec<_> = cases
            .into_iter()
            .filter(|case| direct.get(*case) != through.get(*case))
            .map(|case| format!("{case}: {:?} without, {:?} with", direct.get(case), through.get(case)))
            .collect();
        assert!(differing.is_empty(), "{path}: {differing:#?}");
    }
}
