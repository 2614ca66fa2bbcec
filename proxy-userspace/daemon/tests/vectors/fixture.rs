//! The vector file, the Envoy v3 configs of its cases, and `steer route` to answer requests.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Map, Value, json};
use steer::telemetry::Metrics;
use steer::upstream::Clusters;
use steer_policy::config::{self, Config};

/// The port of the first listener of every config.
pub(crate) const FIRST_PORT: u16 = 21900;

const TYPE: &str = "type.googleapis.com/envoy.extensions.filters";

pub(crate) fn section(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/envoy/vectors.json");
    let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut document: Value = serde_json::from_slice(&text).unwrap();
    assert_eq!(document["format"], 1);
    document[name].take()
}

pub(crate) fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("not a list: {value}"))
}

pub(crate) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("not a string: {value}"))
}

/// The bytes of a string in the vector file.
pub(crate) fn bytes(value: &Value) -> Vec<u8> {
    let Some(hex) = value.get("hex") else { return text(value).into() };
    let digit = |byte: u8| u8::try_from(char::from(byte).to_digit(16).unwrap()).unwrap();
    text(hex).as_bytes().chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

/// Positions in the case's list of hosts, one for each key.
pub(crate) fn picks(value: &Value) -> Vec<usize> {
    match value {
        Value::String(digits) => digits.chars().map(|digit| digit.to_digit(36).unwrap() as usize).collect(),
        _ => list(value).iter().map(|index| usize::try_from(index.as_u64().unwrap()).unwrap()).collect(),
    }
}

/// Collects comparisons. Fails at the end with every difference, or if the number of comparisons is
/// wrong.
#[derive(Default)]
pub(crate) struct Comparison {
    made: usize,
    wrong: Vec<String>,
}

impl Comparison {
    pub(crate) fn equal<T: PartialEq + std::fmt::Debug>(
        &mut self,
        what: impl FnOnce() -> String,
        got: T,
        envoy: T,
    ) {
        self.made += 1;
        if got != envoy {
            self.wrong.push(format!("{}: steer {got:?}, envoy {envoy:?}", what()));
        }
    }

    #[track_caller]
    pub(crate) fn finish(self, expected: usize) {
        let first = &self.wrong[..self.wrong.len().min(20)];
        assert!(
            first.is_empty(),
            "{} of {} comparisons differ:\n{}",
            self.wrong.len(),
            self.made,
            first.join("\n")
        );
        assert_eq!(self.made, expected, "comparisons made");
    }
}

/// A config as Envoy reads it, with listeners on ports from [`FIRST_PORT`] on.
pub(crate) struct Bootstrap {
    listeners: Vec<Value>,
    clusters: Vec<Value>,
}

impl Bootstrap {
    pub(crate) fn new() -> Self {
        Self { listeners: vec![], clusters: vec![] }
    }

    /// Adds a listener. `options` are fields of the HTTP connection manager.
    pub(crate) fn listener(mut self, name: &str, routes: &[Value], options: &Value) -> Self {
        let port = usize::from(FIRST_PORT) + self.listeners.len();
        let mut manager = json!({
            "@type": format!("{TYPE}.network.http_connection_manager.v3.HttpConnectionManager"),
            "stat_prefix": name,
            "http_filters": [{
                "name": "envoy.filters.http.router",
                "typed_config": { "@type": format!("{TYPE}.http.router.v3.Router") },
            }],
            "route_config": {
                "name": name,
                "virtual_hosts": [{ "name": "v", "domains": ["*"], "routes": routes }],
            },
        });
        merge(&mut manager, options);
        self.listeners.push(json!({
            "name": name,
            "address": { "socket_address": { "address": "127.0.0.1", "port_value": port } },
            "filter_chains": [{ "filters": [{
                "name": "envoy.filters.network.http_connection_manager",
                "typed_config": manager,
            }] }],
        }));
        self
    }

    /// Adds a cluster. `case` has the fields of a case of section `lb`.
    pub(crate) fn cluster(mut self, name: &str, case: &Value, hosts: &[Value]) -> Self {
        let endpoints: Vec<_> = hosts.iter().map(endpoint).collect();
        let mut cluster = json!({
            "name": name,
            "type": "STATIC",
            "connect_timeout": "1s",
            "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": endpoints }] },
        });
        let mut common = Map::new();
        if let Some(threshold) = case.get("panic_threshold") {
            common.insert("healthy_panic_threshold".into(), json!({ "value": threshold }));
        }
        if case["use_hostname_for_hashing"] == true {
            let hostname = json!({ "use_hostname_for_hashing": true });
            common.insert("consistent_hashing_lb_config".into(), hostname);
            // Envoy refuses this option for STATIC clusters.
            cluster["type"] = "STRICT_DNS".into();
        }
        if !common.is_empty() {
            cluster["common_lb_config"] = common.into();
        }
        let sizes: Map<_, _> = ["hash_function", "minimum_ring_size", "maximum_ring_size", "table_size"]
            .iter()
            .filter_map(|&field| Some((field.to_owned(), case.get(field)?.clone())))
            .collect();
        let (policy, field) = match text(&case["lb"]) {
            "maglev" => ("MAGLEV", "maglev_lb_config"),
            _ => ("RING_HASH", "ring_hash_lb_config"),
        };
        cluster["lb_policy"] = policy.into();
        if !sizes.is_empty() {
            cluster[field] = sizes.into();
        }
        self.clusters.push(cluster);
        self
    }

    pub(crate) fn write(self) -> ConfigFile {
        let bootstrap =
            json!({ "static_resources": { "listeners": self.listeners, "clusters": self.clusters } });
        let mut file = tempfile::Builder::new().suffix(".json").tempfile().unwrap();
        file.write_all(bootstrap.to_string().as_bytes()).unwrap();
        ConfigFile(file)
    }
}

fn merge(object: &mut Value, fields: &Value) {
    for (name, value) in fields.as_object().into_iter().flatten() {
        object[name] = value.clone();
    }
}

fn endpoint(host: &Value) -> Value {
    let (address, port) = text(&host["address"]).rsplit_once(':').unwrap();
    let port: u16 = port.parse().unwrap();
    let address = address.trim_matches(['[', ']']);
    let mut endpoint = json!({
        "endpoint": { "address": { "socket_address": { "address": address, "port_value": port } } },
    });
    if let Some(hostname) = host.get("hostname") {
        endpoint["endpoint"]["hostname"] = hostname.clone();
    }
    if let Some(weight) = host.get("weight") {
        endpoint["load_balancing_weight"] = weight.clone();
    }
    if let Some(key) = host.get("hash_key") {
        endpoint["metadata"] = json!({ "filter_metadata": { "envoy.lb": { "hash_key": key } } });
    }
    match host.get("health").map(text) {
        None => {}
        // The host failed Envoy's active health checks. Steer does not have such checks, so the
        // config says so.
        Some("HC_FAIL") => endpoint["health_status"] = "UNHEALTHY".into(),
        Some(health) => endpoint["health_status"] = health.into(),
    }
    endpoint
}

pub(crate) fn route(prefix: &str, cluster: &str, hash_policy: &Value) -> Value {
    json!({
        "match": { "prefix": prefix },
        "route": { "cluster": cluster, "hash_policy": hash_policy },
    })
}

/// A hash policy that hashes a header.
pub(crate) fn by_header(name: &str) -> Value {
    json!([{ "header": { "header_name": name } }])
}

pub(crate) fn hosts_of(addresses: &Value) -> Vec<Value> {
    list(addresses).iter().map(|address| json!({ "address": address })).collect()
}

/// A config on disk. The file is removed when the value is dropped.
pub(crate) struct ConfigFile(tempfile::NamedTempFile);

impl ConfigFile {
    pub(crate) fn load(&self) -> Config {
        config::load(self.0.path()).unwrap_or_else(|error| panic!("{error}"))
    }

    /// What `steer route --batch` answers to each of the requests.
    pub(crate) fn ask(&self, requests: &[Value], arguments: &[&str]) -> Vec<Value> {
        let mut batch = tempfile::NamedTempFile::new().unwrap();
        for request in requests {
            writeln!(batch, "{request}").unwrap();
        }
        let output = Command::new(env!("CARGO_BIN_EXE_steer"))
            .args(["route", "-c"])
            .arg(self.0.path())
            .arg("--batch")
            .arg(batch.path())
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .unwrap();
        assert!(output.status.success(), "steer route: {}", output.status);
        let answers: Vec<Value> =
            output.stdout.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).map(parsed).collect();
        assert_eq!(answers.len(), requests.len());
        answers
    }
}

fn parsed(line: &[u8]) -> Value {
    serde_json::from_slice(line).unwrap()
}

pub(crate) fn clusters(config: &Config) -> Clusters {
    Clusters::new(config, &Metrics::new())
}
