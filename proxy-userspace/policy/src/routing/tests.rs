//! Whole decisions: the head that comes in, the head that goes out.

use std::time::Duration;

use super::*;
use crate::config::{
    CookiePolicy, HashPolicy, HashSource, HeaderSource, HttpOptions, PathMatch, VirtualHost,
};
use crate::http1::name::Known;

fn listener(options: HttpOptions, routes: Vec<Route>) -> Listener {
    Listener {
        name: "listener_0".into(),
        address: "127.0.0.1:8080".parse().unwrap(),
        options,
        virtual_hosts: vec![VirtualHost { name: "all".into(), domains: vec!["*".into()], routes }],
    }
}

fn to(path: PathMatch, cluster: &str) -> Route {
    Route {
        path,
        cluster: cluster.to_owned(),
        timeout: Some(Duration::from_secs(15)),
        idle_timeout: None,
        upgrade_websocket: None,
        hash_policy: vec![],
    }
}

fn everything(cluster: &str) -> Vec<Route> {
    vec![to(PathMatch::Prefix("/".into()), cluster)]
}

/// A head that lives as long as the test process.
fn head<'a>(request_line: &str, lines: &[(&str, &str)]) -> RequestHead<'a> {
    let lines: String = lines.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let head = format!("{request_line} HTTP/1.1\r\n{lines}\r\n");
    RequestHead::parse(head.leak().as_bytes()).unwrap()
}

fn connection(remote: &str) -> Connection {
    Connection {
        remote: remote.parse().unwrap(),
        local: "127.0.0.1:8080".parse().unwrap(),
        node: "192.0.2.2".parse().unwrap(),
        interface_index: |_| None,
    }
}

/// The lines that go out, `x-request-id` masked.
fn forwarded_lines(
    options: HttpOptions,
    remote: &str,
    lines: &[(&'static str, &'static str)],
) -> Result<Vec<String>, Refusal> {
    let listener = listener(options, everything("sio"));
    let mut head = head("GET /", lines);
    route(&listener, &connection(remote), &mut head)?;
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let mut lines: Vec<_> = head
        .fields
        .iter()
        .map(|field| match (&*text(field.name), &*text(&field.value)) {
            ("x-request-id", id) if id.len() == 36 => "x-request-id: <uuid>".to_owned(),
            (name, value) => format!("{name}: {value}"),
        })
        .collect();
    lines.sort();
    Ok(lines)
}

fn edge() -> HttpOptions {
    HttpOptions { use_remote_address: true, ..HttpOptions::default() }
}

fn refusal(options: HttpOptions, request_line: &str, lines: &[(&'static str, &'static str)]) -> Refusal {
    let listener = listener(options, vec![to(PathMatch::Prefix("/app".into()), "sio")]);
    let mut head = head(request_line, lines);
    route(&listener, &connection("127.0.0.1:50000"), &mut head).unwrap_err()
}

const HOST: (&str, &str) = ("host", "t");
const ASKS: [(&str, &str); 3] = [HOST, ("connection", "Upgrade"), ("upgrade", "websocket")];

#[test]
fn refusals_and_their_status() {
    let default = HttpOptions::default;
    for (found, expected, status) in [
        (refusal(default(), "GET /app", &[]), Refusal::MissingHost, 400),
        (refusal(default(), "GET /app", &[("host", "a b")]), Refusal::BadHost, 400),
        (refusal(default(), "CONNECT t:443", &[HOST]), Refusal::BadTarget, 400),
        (refusal(default(), "OPTIONS *", &[HOST]), Refusal::BadTarget, 400),
        (refusal(default(), "GET https://t/app", &[HOST]), Refusal::BadTarget, 400),
        (refusal(default(), "GET http://u:p@t/app", &[HOST]), Refusal::BadTarget, 400),
        (
            refusal(default(), "GET /app", &[HOST, ("connection", "X-Forwarded-For")]),
            Refusal::BadConnection,
            400,
        ),
        (refusal(default(), "GET /other", &[HOST]), Refusal::NoRoute, 404),
        (refusal(default(), "GET /app", &ASKS), Refusal::UpgradeNotAllowed, 403),
        (refusal(default(), "GET /other", &ASKS), Refusal::UpgradeNotAllowed, 403),
    ] {
        assert_eq!((found, found.status().as_u16()), (expected, status));
    }
    let websocket = HttpOptions { upgrade_websocket: true, ..default() };
    assert_eq!(refusal(websocket, "GET /other", &ASKS), Refusal::NoRoute);
}

#[test]
fn http_10_must_be_allowed() {
    let old = || RequestHead { version: Version::Http10, ..head("GET /", &[HOST]) };
    let strict = listener(HttpOptions::default(), everything("sio"));
    let refused = route(&strict, &connection("127.0.0.1:50000"), &mut old()).unwrap_err();
    assert_eq!((refused, refused.status().as_u16()), (Refusal::Http10, 426));
    let lenient = listener(HttpOptions { accept_http_10: true, ..HttpOptions::default() }, everything("sio"));
    assert!(route(&lenient, &connection("127.0.0.1:50000"), &mut old()).is_ok());
}

#[test]
fn the_first_matching_route_is_taken() {
    let routes = vec![
        to(PathMatch::Exact("/a".into()), "exact"),
        to(PathMatch::Prefix("/a".into()), "a"),
        to(PathMatch::Prefix("/ab".into()), "ab"),
        to(PathMatch::Prefix("/".into()), "rest"),
    ];
    let listener = listener(HttpOptions::default(), routes);
    for (target, cluster) in [
        ("/a", "exact"),
        ("/a?b=c", "exact"),
        ("/a/", "a"),
        ("/abc", "a"),
        ("/A", "rest"),
        ("//a", "rest"),
        ("/%61", "rest"),
        ("http://elsewhere/a?x", "exact"),
    ] {
        let mut head = head(&format!("GET {target}"), &[HOST]);
        let routed = route(&listener, &connection("127.0.0.1:50000"), &mut head).unwrap();
        assert_eq!(routed.route.cluster, cluster, "{target}");
    }
}

#[test]
fn an_absolute_target_becomes_a_path_and_host() {
    let listener = listener(HttpOptions::default(), everything("sio"));
    for (target, path) in [("http://Abs.example:81/x?y", "/x?y"), ("http://Abs.example:81", "/")] {
        let mut head = head(&format!("GET {target}"), &[HOST]);
        route(&listener, &connection("127.0.0.1:50000"), &mut head).unwrap();
        assert_eq!(head.target, path.as_bytes());
        assert_eq!(head.fields.get(Known::Host), Some(&b"Abs.example:81"[..]));
    }
}

#[test]
fn routes_override_the_listeners_upgrades() {
    for (listener_allows, route_says, allowed) in
        [(false, None, false), (false, Some(true), true), (true, None, true), (true, Some(false), false)]
    {
        let mut routes = everything("sio");
        routes[0].upgrade_websocket = route_says;
        let options = HttpOptions { upgrade_websocket: listener_allows, ..HttpOptions::default() };
        let listener = listener(options, routes);
        let routed = route(&listener, &connection("127.0.0.1:50000"), &mut head("GET /", &ASKS));
        assert_eq!(routed.as_ref().is_ok_and(|routed| routed.upgrade), allowed);
        let plain = route(&listener, &connection("127.0.0.1:50000"), &mut head("GET /", &[HOST]));
        assert!(!plain.unwrap().upgrade);
    }
}

#[test]
fn hop_by_hop_headers_do_not_pass() {
    let lines = forwarded_lines(
        HttpOptions::default(),
        "127.0.0.1:50000",
        &[
            HOST,
            ("connection", "x-hop, keep-alive, te"),
            ("connection", "Content-Foo"),
            ("x-hop", "1"),
            ("content-foo", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("upgrade", "websocket"),
            ("te", "deflate, Trailers"),
            ("transfer-encoding", "chunked"),
            ("expect", "100-Continue"),
            ("x-envoy-retry-on", "5xx"),
            ("x-forwarded-client-cert", "By=x"),
            ("x-envoy-decorator-operation", "kept away from the edge"),
        ],
    );
    let expected = [
        "host: t",
        "te: trailers",
        "x-envoy-decorator-operation: kept away from the edge",
        "x-forwarded-proto: http",
        "x-request-id: <uuid>",
    ];
    assert_eq!(lines.unwrap(), expected);
}

#[test]
fn an_upgrade_keeps_connection_and_what_it_names() {
    let options = HttpOptions { upgrade_websocket: true, ..HttpOptions::default() };
    let lines = forwarded_lines(
        options,
        "127.0.0.1:50000",
        &[
            HOST,
            ("connection", "keep-alive, x-hop"),
            ("connection", "Upgrade"),
            ("upgrade", "WebSocket"),
            ("x-hop", "1"),
            ("te", "trailers, deflate"),
            ("keep-alive", "timeout=5"),
        ],
    );
    let expected = [
        "connection: keep-alive, x-hop,Upgrade",
        "host: t",
        "te: trailers, deflate",
        "upgrade: WebSocket",
        "x-forwarded-proto: http",
        "x-hop: 1",
        "x-request-id: <uuid>",
    ];
    assert_eq!(lines.unwrap(), expected);
}

#[test]
fn other_offers_than_websocket_are_served_as_plain_http() {
    for offer in ["h2c", "TLS/1.2", "foo", "websocket, h2c"] {
        let lines = forwarded_lines(
            HttpOptions::default(),
            "127.0.0.1:50000",
            &[
                HOST,
                ("connection", "upgrade, http2-settings"),
                ("upgrade", offer),
                ("http2-settings", "AAMA"),
            ],
        );
        assert_eq!(lines.unwrap(), ["host: t", "x-forwarded-proto: http", "x-request-id: <uuid>"]);
    }
}

#[test]
fn behind_another_proxy_forwarded_headers_stay() {
    let lines = forwarded_lines(
        HttpOptions::default(),
        "203.0.113.9:4711",
        &[
            HOST,
            ("x-forwarded-for", "198.51.100.1"),
            ("x-forwarded-for", ""),
            ("x-forwarded-for", "10.0.0.1, 10.0.0.2"),
            ("x-forwarded-proto", "ftp"),
            ("x-request-id", "chosen"),
            ("x-envoy-external-address", "9.9.9.9"),
        ],
    );
    let expected = [
        "host: t",
        "x-envoy-external-address: 9.9.9.9",
        "x-forwarded-for: 198.51.100.1,10.0.0.1, 10.0.0.2",
        "x-forwarded-proto: ftp",
        "x-request-id: chosen",
    ];
    assert_eq!(lines.unwrap(), expected);
}

#[test]
fn at_the_edge_the_peer_is_the_client() {
    let options = HttpOptions { via: Some("edge".into()), ..edge() };
    let incoming = [
        HOST,
        ("x-forwarded-for", "198.51.100.1"),
        ("x-forwarded-proto", "https"),
        ("x-request-id", "chosen"),
        ("x-envoy-external-address", "9.9.9.9"),
        ("x-envoy-decorator-operation", "removed at the edge"),
        ("via", "1.0 a"),
        ("via", "1.1 b"),
    ];
    let expected = [
        "host: t",
        "via: 1.0 a,1.1 b, edge",
        "x-envoy-external-address: 203.0.113.9",
        "x-forwarded-for: 198.51.100.1,203.0.113.9",
        "x-forwarded-proto: http",
        "x-request-id: <uuid>",
    ];
    assert_eq!(forwarded_lines(options, "203.0.113.9:4711", &incoming).unwrap(), expected);
}

#[test]
fn a_peer_on_loopback_is_named_by_this_host() {
    let forwarded_for = |remote: &str| {
        let lines = forwarded_lines(edge(), remote, &[HOST, ("x-forwarded-for", "")]).unwrap();
        lines[2].clone()
    };
    assert_eq!(forwarded_for("127.0.0.1:1"), "x-forwarded-for: 192.0.2.2");
    assert_eq!(forwarded_for("[::1]:1"), "x-forwarded-for: 192.0.2.2");
    assert_eq!(forwarded_for("127.0.0.2:1"), "x-forwarded-for: 127.0.0.2");
    assert_eq!(forwarded_for("[2001:db8::7]:1"), "x-forwarded-for: 2001:db8::7");
}

#[test]
fn trusted_hops_at_the_edge() {
    let options = |hops| HttpOptions { xff_num_trusted_hops: hops, skip_xff_append: true, ..edge() };
    let external = |hops, value| {
        let incoming = [HOST, ("x-forwarded-for", value), ("x-forwarded-proto", "https")];
        let lines = forwarded_lines(options(hops), "203.0.113.9:1", &incoming).unwrap();
        (lines[1].clone(), lines[3].clone())
    };
    let (address, proto) = external(1, "1.1.1.1, 2.2.2.2");
    assert_eq!(address, "x-envoy-external-address: 2.2.2.2");
    assert_eq!(proto, "x-forwarded-proto: https", "with trusted hops it is believed");
    assert_eq!(external(2, "1.1.1.1, 2.2.2.2").0, "x-envoy-external-address: 1.1.1.1");
    assert_eq!(external(3, "1.1.1.1, 2.2.2.2").0, "x-envoy-external-address: 203.0.113.9");
    assert_eq!(external(0, "1.1.1.1, 2.2.2.2").1, "x-forwarded-proto: http");
}

#[test]
fn request_ids_follow_the_options() {
    let id = |options: HttpOptions, incoming: &[(&'static str, &'static str)]| {
        let lines = forwarded_lines(options, "203.0.113.9:1", incoming).unwrap();
        lines.into_iter().find(|line| line.starts_with("x-request-id"))
    };
    let chosen = [HOST, ("x-request-id", "chosen")];
    assert_eq!(id(edge(), &chosen).unwrap(), "x-request-id: <uuid>");
    let preserve = HttpOptions { preserve_external_request_id: true, ..edge() };
    assert_eq!(id(preserve, &chosen).unwrap(), "x-request-id: chosen");
    let never = || HttpOptions { generate_request_id: false, ..HttpOptions::default() };
    assert_eq!(id(never(), &[HOST]), None);
    assert_eq!(id(never(), &chosen).unwrap(), "x-request-id: chosen");
}

#[test]
fn policies_see_the_head_that_goes_out() {
    let xff = HeaderSource::Name(http::HeaderName::from_static("x-forwarded-for"));
    let policy = |source| HashPolicy { source, terminal: false };
    let mut routes = everything("sio");
    routes[0].hash_policy = vec![policy(HashSource::Header { name: xff, rewrite: None })];
    let listener = listener(edge(), routes);
    let mut head = head("GET /", &[HOST]);
    let routed = route(&listener, &connection("203.0.113.9:4711"), &mut head).unwrap();
    assert_eq!(routed.hash, Some(crate::affinity::xxh64(b"203.0.113.9")));
    assert!(routed.set_cookies.is_empty());
}

#[test]
fn made_cookies_are_handed_over() {
    let mut routes = everything("sio");
    let cookie = CookiePolicy {
        name: "sid".into(),
        ttl: Some(Duration::from_secs(60)),
        path: None,
        attributes: vec![],
    };
    routes[0].hash_policy = vec![HashPolicy { source: HashSource::Cookie(cookie), terminal: false }];
    let listener = listener(HttpOptions::default(), routes);
    let mut head = head("GET /", &[HOST]);
    let routed = route(&listener, &connection("127.0.0.1:43934"), &mut head).unwrap();
    let value = format!("{:016x}", crate::affinity::xxh64(b"127.0.0.1:43934127.0.0.1:8080"));
    assert_eq!(routed.hash, Some(crate::affinity::xxh64(value.as_bytes())));
    assert_eq!(routed.set_cookies, [format!("sid=\"{value}\"; Max-Age=60; HttpOnly").as_str()]);
}
