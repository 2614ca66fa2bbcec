//! A real socket.io cluster behind Steer. All requests of one client reach the server that the ring
//! names, with both transports and on every path.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use steer_tests::eventually::eventually;
use steer_tests::peers::node_app;
use steer_tests::process::{Orphan, Process};
use steer_tests::require;
use steer_tests::socketio::{config, events, text, wait_for};
use steer_tests::steer::{Steer, binary, route};
use steer_tests::topology::Topology;
use tempfile::TempDir;
use tokio::net::TcpStream;

const CLIENTS: usize = 100;
const SERVERS: [&str; 3] = ["alpha", "beta", "gamma"];
/// How many texts each client has echoed before its upgrade, and again after it.
const MESSAGES: u64 = 4;
const PATIENCE: Duration = Duration::from_secs(60);
const PORT: u16 = 8080;
/// The first request of a polling client.
const HANDSHAKE: &str = "/socket.io/?EIO=4&transport=polling";

/// Three servers with Steer in front of them.
struct Cluster<'n> {
    steer: Steer<'n>,
    servers: Vec<Process>,
    logs: TempDir,
    topology: &'n Topology,
}

/// The network, if everything that these tests need is there.
fn network() -> Option<Topology> {
    (require::root() && node_app("server.js").is_some()).then(|| Topology::new(3).unwrap())
}

impl<'n> Cluster<'n> {
    fn start(topology: &'n Topology, splice: &str) -> Self {
        let logs = tempfile::tempdir().unwrap();
        let addresses = topology.endpoint_addresses(3000);
        let mut servers: Vec<_> = SERVERS
            .iter()
            .zip(&topology.endpoints)
            .zip(&addresses)
            .map(|((name, netns), address)| {
                let mut command = node_app("server.js").unwrap();
                command.arg(name).arg(address.ip().to_string()).arg(address.port().to_string());
                Process::start(name, command, logs.path(), Some(netns), Orphan::Dies).unwrap()
            })
            .collect();
        servers.iter_mut().for_each(|server| wait_for("listening", server).unwrap());
        let config = config(SocketAddr::from((Topology::PROXY, PORT)), &addresses);
        let steer = Steer::start(&config, Some(&topology.proxy), &["--splice", splice]).unwrap();
        Self { steer, servers, logs, topology }
    }

    /// For each key, the name of the server that the ring names.
    fn ring(&self, keys: &[String]) -> BTreeMap<String, String> {
        let host = format!("{}:{PORT}", Topology::PROXY);
        let request = |key| json!({ "host": host, "path": HANDSHAKE, "method": "GET", "headers": [["x-forwarded-for", key]] });
        let requests: Vec<_> = keys.iter().map(request).collect();
        let answers = route(&binary().unwrap(), self.steer.config(), &requests).unwrap();
        let addresses = self.topology.endpoint_addresses(3000);
        let names: BTreeMap<_, _> = addresses.iter().map(ToString::to_string).zip(SERVERS).collect();
        let name = |answer: &Value| names[answer["endpoint"].as_str().unwrap()].to_owned();
        keys.iter().cloned().zip(answers.iter().map(name)).collect()
    }

    /// Starts one client for each key, and waits until all have echoed their texts. Each echoes `load`
    /// more at SIGUSR2.
    fn converse(&self, transports: &str, keys: &[String], load: usize) -> Process {
        let url = format!("http://{}:{PORT}", Topology::PROXY);
        let mut command = node_app("clients.js").unwrap();
        command.args([&url, transports, &MESSAGES.to_string()]).args(keys).env("LOAD", load.to_string());
        let name = format!("clients-{transports}");
        let netns = &self.topology.clients;
        let mut clients =
            Process::start(&name, command, self.logs.path(), Some(netns), Orphan::Dies).unwrap();
        wait_for("settled", &mut clients).unwrap();
        clients
    }
}

#[test]
fn clients_stay_with_the_server_of_the_ring_when_streams_are_relayed() {
    clients_stay("relay");
}

#[test]
fn clients_stay_with_the_server_of_the_ring_when_sockets_are_spliced() {
    clients_stay("sockmap");
}

#[test]
fn clients_stay_with_the_server_of_the_ring_when_packets_are_spliced() {
    clients_stay("packet");
}

fn clients_stay(splice: &str) {
    let Some(topology) = network() else { return };
    let cluster = Cluster::start(&topology, splice);
    let keys: Vec<_> = (0..CLIENTS).map(|i| format!("203.0.113.{i}")).collect();
    let ring = cluster.ring(&keys);
    assert_eq!(ring.values().collect::<BTreeSet<_>>().len(), SERVERS.len(), "a server would have no client");

    for transports in ["upgrade", "websocket"] {
        let mut clients = cluster.converse(transports, &keys, 0);
        let flows = cluster.steer.flows().unwrap();
        clients.signal(libc::SIGTERM).unwrap();
        clients.wait(PATIENCE).unwrap();
        check_reports(&clients, transports, &ring);
        assert_eq!(flows.len(), CLIENTS, "{flows:?}");
        for flow in &flows {
            assert_eq!(flow["path"], splice, "{flow}");
        }
    }
    check_records(&cluster, &ring);
    let none_left = || Ok(cluster.steer.flows()?.is_empty().then_some(()));
    eventually("end of all streams", PATIENCE, none_left).unwrap();
    assert_eq!(cluster.steer.metric("steer_endpoint_picks_total", &[("by", "random")]).unwrap(), 0.0);
}

/// Checks the clients' reports: the right server echoed everything, in the end over a WebSocket,
/// and no client was cut off.
fn check_reports(clients: &Process, transports: &str, ring: &BTreeMap<String, String>) {
    let reports = events(clients.stdout().unwrap().as_str(), "client").unwrap();
    assert_eq!(reports.len(), ring.len(), "{transports}");
    for report in reports {
        assert_eq!(report["errors"], json!([]), "{transports}: {report}");
        assert_eq!(report["echoed"], 2 * MESSAGES, "{transports}: {report}");
        assert_eq!(report["transport"], "websocket", "{transports}: {report}");
        let key = report["key"].as_str().unwrap();
        assert_eq!(report["servers"], json!([ring[key]]), "{transports}: {report}");
    }
    let closed = events(clients.stdout().unwrap().as_str(), "closed").unwrap();
    assert_eq!(closed.first().map(|event| &event["lost"]), Some(&json!([])), "{transports}");
}

/// Checks the servers' records: every client was at its own server, and every session was known.
fn check_records(cluster: &Cluster<'_>, ring: &BTreeMap<String, String>) {
    let (mut polls, mut upgrades) = (0, 0);
    for server in &cluster.servers {
        let output = server.stdout().unwrap();
        assert_eq!(events(&output, "refused").unwrap(), [] as [Value; 0]);
        for record in events(&output, "request").unwrap() {
            let key = record["key"].as_str().unwrap();
            assert_eq!(record["server"], ring[key].as_str(), "misplaced: {record}");
            let upgrade = record["kind"] == "upgrade";
            assert_eq!(record["status"], if upgrade { 101 } else { 200 }, "{record}");
            *if upgrade { &mut upgrades } else { &mut polls } += 1;
        }
    }
    // For each polling client: the handshake, at least one POST and at least one GET.
    assert!(polls >= 3 * CLIENTS, "{polls} polls");
    assert_eq!(upgrades, 2 * CLIENTS);
}

/// Windows does not use TCP timestamps. Twenty clients of that kind echo 20,000 texts: 50 MB each way.
#[test]
fn clients_without_timestamps_are_spliced_through_fifty_megabytes() {
    const FEW: usize = 20;
    const LOAD: usize = 1000;
    let Some(topology) = network() else { return };
    topology.clients.sysctl("net.ipv4.tcp_timestamps", "0").unwrap();
    let cluster = Cluster::start(&topology, "packet");
    let keys: Vec<_> = (0..FEW).map(|i| format!("203.0.113.{i}")).collect();
    let ring = cluster.ring(&keys);
    let mut clients = cluster.converse("upgrade", &keys, LOAD);
    let all_spliced = || {
        let flows = cluster.steer.flows()?;
        Ok((flows.len() == FEW && flows.iter().all(|flow| flow["path"] == "packet")).then_some(()))
    };
    eventually("splice of all streams", PATIENCE, all_spliced).unwrap();
    clients.signal(libc::SIGUSR2).unwrap();
    wait_for("loaded", &mut clients).unwrap();
    clients.signal(libc::SIGTERM).unwrap();
    clients.wait(PATIENCE).unwrap();

    check_reports(&clients, "upgrade", &ring);
    let loaded = events(&clients.stdout().unwrap(), "loaded").unwrap();
    assert_eq!((&loaded[0]["echoed"], &loaded[0]["errors"]), (&json!(FEW * LOAD), &json!([])));
    let changed = cluster.steer.metric("steer_packet_total", &[("what", "syn_plain")]).unwrap();
    assert!(changed >= FEW as f64, "{changed} SYNs were changed");
    let bytes = |direction| cluster.steer.metric("steer_stream_bytes_total", &[("direction", direction)]);
    for direction in ["to_upstream", "to_downstream"] {
        assert!(bytes(direction).unwrap() > 48e6, "{direction}: {:?}", bytes(direction));
    }
}

/// Browsers and front proxies send the requests of many clients on one connection.
#[test]
fn each_request_of_a_shared_connection_goes_where_its_client_belongs() {
    let Some(topology) = network() else { return };
    let cluster = Cluster::start(&topology, "auto");
    let keys: Vec<_> = (0..30).map(|i| format!("198.51.100.{i}")).collect();
    let ring = cluster.ring(&keys);
    assert_eq!(ring.values().collect::<BTreeSet<_>>().len(), SERVERS.len(), "a server would have no client");

    topology
        .clients
        .run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let stream = TcpStream::connect((Topology::PROXY, PORT)).await.unwrap();
                let (mut sender, connection) = handshake(TokioIo::new(stream)).await.unwrap();
                let connection = tokio::spawn(connection);
                converse_by_turns(&mut sender, &ring).await;
                drop(sender);
                connection.await.unwrap().unwrap();
            });
        })
        .unwrap();
    for server in &cluster.servers {
        assert_eq!(events(&server.stdout().unwrap(), "refused").unwrap(), [] as [Value; 0]);
    }
    let accepted = cluster.steer.metric("steer_downstream_connections_total", &[]).unwrap();
    assert_eq!(accepted, 1.0, "all requests have to share one connection");
}

/// First all clients open an engine.io session. Then all ask for the socket.io namespace. Then all
/// fetch the answer. Each step of each client is a request on the same connection.
async fn converse_by_turns(sender: &mut SendRequest<Full<Bytes>>, ring: &BTreeMap<String, String>) {
    let mut sessions = BTreeMap::new();
    for (key, server) in ring {
        let (head, body) = exchange(sender, key, HANDSHAKE, "").await;
        assert_served(&head, server, &body);
        let opened: Value = serde_json::from_str(body.strip_prefix('0').unwrap()).unwrap();
        sessions.insert(key, format!("{HANDSHAKE}&sid={}", text(&opened["sid"])));
    }
    for (key, server) in ring {
        let (head, body) = exchange(sender, key, &sessions[key], "40").await;
        assert_served(&head, server, &body);
        assert_eq!(body, "ok");
    }
    for (key, server) in ring {
        let (head, body) = exchange(sender, key, &sessions[key], "").await;
        assert_served(&head, server, &body);
        assert!(body.starts_with("40{\"sid\":"), "{body}");
    }
}

fn assert_served(head: &Response<()>, server: &str, body: &str) {
    assert_eq!(head.status(), StatusCode::OK, "{body}");
    assert_eq!(head.headers()["x-served-by"], server);
}

/// Sends a POST of `body`, or a GET without `body`.
async fn exchange(
    sender: &mut SendRequest<Full<Bytes>>,
    key: &str,
    path: &str,
    body: &'static str,
) -> (Response<()>, String) {
    let request = Request::builder()
        .method(if body.is_empty() { "GET" } else { "POST" })
        .uri(path)
        .header("host", "sio.example")
        .header("x-forwarded-for", key)
        .header("content-type", "text/plain")
        .body(Full::from(body))
        .unwrap();
    sender.ready().await.unwrap();
    let (head, body) = sender.send_request(request).await.unwrap().into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    (Response::from_parts(head, ()), String::from_utf8(body.to_vec()).unwrap())
}
