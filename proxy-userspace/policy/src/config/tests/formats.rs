//! What good files mean, in whichever format they are written.

use std::path::Path;
use std::time::Duration;

use super::super::{
    Config, Format, HashFunction, HashSource, HeaderSource, LbPolicy, from_flags, load, parse, to_yaml,
};
use super::{ENVOY_V1, ENVOY_V3, EVERY_KEY, NATIVE};

fn config(text: &str) -> Config {
    parse(text, "file").unwrap_or_else(|error| panic!("{error}\n{text}")).config
}

/// What the native format cannot say, or need not: the name of an only virtual host.
fn comparable(mut config: Config) -> String {
    config.warnings.clear();
    for listener in &mut config.listeners {
        if let [only] = &mut listener.virtual_hosts[..] {
            only.name.clear();
        }
    }
    format!("{config:#?}")
}

#[test]
fn the_shortest_file_and_the_flags_mean_the_same() {
    let file = "
listeners:
- address: 127.0.0.1:8080
  routes: [{ cluster: backends, hash_policy: [{ header: X-Forwarded-For }], upgrade_configs: [websocket] }]
clusters: [{ name: backends, lb_policy: RING_HASH, endpoints: ['10.0.0.1:3000', '[fd00::1]:3000'] }]
";
    let backends = ["10.0.0.1:3000".parse().unwrap(), "[fd00::1]:3000".parse().unwrap()];
    let hash = "header:x-forwarded-for".parse().unwrap();
    let flags = from_flags("127.0.0.1:8080".parse().unwrap(), &backends, hash);
    assert_eq!(comparable(config(file)), comparable(flags));
}

#[test]
fn hash_flags() {
    let name = |flag: &str| match flag.parse() {
        Ok(HashSource::Header { name: HeaderSource::Name(name), .. }) => name.to_string(),
        Ok(HashSource::Header { name: HeaderSource::Authority, .. }) => "authority".to_owned(),
        Ok(HashSource::Cookie(cookie)) => format!("cookie {} {:?}", cookie.name, cookie.ttl),
        Ok(HashSource::QueryParameter { name }) => format!("query {name}"),
        Ok(HashSource::SourceIp) => "source".to_owned(),
        other => format!("{:?}", other.is_err()),
    };
    for (flag, want) in [
        ("header:X-User", "x-user"),
        ("header:host", "authority"),
        ("header:a b", "true"),
        ("cookie:sid", "cookie sid None"),
        ("cookie:a=b", "true"),
        ("query:room", "query room"),
        ("query:", "true"),
        ("source-ip", "source"),
        ("source-ip:x", "true"),
        ("x-forwarded-for", "true"),
    ] {
        assert_eq!(name(flag), want, "{flag}");
    }
}

#[test]
fn envoy_v1_and_v3_mean_the_same() {
    let (v1, v3) = (config(ENVOY_V1), config(ENVOY_V3));
    assert_eq!(parse(ENVOY_V1, "").unwrap().format, Format::EnvoyV1);
    assert_eq!(parse(ENVOY_V3, "").unwrap().format, Format::EnvoyV3);
    assert_eq!(format!("{:?}", v1.clusters), format!("{:?}", v3.clusters));
    let routes = |config: &Config| format!("{:?}", config.listeners[0].virtual_hosts);
    assert_eq!(routes(&v1), routes(&v3));
    assert_eq!(v1.listeners[0].address, v3.listeners[0].address);
    assert_eq!(v3.clusters[0].connect_timeout, Duration::from_millis(250));
    assert_eq!(v3.clusters[0].endpoints[1].hash_key, "10.10.62.121:3000");
    assert_eq!(v3.listeners[0].virtual_hosts[0].routes[0].upgrade_websocket, Some(true));
}

#[test]
fn envoy_v1_hashes_hosts_by_murmur_unless_told_otherwise() {
    let function = |text: &str| match config(text).clusters[0].lb_policy {
        LbPolicy::RingHash { hash_function, .. } => hash_function,
        LbPolicy::Maglev { .. } => panic!("maglev"),
    };
    assert_eq!(function(ENVOY_V1), HashFunction::XxHash);
    assert_eq!(function(&ENVOY_V1.replace("false }", "true }")), HashFunction::MurmurHash2);
    assert_eq!(function(&ENVOY_V1.replace(", \"use_std_hash\": false", "")), HashFunction::MurmurHash2);
    let line = "\"ring_hash_lb_config\": { \"minimum_ring_size\": 1024, \"use_std_hash\": false },";
    assert_eq!(function(&ENVOY_V1.replace(line, "")), HashFunction::MurmurHash2);
}

#[test]
fn a_bare_v1_fragment_is_served_on_loopback_with_a_warning() {
    let text = r#"{
      "route_config": { "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": [
        { "prefix": "/", "cluster": "ws", "timeout_ms": 0, "use_websocket": true, "hash_policy": { "header_name": "x-user" } }] }] },
      "clusters": [{ "name": "ws", "type": "static", "connect_timeout_ms": 250, "lb_type": "ring_hash",
        "hosts": [{ "url": "tcp://10.0.0.1:3000" }] }]
    }"#;
    let config = config(text);
    assert_eq!(config.listeners[0].address.to_string(), "127.0.0.1:8080");
    assert_eq!(config.listeners[0].virtual_hosts[0].routes[0].timeout, None);
    assert_eq!(config.warnings.len(), 1);
    assert!(config.warnings[0].text.contains("stands without a listener"), "{:?}", config.warnings);
}

#[test]
fn printing_reads_back_as_the_same() {
    let extremes = NATIVE
        .replace("name: sio", "name: \"a: b # '\\\"\\u2028\"")
        .replace("cluster: sio", "cluster: \"a: b # '\\\"\\u2028\"")
        .replace("timeout: 5s", "timeout: 0.000000001s")
        .replace("10.0.0.1:3000", "{ address: '[::1.2.3.4]:1', hash_key: 'null', weight: 9 }")
        .replace(
            "x-forwarded-for }",
            r"':path', regex_rewrite: { pattern: { regex: '\b[\W\d]\B\w' }, substitution: '\\' } }",
        );
    for text in [NATIVE, ENVOY_V1, ENVOY_V3, EVERY_KEY, &extremes] {
        let first = config(text);
        let printed = to_yaml(&first);
        assert_eq!(comparable(config(&printed)), comparable(first), "{printed}");
        assert_eq!(to_yaml(&config(&printed)), printed);
    }
}

#[test]
fn the_examples_are_good() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "yaml" || extension == "json") {
            load(&path).unwrap_or_else(|error| panic!("{error}"));
            count += 1;
        }
    }
    assert!(count >= 4, "{count} examples found");
}

#[test]
fn json_is_read_with_tabs_and_escapes() {
    let json = "{\n\t\"listeners\": [{\n\t\t\"address\": \"127.0.0.1:1\",\"routes\":[{\"cluster\":\"\\u00e9\\ud83d\\ude00\\/\\\\\\\\ud83d\"}]}],\n\t\"clusters\":\t[ {\"name\" :\"é😀/\\\\\\\\ud83d\", \"lb_policy\":\"maglev\",\"endpoints\":[\"10.0.0.1:1\"]} ]\n}";
    let config = config(json);
    assert_eq!(config.clusters[0].name, "é😀/\\\\ud83d");
    let lone = json.replace("\\ude00", "");
    let message = parse(&lone, "file").unwrap_err().to_string();
    assert!(message.starts_with("file:3:"), "{message}");
}

#[test]
fn envoy_v3_also_in_camel_case_and_typed() {
    let typed = ENVOY_V3
        .replace("hash_policy", "hashPolicy")
        .replace("header_name", "headerName")
        .replace("load_assignment", "loadAssignment")
        .replace("    lb_policy: RING_HASH\n", "")
        .replace(
            "ring_hash_lb_config: { minimum_ring_size: 1024, hash_function: XX_HASH }",
            "load_balancing_policy: { policies: [{ typed_extension_config: { name: x, typed_config: {
          \"@type\": type.googleapis.com/envoy.extensions.load_balancing_policies.ring_hash.v3.RingHash,
          minimum_ring_size: 1024, hash_function: XX_HASH } } }] }",
        );
    assert_eq!(comparable(config(&typed)), comparable(config(ENVOY_V3)));
}

#[test]
fn envoy_v3_source_addresses() {
    let addresses = |settings: &str| {
        let bind = format!("upstream_bind_config: {{ {settings} }}\n    lb_policy: RING_HASH\n");
        let sources =
            config(&ENVOY_V3.replace("lb_policy: RING_HASH\n", &bind)).clusters[0].source_addresses.clone();
        sources.iter().map(|address| address.to_string()).collect::<Vec<_>>().join(" ")
    };
    let one = "source_address: { address: 10.0.0.6, port_value: 0 }";
    assert_eq!(addresses(one), "10.0.0.6");
    let more = "extra_source_addresses: [{ address: { address: 10.0.0.5, port_value: 0 } }], additional_source_addresses: [{ address: 10.0.0.6 }, { address: 10.0.0.7 }]";
    assert_eq!(addresses(&format!("{one}, {more}")), "10.0.0.6 10.0.0.5 10.0.0.7");
    assert_eq!(addresses("source_address: { address: 0.0.0.0, port_value: 0 }"), "");
}

/// An Envoy example without its own `timeout`, in both formats.
fn envoy_without_timeouts() -> [String; 2] {
    let lines = |text: &str| {
        let kept: Vec<_> = text.lines().filter(|line| !line.contains("timeout: 0s")).collect();
        kept.join("\n")
    };
    [lines(ENVOY_V3), ENVOY_V1.replace("},\n                      \"timeout_ms\": 0", "}")]
}

fn first_timeout(config: &Config) -> Option<Duration> {
    config.listeners[0].virtual_hosts[0].routes[0].timeout
}

#[test]
fn only_the_formats_of_envoy_limit_the_time_of_a_response_by_default() {
    let native = NATIVE.replace("    timeout: 5s\n", "");
    assert_eq!(first_timeout(&config(&native)), None);
    assert_eq!(first_timeout(&config(&NATIVE.replace("timeout: 5s", "timeout: 0s"))), None);
    for text in envoy_without_timeouts() {
        assert_eq!(first_timeout(&config(&text)), Some(Duration::from_secs(15)), "{text}");
    }
    for text in [ENVOY_V3, ENVOY_V1] {
        assert_eq!(first_timeout(&config(text)), None);
    }
}

#[test]
fn the_default_time_limit_of_envoy_is_printed() {
    for text in envoy_without_timeouts() {
        let printed = to_yaml(&config(&text));
        assert!(printed.contains("timeout: 15s"), "{printed}");
        assert_eq!(first_timeout(&config(&printed)), Some(Duration::from_secs(15)));
    }
}

#[test]
fn the_default_time_limit_of_envoy_is_warned_about_where_websocket_is_allowed() {
    let warnings = |text: &str| {
        let texts = config(text).warnings.into_iter().map(|warning| warning.text);
        texts.collect::<Vec<_>>().join("\n")
    };
    let [v3, v1] = envoy_without_timeouts();
    for (text, route, remedy) in [
        (&v3, "routes[0].route: no timeout", "`timeout: 0s`"),
        (&v1, "routes[0]: no timeout", "`\"timeout_ms\": 0`"),
    ] {
        let found = warnings(text);
        assert!(found.contains(route) && found.contains(remedy) && found.lines().count() == 1, "{found}");
    }
    let by_listener = v3
        .replace("                  upgrade_configs:\n                  - upgrade_type: websocket\n", "")
        .replace("codec_type: AUTO", "upgrade_configs: [{ upgrade_type: websocket }]");
    assert!(warnings(&by_listener).contains("no timeout"), "{by_listener}");
    for text in [
        v3.replace("- upgrade_type: websocket", "- { upgrade_type: websocket, enabled: false }"),
        v1.replace("\"use_websocket\": true", "\"use_websocket\": false"),
        ENVOY_V3.replace("timeout: 0s", "timeout: 15s"),
        NATIVE.replace("    timeout: 5s\n", ""),
    ] {
        assert_eq!(warnings(&text), "", "{text}");
    }
}

#[test]
fn the_packet_splice_is_read_with_ranges_in_order() {
    let settings = |text: &str| config(&format!("{NATIVE}packet_splice: {text}\n")).packet_splice;
    let ranges = settings("{ source_ports: [20010-20020, 2000, 20000-20009, 20005-20006] }").source_ports;
    assert_eq!(ranges, Some(vec![2000..=2000, 20000..=20020]));
    assert_eq!(settings("{ mark: 0xff }").mark, 255);
    assert_eq!(settings("{ mark: 255 }").mark, 255);
    assert_eq!(settings("{ keepalive: { probes: 9 } }").keepalive.interval, Duration::from_secs(15));
    let all = settings(
        "{ max_streams: 9, source_ports: [2000], hand_over_after: 0s, hand_over_within: 1s, linger: 0s, \
         orphan_timeout: 4s, mark: 1, mss: 1400 }",
    );
    assert_eq!((all.max_streams, all.linger, all.mss), (9, Duration::ZERO, Some(1400)));
    assert_eq!(all.orphan_timeout, Some(Duration::from_secs(4)));
    assert_eq!(settings("{ orphan_timeout: 0s }").orphan_timeout, None);
    assert_eq!(config(&to_yaml(&Config { packet_splice: all.clone(), ..config(NATIVE) })).packet_splice, all);
}

#[test]
fn the_instance_is_read_and_written() {
    assert_eq!(config(NATIVE).instance.as_str(), "default");
    let named = config(&format!("{NATIVE}instance: edge-1\n"));
    assert_eq!(named.instance.as_str(), "edge-1");
    assert_eq!(config(&to_yaml(&named)).instance, named.instance);
}

#[test]
fn the_drain_timeout_is_read_and_written() {
    assert_eq!(config(NATIVE).drain_timeout, Duration::from_secs(600));
    let short = config(&format!("{NATIVE}drain_timeout: 90s\n"));
    assert_eq!(short.drain_timeout, Duration::from_secs(90));
    assert_eq!(config(&to_yaml(&short)).drain_timeout, short.drain_timeout);
}

#[test]
fn envoy_v3_hash_keys() {
    let endpoints = |kind: &str, extra: &str, settings: &str| {
        let text = ENVOY_V3
            .replace("type: STATIC", &format!("type: {kind}{extra}"))
            .replace("- endpoint: { address: { socket_address: { address: 10.10.62.120,", &format!("- {settings}\n          endpoint: {{ hostname: one, address: {{ socket_address: {{ address: 10.10.62.120,"));
        let endpoints = config(&text).clusters[0].endpoints.clone();
        endpoints.into_iter().map(|endpoint| endpoint.hash_key).collect::<Vec<_>>().join(" ")
    };
    let by_name =
        "\n    common_lb_config: { consistent_hashing_lb_config: { use_hostname_for_hashing: true } }";
    let key =
        |value: &str| format!("metadata: {{ filter_metadata: {{ envoy.lb: {{ hash_key: {value} }} }} }}");
    let addresses = "10.10.62.120:3000 10.10.62.121:3000";
    assert_eq!(endpoints("STATIC", "", "health_status: DRAINING"), addresses);
    assert_eq!(endpoints("STATIC", "", &key("mine")), "mine 10.10.62.121:3000");
    assert_eq!(endpoints("STATIC", "", &key("7")), addresses);
    assert_eq!(endpoints("STATIC", "", &key("''")), addresses);
    assert_eq!(endpoints("STRICT_DNS", by_name, "health_status: HEALTHY"), "one 10.10.62.121");
    assert_eq!(endpoints("STRICT_DNS", by_name, &key("mine")), "mine 10.10.62.121");
}

#[test]
fn what_is_lacking_is_warned_about_by_name() {
    let warnings = |text: &str| {
        let texts = config(text).warnings.into_iter();
        texts.map(|warning| format!("{}: {}", warning.line, warning.text)).collect::<Vec<_>>().join("\n")
    };
    let rows = [
        (
            NATIVE.replace("    hash_policy:\n    - header: { header_name: x-forwarded-for }\n", ""),
            "4: listeners[0].routes[0]: no hash_policy",
        ),
        (
            NATIVE.replace("x-forwarded-for }", "Upgrade }"),
            "8: listeners[0].routes[0].hash_policy[0].header.header_name: `upgrade` is removed",
        ),
        (NATIVE.replace("[10.0.0.1:3000, 10.0.0.2:3000]", "[]"), "14: clusters[0].endpoints: no endpoints"),
        (
            NATIVE.replace("minimum_ring_size: 1024", "minimum_ring_size: 0"),
            "13: clusters[0].ring_hash_lb_config.minimum_ring_size: a ring of size 0",
        ),
        (
            NATIVE.replace(
                &NATIVE[NATIVE.find("  routes:").unwrap()..NATIVE.find("clusters:").unwrap()],
                "  virtual_hosts: []\n",
            ),
            "3: listeners[0].virtual_hosts: no virtual hosts",
        ),
        (
            NATIVE.replace("127.0.0.1:9901", "0.0.0.0:9901"),
            "15: admin: the admin server on 0.0.0.0:9901 has no password",
        ),
        (
            NATIVE.replace("10.0.0.1:3000", "{ address: '10.0.0.3:1', hash_key: '10.0.0.2:3000' }"),
            "share the hash key",
        ),
        (
            NATIVE
                .replace("  routes:\n", "  use_remote_address: true\n  routes:\n")
                .replace("x-forwarded-for }", "x-request-id }"),
            "new for each request",
        ),
        (
            NATIVE.replace("admin:", "  source_addresses: [fd00::5]\nadmin:"),
            "15: clusters[0].source_addresses[0]: no endpoint can be reached from fd00::5",
        ),
        (
            ENVOY_V3
                .replace("cluster: ws\n", "cluster: ws\n                  retry_policy: { retry_on: 5xx }\n"),
            "21: static_resources.listeners[0].filter_chains[0].filters[0].typed_config.route_config.virtual_hosts[0].routes[0].route.retry_policy: not honoured",
        ),
        (
            ENVOY_V3.replace("connect_timeout:", "health_checks: []\n    connect_timeout:"),
            "32: static_resources.clusters[0].health_checks: not honoured",
        ),
    ];
    for (text, want) in rows {
        assert!(warnings(&text).contains(want), "want {want}\nfound {}", warnings(&text));
    }
    assert_eq!(warnings(NATIVE), "");
    assert_eq!(warnings(ENVOY_V1), "");
    assert_eq!(warnings(ENVOY_V3), "");
}

#[test]
fn fields_of_envoy_that_only_lack_something_are_warnings() {
    let manager = |field: &str| ENVOY_V3.replace("codec_type: AUTO", field);
    let filter = "http_filters:\n          - name: gzip\n            typed_config: { \"@type\": \
                  type.googleapis.com/envoy.extensions.filters.http.compressor.v3.Compressor }\n";
    let rows = [
        (manager("tracing: {}"), "typed_config.tracing: not done: Steer adds no trace headers"),
        (manager("add_user_agent: true"), "add_user_agent: not honoured"),
        (manager("server_header_transformation: pass_through"), "server_header_transformation: not honoured"),
        (manager("http_protocol_options: { allow_absolute_url: false }"), "allow_absolute_url: not honoured"),
        (
            ENVOY_V3.replace("http_filters:\n", filter),
            "http_filters[0]: not done: Steer compresses no responses",
        ),
        (
            ENVOY_V3.replace("- name: ingress", "- enable_mptcp: true"),
            "listeners[0].enable_mptcp: not honoured",
        ),
        (
            ENVOY_V3.replace(
                "- name: backend",
                "- name: backend\n              include_attempt_count_in_response: on",
            ),
            "include_attempt_count_in_response: not honoured",
        ),
        (
            ENVOY_V3
                .replace("                route:", "                decorator: {}\n                route:"),
            "decorator: not done",
        ),
        (
            ENVOY_V1.replace("\"codec_type\"", "\"add_user_agent\": true, \"codec_type\""),
            "add_user_agent: not honoured",
        ),
    ];
    for (text, want) in rows {
        let warnings = config(&text).warnings;
        assert!(warnings.len() == 1 && warnings[0].text.contains(want), "want {want}\nfound {warnings:?}");
    }
    for silent in [
        manager("tracing: ~"),
        manager("add_user_agent: false"),
        manager("server_header_transformation: 0"),
        manager("http_protocol_options: { allow_absolute_url: true, enable_trailers: true }"),
        ENVOY_V3.replace(
            "    filter_chains:",
            "    listener_filters: { name: x, typed_config: { \"@type\": y/envoy.extensions.filters.listener.http_inspector.v3.HttpInspector } }\n    filter_chains:",
        ),
        ENVOY_V3.replace(
            "type: STATIC",
            "http_protocol_options: { accept_http_10: true, enable_trailers: true }",
        ),
    ] {
        assert_eq!(config(&silent).warnings.len(), 0, "{silent}");
    }
}

#[test]
fn the_documentation_names_every_key_and_shows_good_files() {
    let page = include_str!("../../../../../docs/configuration.md");
    let key = regex::Regex::new(r"(?m)(?:^[ -]*|[{,] )([a-z][a-z_0-9]*):(?: |$)").unwrap();
    let keys: std::collections::BTreeSet<_> =
        key.captures_iter(EVERY_KEY).map(|found| found[1].to_owned()).collect();
    assert!(keys.len() > 50, "{} keys found", keys.len());
    for key in keys {
        let named = regex::Regex::new(&format!(r"`[^`]*\b{key}\b[^`]*`")).unwrap();
        assert!(named.is_match(page), "docs/configuration.md does not name `{key}`");
    }
    let files: Vec<_> = page.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert!(!files.is_empty());
    for file in files {
        config(file);
    }
}
