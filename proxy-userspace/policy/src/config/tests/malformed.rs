//! Each row breaks one of the good files in one place. The message must stand on the right line and
//! name what is wrong, and the hint must say how to put it right.

use super::super::{LoadError, Problem, parse};
use super::{ENVOY_V1, ENVOY_V3, NATIVE};

/// Text to replace, its replacement, and then: the line, a part of the message, a part of the hint.
type Row = (&'static str, &'static str, usize, &'static str, &'static str);

#[rustfmt::skip]
const NATIVE_ROWS: &[Row] = &[
    ("hash_policy:", "hash_polcy:", 7, "listeners[0].routes[0].hash_polcy: unknown key", "did you mean `hash_policy`?"),
    ("admin:", "admn:", 15, "admn: unknown key", "`admin`"),
    ("timeout: 5s", "verbosity: 5s", 6, "verbosity: unknown key", "docs/configuration.md"),
    ("address: 0.0.0.0:8080", "name: x", 2, "listeners[0]: `address` is missing", "add `address: 0.0.0.0:8080`"),
    ("0.0.0.0:8080", "localhost:8080", 2, "`localhost:8080` is not an address", "host names are not resolved"),
    ("0.0.0.0:8080", "0.0.0.0:80800", 2, "is not an address", "ip:port"),
    ("0.0.0.0:8080", "[1, 2]", 2, "address: must be a string, is a list", "one value"),
    ("0.0.0.0:8080", "8080", 2, "must be a string, is `8080`", "quote it"),
    ("0.0.0.0:8080", "127.0.0.1:9901", 2, "127.0.0.1:9901 is also used on line 15", "its own address"),
    ("  routes:\n", "  routes: 5\n  x:\n", 3, "routes: must be a list, is `5`", "`- `"),
    ("{ prefix: / }", "{ prefix: / , path: /a }", 4, "either `prefix` or `path`", "match: { prefix: / }"),
    ("{ prefix: / }", "{ prefix: socket.io }", 4, "`socket.io` can never match", "begin with `/`"),
    ("{ prefix: / }", "{ path: /a?b }", 4, "`/a?b` can never match", "leave out query"),
    ("{ prefix: / }", "{ safe_regex: / }", 4, "match.safe_regex: unknown key", "docs/configuration.md"),
    ("{ prefix: / }", "/", 4, "match: must be a map, is `/`", "`key: value`"),
    ("cluster: sio", "cluster: soi", 5, "there is no cluster `soi`", "did you mean `sio`?"),
    ("    cluster: sio\n", "", 4, "routes[0]: `cluster` is missing", "add `cluster: sio`"),
    ("timeout: 5s", "timeout: 5", 6, "timeout: must be a duration, is `5`", "15s"),
    ("timeout: 5s", "timeout: -5s", 6, "must be a duration", "250ms"),
    ("timeout: 5s", "timeout: 1e9s", 6, "must be a duration", "250ms"),
    ("timeout: 5s", "timeout: 99999999999h", 6, "must be a duration", "250ms"),
    ("timeout: 5s", "timeout:", 6, "must be a duration, is empty", "250ms"),
    ("timeout: 5s", "timeout: 5s\n    timeout: 6s", 7, "`timeout` stands twice in this map, first on line 6", "keep one"),
    ("header: { header_name: x-forwarded-for }", "header: { }", 8, "`header_name` is missing", "header_name: x-forwarded-for"),
    ("header: { header_name: x-forwarded-for }", "header: x y", 8, "`x y` is not a header name", "x-forwarded-for"),
    ("header: { header_name: x-forwarded-for }", "terminal: true", 8, "exactly one of header, cookie", "one policy"),
    ("header: { header_name: x-forwarded-for }", "{ header: a, cookie: b }", 8, "has 2", "one policy"),
    ("header: { header_name: x-forwarded-for }", "cookie: a=b", 8, "printable ASCII without `;`, `=`", "sid"),
    ("header: { header_name: x-forwarded-for }", "query_parameter: ''", 8, "must not be empty", "give it a value"),
    ("header: { header_name: x-forwarded-for }", "cookie: { name: a, ttl: -1s }", 8, "cookie.ttl: must be a duration", "15s"),
    ("x-forwarded-for }", "a, regex_rewrite: { pattern: { regex: '(' } } }", 8, "regex_rewrite.pattern.regex: bad regex: unclosed group", "RE2"),
    ("x-forwarded-for }", "a, regex_rewrite: { pattern: { regex: 'a' }, substitution: '\\1' } }", 8, "bad substitution: \\1 names a group, but the pattern has 0", "\\0 to \\9"),
    ("[websocket]", "[h2c]", 9, "upgrade_configs[0]: must be one of websocket, is `h2c`", "websocket"),
    ("[websocket]", "true", 9, "upgrade_configs: must be a list", "`- `"),
    ("name: sio", "name: sio\n- name: sio", 12, "another cluster on line 11 is called `sio`", "its own name"),
    ("lb_policy: ring_hash\n", "lb_policy: round_robin\n", 12, "lb_policy: must be one of ring_hash, maglev, is `round_robin`", "ring_hash, maglev"),
    ("lb_policy: ring_hash\n", "lb_policy: ringhash\n", 12, "lb_policy: must be one of", "did you mean `ring_hash`?"),
    ("  lb_policy: ring_hash\n", "", 11, "clusters[0]: `lb_policy` is missing", "lb_policy: ring_hash"),
    ("lb_policy: ring_hash\n", "lb_policy: maglev\n", 13, "is not the one that lb_policy names", "change lb_policy"),
    ("minimum_ring_size: 1024", "minimum_ring_size: 9000000", 13, "from 0 to 8388608, is `9000000`", "in that range"),
    ("minimum_ring_size: 1024", "maximum_ring_size: 8", 13, "maximum_ring_size 8 is less than minimum_ring_size 1024 (the default)", "minimum_ring_size"),
    ("minimum_ring_size: 1024", "hash_function: md5", 13, "hash_function: must be one of xx_hash, murmur_hash_2", "xx_hash"),
    ("ring_hash\n  ring_hash_lb_config: { minimum_ring_size: 1024 }", "maglev\n  maglev_lb_config: { table_size: 65536 }", 13, "table_size must be a prime number, 65536 is none", "next prime is 65537"),
    ("ring_hash\n  ring_hash_lb_config: { minimum_ring_size: 1024 }", "maglev\n  maglev_lb_config: { table_size: 1 }", 13, "from 2 to 5000011", "in that range"),
    ("10.0.0.1:3000", "backend-1:3000", 14, "endpoints[0]: `backend-1:3000` is not an address", "host names are not resolved"),
    ("10.0.0.1:3000", "10.0.0.1:0", 14, "`10.0.0.1:0` has no port", "1 to 65535"),
    ("10.0.0.1:3000", "{ address: \"10.0.0.1:3000\", weight: 0 }", 14, "weight: must be a whole number from 1", "in that range"),
    ("10.0.0.1:3000", "{ address: \"10.0.0.1:3000\", weight: 4294967295 }", 14, "the weights add up to 4294967296", "divide all weights"),
    ("10.0.0.1:3000", "{ address: \"10.0.0.1:3000\", hash_key: 7 }", 14, "hash_key: must be a string, is `7`", "quote it: \"7\""),
    ("[10.0.0.1:3000, 10.0.0.2:3000]", "[10.0.0.1:3000]\n  use_hostname_for_hashing: true", 14, "has no hostname to hash by", "hostname: NAME"),
    ("127.0.0.1:9901", "none", 15, "admin: `none` is not an address", "ip:port"),
    ("127.0.0.1:9901", "127.0.0.1:9901\nsplice: xdp", 16, "splice: must be one of auto, packet, sockmap, relay, is `xdp`", "auto, packet, sockmap, relay"),
    ("127.0.0.1:9901", "127.0.0.1:9901\ninstance: a/b", 16, "instance: must be 1 to 64 letters, digits, `-` and `_`", "edge-1"),
    ("127.0.0.1:9901", "127.0.0.1:9901\npacket_splice: { source_port: [1] }", 16, "packet_splice.source_port: unknown key", "did you mean `source_ports`?"),
    ("127.0.0.1:9901", "127.0.0.1:9901\npacket_splice: { source_ports: [1000-2000] }", 16, "source_ports[0]: port 1000 is reserved for services", "at 1024 or above"),
    ("127.0.0.1:9901", "127.0.0.1:9901\npacket_splice: { source_ports: [0] }", 16, "source_ports[0]: port 0 is reserved", "at 1024 or above"),
    ("127.0.0.1:9901", "127.0.0.1:9901\npacket_splice: { source_ports: [3000-2000] }", 16, "ends before it begins", "2000-3000"),
    ("127.0.0.1:9901", "127.0.0.1:9901\npacket_splice: { source_ports: [60000-70000] }", 16, "source_ports[0]: is not a range of ports", "FIRST-LAST"),
    ("127.0.0.1:9901", "127.0.0.1:9901\npacket_splice: { source_ports: [] }", 16, "must have at least one range", "remove the key"),
    ("127.0.0.1:9901", "127.0.0.1:9901\npacket_splice: { max_streams: 0 }", 16, "max_streams: must be a whole number from 2 to 8388608", "in that range"),
    ("127.0.0.1:9901", "127.0.0.1:9901\npacket_splice: { mark: 0xfffffffe }", 16, "mark: must be a number from 0x1 to 0xfffffffd", "nor the next two"),
    ("127.0.0.1:9901", "127.0.0.1:9901\npacket_splice: { mss: 40 }", 16, "mss: must be a whole number from 88 to 32767", "in that range"),
    ("127.0.0.1:9901", "127.0.0.1:9901\npacket_splice: { keepalive: { time: 0s } }", 16, "keepalive.time: must be more than 0", "60s"),
    ("127.0.0.1:9901", "127.0.0.1:9901\npacket_splice: { orphan_timeout: 2s }", 16, "orphan_timeout: must be at least 3s", "3h"),
    ("127.0.0.1:9901", "127.0.0.1:9901\npacket_splice: { keepalive: { retries: 3 } }", 16, "keepalive.retries: unknown key", "docs/configuration.md"),
    ("[10.0.0.1:3000, 10.0.0.2:3000]", "[10.0.0.1:3000]\n  source_addresses: [10.0.0.5:80]", 15, "`10.0.0.5:80` is no address to connect from", "without a port"),
    ("[10.0.0.1:3000, 10.0.0.2:3000]", "[10.0.0.1:3000]\n  source_addresses: [0.0.0.0]", 15, "`0.0.0.0` is no address to connect from", "of this host"),
    ("[10.0.0.1:3000, 10.0.0.2:3000]", "[10.0.0.1:3000]\n  source_addresses: [10.0.0.5, 10.0.0.5]", 15, "source_addresses[1]: 10.0.0.5 stands twice", "remove one"),
    ("127.0.0.1:9901", "127.0.0.1:9901\n---\na: b", 16, "a second document begins here", "one document"),
    ("  timeout: 5s", "\ttimeout: 5s", 5, "bad YAML: while scanning a plain scalar, found a tab", "indent with spaces"),
    ("[websocket]", "[websocket", 10, "bad YAML", "brackets"),
    ("address: 0.0.0.0:8080", "address: 0.0.0.0:8080\n  name: listener_1\n  routes: []\n- address: 0.0.0.0:81", 5, "another listener on line 2 is called `listener_1`", "its own name"),
    ("cluster: sio", "? [a]\n    : sio", 5, "a list or a map cannot be a key", "`key: value`"),
    ("cluster: sio", "<<: *nobody", 5, "bad YAML", "brackets"),
    ("cluster: sio", "cluster: &a [*a]", 5, "alias", "write the value out"),
    ("  routes:\n", "  virtual_hosts: [{ domains: [a.b, A.b], routes: [] }]\n  x:\n", 3, "the domain `A.b` stands twice in this listener, first on line 3", "keep one"),
    ("  routes:\n", "  virtual_hosts: [{ domains: ['a.*.b'], routes: [] }]\n  x:\n", 3, "`a.*.b` is not a domain", "*.example.com"),
    ("  routes:\n", "  max_request_headers_kb: 0\n  routes:\n", 3, "from 1 to 8192, is `0`", "in that range"),
    ("  routes:\n", "  use_remote_address: yes\n  routes:\n", 3, "must be true or false, is `yes`", "true or false"),
    ("  routes:\n", "  server_name: ''\n  routes:\n", 3, "server_name: must not be empty", "remove the key"),
    ("  routes:\n", "  via: é\n  routes:\n", 3, "via: must be printable ASCII", "other characters"),
];

#[rustfmt::skip]
const V3_ROWS: &[Row] = &[
    ("cluster: ws", "cluster: wss", 20, "there is no cluster `wss`", "did you mean `ws`?"),
    ("          codec_type: AUTO", "          codec_typ: AUTO", 11, "typed_config.codec_typ: unknown key", "did you mean `codec_type`?"),
    ("codec_type: AUTO", "codec_type: HTTP2", 11, "must be one of AUTO, HTTP1, is `HTTP2`", "HTTP1"),
    ("codec_type: AUTO", "codec_type: quic", 11, "must be one of AUTO, HTTP1, is `quic`", "AUTO, HTTP1"),
    ("codec_type: AUTO", "normalize_path: true", 11, "normalize_path: Steer compares and forwards", "remove it"),
    ("codec_type: AUTO", "max_request_headers_kb: 9000", 11, "from 1 to 8192", "in that range"),
    ("codec_type: AUTO", "upgrade_configs: [{ upgrade_type: CONNECT }]", 11, "`CONNECT`: Steer carries only websocket", "remove it"),
    ("v3.HttpConnectionManager", "v3.TcpProxy", 9, "TcpProxy` is not supported", "HttpConnectionManager"),
    ("          route_config:", "          rds: {}\n          route_config:", 12, "rds: Steer reads no routes from a server", "route_config"),
    ("match: { prefix: \"/\" }", "match: { prefix: \"/\", headers: [] }", 18, "match.headers: Steer matches by host", "use prefix or path"),
    ("match: { prefix: \"/\" }", "match: { safe_regex: { regex: a } }", 18, "match.safe_regex:", "use prefix or path"),
    ("match: { prefix: \"/\" }", "match: { prefix: \"/\", case_sensitive: false }", 18, "compares paths case-sensitively", "each spelling"),
    ("cluster: ws", "prefix_rewrite: /\n                  cluster: ws", 20, "route.prefix_rewrite: Steer forwards path and Host", "in front of Steer"),
    ("cluster: ws", "host_rewrite_literal: a\n                  cluster: ws", 20, "host_rewrite_literal:", "in front of Steer"),
    ("cluster: ws", "weighted_clusters: {}", 20, "weighted_clusters: a route of Steer has one fixed cluster", "use `cluster`"),
    ("                route:", "                redirect:", 19, "redirect: Steer forwards requests and answers none", "in front of Steer"),
    ("                route:", "                request_headers_to_add: []\n                route:", 19, "request_headers_to_add: Steer does not edit headers", "in front of Steer"),
    ("header: { header_name: x-forwarded-for }", "filter_state: { key: a }", 22, "filter_state: Steer has no filters", "use header, cookie"),
    ("header: { header_name: x-forwarded-for }", "header: x-forwarded-for", 22, "header: must be a map", "key: value"),
    ("domains: [\"*\"]", "domains: []", 16, "must name at least one domain", "[\"*\"]"),
    ("http.router.v3.Router", "http.lua.v3.Lua", 27, "Steer runs no HTTP filter but the router", "in front of Steer"),
    ("type: STATIC", "type: EDS", 31, "type: EDS is not supported", "STRICT_DNS with IP addresses"),
    ("lb_policy: RING_HASH", "lb_policy: ROUND_ROBIN", 33, "`ROUND_ROBIN` keeps no client on its endpoint", "RING_HASH or MAGLEV"),
    ("    lb_policy: RING_HASH\n", "", 30, "`lb_policy` is missing", "RING_HASH"),
    ("{ minimum_ring_size: 1024, hash_function: XX_HASH }", "{ minimum_ring_size: 5, maximum_ring_size: 4 }", 34, "maximum_ring_size 4 is less than minimum_ring_size 5", "at most"),
    ("connect_timeout: 0.25s", "transport_socket: {}", 32, "transport_socket: Steer does not speak TLS", "plain TCP"),
    ("connect_timeout: 0.25s", "connect_timeout: 0s", 32, "connect_timeout: must be more than 0", "5s"),
    ("connect_timeout: 0.25s", "upstream_bind_config: { source_address: { address: 10.0.0.5, port_value: 5000 } }", 32, "port_value: Steer chooses the ports", "port_value: 0"),
    ("connect_timeout: 0.25s", "upstream_bind_config: { source_address: { address: host, port_value: 0 } }", 32, "`host` is no address to connect from", "of this host"),
    ("connect_timeout: 0.25s", "http2_protocol_options: {}", 32, "Steer speaks HTTP/1.1 to endpoints", "remove it"),
    ("connect_timeout: 0.25s", "common_lb_config: { healthy_panic_threshold: { value: 101 } }", 32, "must be a number from 0 to 100", "50"),
    ("connect_timeout: 0.25s", "common_lb_config: { locality_weighted_lb_config: {} }", 32, "does not weigh localities", "load_balancing_weight"),
    ("connect_timeout: 0.25s", "common_lb_config: { consistent_hashing_lb_config: { hash_balance_factor: 150 } }", 32, "always keeps to the ring", "remove it"),
    ("connect_timeout: 0.25s", "common_lb_config: { consistent_hashing_lb_config: { use_hostname_for_hashing: true } }", 32, "a STATIC cluster cannot hash by host name", "STRICT_DNS"),
    ("address: 10.10.62.120,", "address: backend.local,", 39, "`backend.local` is not an IP address", "not resolved yet"),
    ("port_value: 3000 } } }\n", "port_value: 70000 } } }\n", 39, "from 1 to 65535", "in that range"),
    ("      - lb_endpoints:", "      - priority: 1\n        lb_endpoints:", 38, "priority: Steer has one priority", "priority 0"),
    ("static_resources:", "dynamic_resources: {}\nstatic_resources:", 1, "Steer reads no configuration from a server", "static_resources"),
    ("    filter_chains:", "    listener_filters: [{ name: envoy.filters.listener.proxy_protocol }]\n    filter_chains:", 5, "clients would be taken for others", "remove it"),
    ("    - filters:", "    - filters: []\n    - filters:", 6, "exactly one filter chain here, found 2", "one listener for each port"),
];

#[rustfmt::skip]
const V1_ROWS: &[Row] = &[
    ("\"use_websocket\"", "\"use_websockets\"", 21, "routes[0].use_websockets: unknown key", "did you mean `use_websocket`?"),
    ("\"cluster\": \"ws\"", "\"cluster\": \"w\"", 20, "there is no cluster `w`", "did you mean `ws`?"),
    ("\"cluster\": \"ws\",", "\"cluster\": \"ws\", \"host_redirect\": \"a\",", 20, "host_redirect: Steer forwards requests as they come", "in front of Steer"),
    ("\"prefix\": \"/\"", "\"regex\": \"/\"", 19, "regex: Steer matches by host", "use prefix or path"),
    ("{ \"header_name\": \"x-forwarded-for\" }", "{}", 22, "`header_name` is missing", "x-forwarded-for"),
    ("tcp://127.0.0.1:21900", "127.0.0.1:21900", 4, "`127.0.0.1:21900` is not a TCP address", "tcp://ip:port"),
    ("tcp://10.10.62.121", "tcp://backend", 44, "`backend:3000` is not an address", "ip:port"),
    ("\"ring_hash\",", "\"least_request\",", 42, "`least_request` keeps no client on its endpoint", "ring_hash"),
    ("\"static\"", "\"sds\"", 40, "sds is not supported", "static"),
    ("\"minimum_ring_size\": 1024", "\"minimum_ring_size\": \"many\"", 43, "from 0 to 8388608, is `many`", "in that range"),
    ("\"use_std_hash\": false", "\"use_std_hash\": \"false\"", 43, "must be true or false, is `false`", "without quotes"),
    ("\"name\": \"router\"", "\"name\": \"fault\"", 29, "no filter `fault`, only router", "in front of Steer"),
    ("\"name\": \"http_connection_manager\"", "\"name\": \"tcp_proxy\"", 8, "no filter `tcp_proxy`", "remove it"),
    ("\"connect_timeout_ms\": 250,", "", 38, "`connect_timeout_ms` is missing", "5000"),
    ("\"cluster_manager\": {", "\"lds\": {}, \"cluster_manager\": {", 36, "lds: Steer reads no configuration from a server", "write the listeners out"),
    ("\"domains\": [\"*\"],", "\"domains\": [\"*\"], \"require_ssl\": \"all\",", 16, "require_ssl: not done by Steer", "in front of Steer"),
];

fn problems(text: &str) -> Vec<Problem> {
    match parse(text, "file") {
        Err(LoadError::Invalid { problems, .. }) => problems,
        Err(error) => panic!("{error}"),
        Ok(_) => Vec::new(),
    }
}

fn check(good: &str, rows: &[Row]) {
    assert_eq!(problems(good), [], "the file that the rows break");
    let mut wrong = Vec::new();
    for (from, to, line, message, hint) in rows {
        let text = good.replacen(from, to, 1);
        assert_ne!(text, good, "`{from}` is not in the file");
        let found = problems(&text);
        let hit = |problem: &Problem| {
            problem.line == *line
                && problem.column > 0
                && problem.message.contains(message)
                && problem.hint.as_deref().unwrap_or_default().contains(hint)
        };
        if !found.iter().any(hit) {
            wrong.push(format!("{to}: want line {line}: {message}; {hint}\nfound {found:#?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn native() {
    check(NATIVE, NATIVE_ROWS);
}

#[test]
fn envoy_v3() {
    check(ENVOY_V3, V3_ROWS);
}

#[test]
fn envoy_v1() {
    check(ENVOY_V1, V1_ROWS);
}

#[test]
fn several_problems_are_shown_at_once_in_file_order() {
    let text = NATIVE
        .replace("cluster: sio", "cluster: x")
        .replace("timeout: 5s", "timeot: 5s")
        .replace("3000", "x");
    let message = parse(&text, "steer.yaml").unwrap_err().to_string();
    let want = "\
steer.yaml:5:14: listeners[0].routes[0].cluster: there is no cluster `x`
  hint: define it, or use one of: sio
steer.yaml:6:5: listeners[0].routes[0].timeot: unknown key, Steer does not read it
  hint: did you mean `timeout`?
steer.yaml:14:15: clusters[0].endpoints[0]: `10.0.0.1:x` is not an address
  hint: write ip:port, such as 10.0.0.1:3000 or [fd00::1]:3000; host names are not resolved
steer.yaml:14:27: clusters[0].endpoints[1]: `10.0.0.2:x` is not an address
  hint: write ip:port, such as 10.0.0.1:3000 or [fd00::1]:3000; host names are not resolved";
    assert_eq!(message, want);
}

#[test]
fn one_run_names_the_problems_of_each_part_of_an_envoy_file() {
    let text = ENVOY_V3
        .replace("type: STATIC", "type: EDS")
        .replace("lb_policy: RING_HASH", "lb_policy: RANDOM")
        .replace("10.10.62.120, port_value: 3000", "one.local, port_value: 70000")
        .replace("cluster: ws\n", "cluster: other\n")
        .replace(
            "    - filters:\n",
            "    - filters: [{ name: x, typed_config: { \"@type\": y.TcpProxy } }]\n    - filters:\n",
        );
    let found = problems(&text);
    for want in [
        "exactly one filter chain",
        "`y.TcpProxy` is not supported",
        "there is no cluster `other`",
        "EDS is not supported",
        "`RANDOM` keeps no client",
        "`one.local` is not an IP address",
        "from 1 to 65535, is `70000`",
    ] {
        assert!(found.iter().any(|problem| problem.message.contains(want)), "want {want}\nfound {found:#?}");
    }
}

#[test]
fn all_problems_are_printed() {
    let routes = "  - { cluster: x }\n".repeat(100);
    let message = parse(&NATIVE.replace("  routes:\n", &format!("  routes:\n{routes}")), "file").unwrap_err();
    assert_eq!(message.to_string().matches("there is no cluster `x`").count(), 100);
}

#[test]
fn empty_and_hopeless_files() {
    for (text, want) in [
        ("", "the file is empty"),
        ("# nothing\n", "the file is empty"),
        ("hello", "must be a map, is `hello`"),
        ("[]", "must be a map, is a list"),
        ("{}", "`listeners` is missing"),
        ("static_resources:", "`static_resources` is missing"),
        ("cluster_manager: { clusters: [] }", "`listeners` is missing"),
    ] {
        assert!(
            problems(text).iter().any(|problem| problem.message.contains(want)),
            "{text:?}: {:?}",
            problems(text)
        );
    }
}

#[test]
fn what_the_end_of_a_text_lacks_is_missing_on_its_last_line() {
    for (text, line) in [("a: 1\nb", 2), ("a: 1\r\nb", 2), ("a: 1\nb:\nc", 3), ("a: 1\nb\n", 3)] {
        assert_eq!(problems(text)[0].line, line, "{text:?}");
    }
}

#[test]
fn bombs_are_refused() {
    let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
    assert!(problems(&deep)[0].message.contains("nested more than 64 deep"));
    let deep = "- ".repeat(100_000);
    assert!(problems(&deep)[0].message.contains("nested more than 64 deep"));

    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..12 {
        let aliases = vec![format!("*a{}", level - 1); 10].join(", ");
        bomb += &format!("a{level}: &a{level} [{aliases}]\n");
    }
    assert!(problems(&bomb)[0].message.contains("aliases counted in full"));
}
