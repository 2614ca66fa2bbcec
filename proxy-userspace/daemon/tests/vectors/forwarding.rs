//! What the endpoint learns about the client, and which requests are refused.

use std::net::{IpAddr, SocketAddr};

use http::HeaderValue;
use serde_json::{Value, json};
use steer_policy::config::Config;
use steer_policy::http1::fields::Field;
use steer_policy::http1::request::RequestHead;
use steer_policy::routing::{self, Connection};

use crate::fixture::{
    Bootstrap, Comparison, FIRST_PORT, by_header, clusters, hosts_of, list, route, section, text,
};

/// The address of Envoy's host at the time the vectors were recorded.
const NODE: &str = "192.0.2.2";

fn local(listener: usize) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], FIRST_PORT + u16::try_from(listener).unwrap()))
}

fn connection(peer: SocketAddr, listener: usize) -> Connection {
    Connection {
        remote: peer,
        local: local(listener),
        node: NODE.parse().unwrap(),
        interface_index: |_| None,
    }
}

/// A head that lives as long as the test process.
fn head<'l, 'h>(request_line: &str, lines: impl Iterator<Item = (&'l str, &'l str)>) -> RequestHead<'h> {
    let lines: String = lines.map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let head = format!("{request_line}\r\n{lines}\r\n");
    RequestHead::parse(head.leak().as_bytes()).unwrap()
}

#[test]
fn forwarded_headers_are_alike() {
    let xff = section("xff");
    assert_eq!(xff["local_info_ip"], NODE);
    let by_address = json!([{ "connection_properties": { "source_ip": true } }]);
    let routes = [route("/h/", "c", &by_header("x-forwarded-for")), route("/i/", "c", &by_address)];
    let mut bootstrap = Bootstrap::new().cluster("c", &json!({ "lb": "maglev" }), &hosts_of(&xff["hosts"]));
    for (index, options) in list(&xff["cfgs"]).iter().enumerate() {
        bootstrap = bootstrap.listener(&format!("x{index}"), &routes, options);
    }
    let config = bootstrap.write();
    let loaded = config.load();

    let cases = list(&xff["cases"]);
    let mut requests = Vec::new();
    for case in cases {
        let lines: Vec<_> = lines_of(case).into_iter().map(|(name, value)| json!([name, value])).collect();
        for path in ["/h/", "/i/"] {
            requests.push(json!({
                "host": "t",
                "path": path,
                "headers": lines,
                "source": SocketAddr::new(text(&case["peer"]).parse().unwrap(), 50000),
                "local": local(usize::try_from(case["cfg"].as_u64().unwrap()).unwrap()),
            }));
        }
    }
    let answers = config.ask(&requests, &["--node-address", NODE]);

    let mut comparison = Comparison::default();
    let address = |pick: &Value| match pick.as_u64() {
        Some(pick) => xff["hosts"][usize::try_from(pick).unwrap()].clone(),
        None => Value::Null,
    };
    for (case, answers) in cases.iter().zip(answers.chunks(2)) {
        let picked = [&case["pick_xff"], &case["pick_ip"]].map(address);
        comparison.equal(
            || format!("picks of {case}"),
            [&answers[0], &answers[1]].map(endpoint),
            picked.each_ref(),
        );

        let peer: IpAddr = text(&case["peer"]).parse().unwrap();
        let listener = usize::try_from(case["cfg"].as_u64().unwrap()).unwrap();
        let mut head = head("GET /h/ HTTP/1.1", [("host", "t")].into_iter().chain(lines_of(case)));
        let connection = connection(SocketAddr::new(peer, 50000), listener);
        routing::route(&loaded.listeners[listener], &connection, &mut head).unwrap();
        let values = |name: &'static str| -> Vec<&str> {
            head.fields.named(name).map(|value| std::str::from_utf8(value).unwrap()).collect()
        };
        let told = json!({
            "up_xff": values("x-forwarded-for"),
            "up_xfp": values("x-forwarded-proto"),
            "external": values("x-envoy-external-address"),
        });
        let external: Vec<_> = case["external"].as_str().into_iter().collect();
        let envoy = json!({ "up_xff": case["up_xff"], "up_xfp": [case["up_xfp"]], "external": external });
        comparison.equal(|| format!("headers of {case}"), told, envoy);
    }
    comparison.finish(2 * 1440);
}

fn endpoint(answer: &Value) -> &Value {
    assert!(answer["error"].is_null(), "{answer}");
    &answer["endpoint"]
}

fn lines_of(case: &Value) -> Vec<(&str, &str)> {
    let mut lines: Vec<_> = list(&case["xff"]).iter().map(|line| ("X-Forwarded-For", text(line))).collect();
    lines.extend(case.get("xfp").map(|proto| ("X-Forwarded-Proto", text(proto))));
    lines
}

/// The outcome of the requests of section `ws`: refused or forwarded, to which endpoint, and with
/// which head.
#[test]
fn upgrades_are_refused_and_forwarded_alike() {
    let ws = section("ws");
    let dead = vec![json!({ "address": ws["dead"] })];
    let ring = json!({ "lb": "ring_hash" });
    let mut bootstrap =
        Bootstrap::new().cluster("c", &ring, &hosts_of(&ws["hosts"])).cluster("dead", &ring, &dead);
    for (name, options) in ws["listeners"].as_object().unwrap() {
        bootstrap = bootstrap.listener(name, list(&ws["routes"]), options);
    }
    let config = bootstrap.write().load();
    let mut comparison = Comparison::default();
    for case in list(&ws["cases"]) {
        compare_transcript(&config, case, &mut comparison);
    }
    comparison.finish(170);
}

/// Envoy answers these offers with 403, since nobody has configured their types. Steer ignores each
/// offer but `websocket` (RFC 9110, 7.8), and serves the request.
const IGNORED_OFFERS: [&str; 3] = ["other type", "list of types", "two Upgrade lines"];

fn compare_transcript(config: &Config, case: &Value, comparison: &mut Comparison) {
    let id = text(&case["id"]);
    let (request_line, lines) = head_lines(text(&case["request"]));
    let mut head = head(&request_line, lines.iter().map(|(name, value)| (&**name, &**value)));
    let listener = config.listeners.iter().position(|found| found.name == text(&case["listener"])).unwrap();
    let peer = case.get("peer").map_or("127.0.0.1:50000", text).parse().unwrap();
    let routed = routing::route(&config.listeners[listener], &connection(peer, listener), &mut head);

    let status = &case["status"];
    if IGNORED_OFFERS.contains(&id) {
        assert!(!routed.unwrap().upgrade && *status == 403, "{id}");
        assert_eq!(head.fields.named("upgrade").count(), 0, "{id}");
        return;
    }
    let routed = match routed {
        Ok(routed) => routed,
        Err(refusal) => {
            comparison.equal(|| id.to_owned(), &json!(refusal.status().as_u16()), status);
            comparison.equal(|| format!("{id}: upstream"), None, case.get("upstream"));
            return;
        }
    };
    let switched = *status == 101;
    assert!(routed.upgrade || !switched, "{id}: not recognized as an upgrade");
    let pick = clusters(config).get(&routed.route.cluster).unwrap().pick(routed.hash).unwrap();
    let endpoint = pick.endpoint.address.to_string();
    let Some(upstream) = case.get("upstream") else {
        // Envoy could not connect to the endpoint.
        assert_eq!(*status, 503, "{id}");
        let expected = ("127.255.1.1:21899", "dead");
        comparison.equal(|| id.to_owned(), (&*endpoint, &*routed.route.cluster), expected);
        return;
    };
    if !routed.set_cookies.is_empty() && case.get("peer").is_none() {
        // The vectors do not say for which connection the cookie was made.
        comparison.equal(|| format!("{id}: cookies"), routed.set_cookies.len(), 1);
    } else if routed.hash.is_some() {
        comparison.equal(|| id.to_owned(), &*endpoint, text(&case["backend"]));
    }
    if case.get("peer").is_some() && !routed.set_cookies.is_empty() {
        let (_, answer) = head_lines(text(&case["response"]));
        let envoy: Vec<_> =
            answer.iter().filter(|line| line.0 == "set-cookie").map(|line| &*line.1).collect();
        comparison.equal(|| format!("{id}: cookies"), cookies(&routed.set_cookies), envoy);
    }
    let (envoys_line, mut envoys) = head_lines(text(&upstream[0]));
    // Steer ignores this header and does not add it.
    envoys.retain(|(name, _)| name != "x-envoy-expected-rq-timeout-ms");
    envoys.sort();
    let line = format!("{} {} HTTP/1.1", head.method, std::str::from_utf8(&head.target).unwrap());
    comparison.equal(|| format!("{id}: head"), (&*line, sent_lines(&head)), (&*envoys_line, envoys));
}

fn cookies(values: &[HeaderValue]) -> Vec<&str> {
    values.iter().map(|value| value.to_str().unwrap()).collect()
}

/// The request line and the header lines of `head`.
fn head_lines(head: &str) -> (String, Vec<(String, String)>) {
    let mut lines = head.trim_end().split("\r\n");
    let first = lines.next().unwrap().to_owned();
    let pair = |line: &str| {
        let (name, value) = line.split_once(':').unwrap();
        (name.to_owned(), value.trim().to_owned())
    };
    (first, lines.map(pair).collect())
}

/// The header lines, sorted. A request id that Steer made is masked as in the vectors.
fn sent_lines(head: &RequestHead<'_>) -> Vec<(String, String)> {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let line = |field: &Field<'_>| match (text(field.name).to_lowercase(), text(&field.value)) {
        (name, id) if name == "x-request-id" && id.len() == 36 => (name, "<uuid>".into()),
        line => line,
    };
    let mut lines: Vec<_> = head.fields.iter().map(line).collect();
    lines.sort();
    lines
}
