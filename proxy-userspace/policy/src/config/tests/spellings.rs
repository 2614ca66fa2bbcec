//! The spellings that Envoy takes for a value, and those that it refuses. Each row was given to
//! Envoy 1.39 with `--mode validate`, and the numbers of the first tables were read from its
//! `/config_dump`.

use super::super::{Cluster, Health, LbPolicy, LoadError, parse};
use super::{ENVOY_V3, NATIVE};

/// What one value of a file is read as.
#[derive(Debug, PartialEq)]
enum Read {
    Value(String),
    /// The first problem.
    Refused(String),
}

use Read::{Refused, Value};

fn read(text: &str, value: impl Fn(&Cluster, &super::super::Listener) -> String) -> Read {
    match parse(text, "file") {
        Ok(loaded) => Value(value(&loaded.config.clusters[0], &loaded.config.listeners[0])),
        Err(LoadError::Invalid { problems, .. }) => Refused(problems[0].message.clone()),
        Err(error) => panic!("{error}"),
    }
}

/// Compares what `setting`, put in the place of `from`, is read as. An empty `want` is a refusal.
fn check(
    from: &str,
    setting: &str,
    rows: &[(&str, &str)],
    value: impl Fn(&Cluster, &super::super::Listener) -> String,
) {
    assert!(ENVOY_V3.contains(from), "`{from}` is not in the file");
    let mut wrong = Vec::new();
    for (spelling, want) in rows {
        let text = ENVOY_V3.replacen(from, &setting.replace('$', spelling), 1);
        match (read(&text, &value), *want) {
            (Refused(_), "") => {}
            (Value(found), want) if found == want && !want.is_empty() => {}
            (found, want) => wrong.push(format!("{spelling}: want `{want}`, found {found:?}")),
        }
    }
    assert!(wrong.is_empty(), "{setting}:\n{}", wrong.join("\n"));
}

#[test]
fn integers() {
    #[rustfmt::skip]
    let rows = [
        ("8080", "8080"), ("\"8080\"", "8080"), ("+8080", "8080"), ("\"+8080\"", "8080"),
        ("017620", "8080"), ("\"017620\"", "17620"), ("!!str 017", "15"), ("+017", "15"),
        ("0x1f90", "8080"), ("0X1F90", "8080"), ("\"0x1f90\"", "8080"),
        ("08", "8"), ("\"08\"", "8"), ("099", "99"),
        ("8080.0", "8080"), ("\"8080.0\"", "8080"), ("8.08e3", "8080"), ("\"1e3\"", "1000"), ("!!int 017", "15"),
        ("", ""), ("~", ""), ("-1", ""), ("65536", ""), ("8080.5", ""), ("1.5", ""), ("0o17620", ""),
        ("8_080", ""), ("0b1", ""), ("\" 8080\"", ""), ("\"8080 \"", ""), ("\"\"", ""), ("[8080]", ""),
        ("{ value: 8080 }", ""), ("true", ""), ("nan", ""), ("1e30", ""), ("99999999999999999999", ""),
    ];
    check("port_value: 3000", "port_value: $", &rows, |cluster, _| {
        cluster.endpoints[0].address.port().to_string()
    });
}

#[test]
fn integers_in_wrappers() {
    let rows = [
        ("2", "2"),
        ("\"2\"", "2"),
        ("2.0", "2"),
        ("2e0", "2"),
        ("0x2", "2"),
        ("{ value: 2 }", "2"),
        ("{ value: \"2\" }", "2"),
        ("null", "1"),
        ("{}", ""),
        ("[2]", ""),
        ("{ value: 2, x: 1 }", ""),
        ("{ value: [2] }", ""),
        ("{ value: { value: 2 } }", ""),
    ];
    check("- endpoint:", "- load_balancing_weight: $\n          endpoint:", &rows, |cluster, _| {
        cluster.endpoints[0].weight.to_string()
    });
    let rows =
        [("{}", "0"), ("{ value: ~ }", "0"), ("04000", "2048"), ("", "1024"), ("9007199254740993", "")];
    check("minimum_ring_size: 1024", "minimum_ring_size: $", &rows, |cluster, _| match cluster.lb_policy {
        LbPolicy::RingHash { minimum_ring_size, .. } => minimum_ring_size.to_string(),
        LbPolicy::Maglev { .. } => String::new(),
    });
}

#[test]
fn percentages() {
    let rows = [
        ("{ value: 40 }", "40"),
        ("{ value: \"40\" }", "40"),
        ("{ value: 40.5 }", "40.5"),
        ("{ value: .5 }", "0.5"),
        ("{ value: 5e1 }", "50"),
        ("{ value: 062 }", "50"),
        ("{ value: \"062\" }", "62"),
        ("{ value: \"0x32\" }", "50"),
        ("{ value: \" 50\" }", "50"),
        ("{ value: ~ }", "0"),
        ("{}", "0"),
        ("null", "50"),
        ("40", ""),
        ("{ value: nan }", ""),
        ("{ value: .nan }", ""),
        ("{ value: Infinity }", ""),
        ("{ value: 40% }", ""),
        ("[{ value: 40 }]", ""),
    ];
    let setting = "common_lb_config: { healthy_panic_threshold: $ }\n    lb_policy: RING_HASH";
    check("lb_policy: RING_HASH", setting, &rows, |cluster, _| cluster.healthy_panic_threshold.to_string());
}

#[test]
fn booleans() {
    #[rustfmt::skip]
    let common = [
        ("true", "true"), ("True", "true"), ("TRUE", "true"), ("tRUE", "true"), ("t", "true"), ("\"1\"", "true"),
        ("yes", "true"), ("Yes", "true"), ("YES", "true"), ("yEs", "true"), ("y", "true"), ("Y", "true"),
        ("on", "true"), ("ON", "true"), ("\"true\"", "true"), ("\"True\"", "true"), ("\"yes\"", "true"),
        ("!!bool yes", "true"), ("!!str true", "true"),
        ("off", "false"), ("no", "false"), ("No", "false"), ("n", "false"), ("f", "false"), ("F", "false"),
        ("'false'", "false"), ("\"0\"", "false"), ("null", "false"), ("~", "false"), ("", "false"),
        ("1", ""), ("0", ""), ("oN", ""), ("\"on\"", ""), ("\"off\"", ""), ("\"\"", ""), ("[true]", ""), ("[]", ""),
    ];
    let wrapped = [
        ("{ value: true }", "true"),
        ("{ value: \"true\" }", "true"),
        ("{ !ignore x: 1, value: on }", "true"),
        ("{ value: yes }", "true"),
    ];
    let empty = [("{}", "false"), ("{ value: ~ }", "false")];
    let rows: Vec<_> = common.into_iter().chain(wrapped).chain(empty).collect();
    check("codec_type: AUTO", "use_remote_address: $", &rows, |_, listener| {
        listener.options.use_remote_address.to_string()
    });
    let refused = wrapped.into_iter().chain(empty).map(|(spelling, _)| (spelling, ""));
    let rows: Vec<_> = common.into_iter().chain(refused).collect();
    check("codec_type: AUTO", "skip_xff_append: $", &rows, |_, listener| {
        listener.options.skip_xff_append.to_string()
    });
}

#[test]
fn strings() {
    #[rustfmt::skip]
    let rows = [
        ("edge", "edge"), ("\"5\"", "5"), ("5.5", "5.5"), (".5", ".5"), ("1e3", "1e3"), ("0o17", "0o17"),
        ("0b1", "0b1"), ("nan", "nan"), (".inf", ".inf"), ("2020-01-01", "2020-01-01"), ("1_000", "1_000"),
        ("9007199254740993", "9007199254740993"), ("99999999999999999999", "99999999999999999999"),
        ("null", "steer"), ("~", "steer"), ("", "steer"), ("'null'", "null"), ("'yes'", "yes"), ("! 5", "5"), ("!x edge", "edge"),
        ("5", ""), ("!!str 5", ""), ("!x 5", ""), ("!!int \"5\"", ""), ("-5", ""), ("0x5", ""), ("true", ""), ("yes", ""), ("No", ""), ("y", ""), ("off", ""),
        ("[edge]", ""), ("{ value: edge }", ""), ("{}", ""),
    ];
    check("codec_type: AUTO", "server_name: $", &rows, |_, listener| listener.options.server_name.clone());
}

#[test]
fn durations() {
    #[rustfmt::skip]
    let rows = [
        ("15s", "15s"), ("\"15s\"", "15s"), ("0.25s", "250ms"), ("1.000000001s", "1.000000001s"), ("0s", "none"),
        ("{ seconds: 5 }", "5s"), ("{ seconds: \"5\" }", "5s"), ("{ seconds: 0, nanos: 250000000 }", "250ms"),
        ("{ nanos: 5 }", "5ns"), ("{ seconds: 1e1 }", "10s"), ("{ seconds: 1.0 }", "1s"), ("{ seconds: 015 }", "13s"),
        ("{ seconds: \"0x5\" }", "5s"), ("{ seconds: null }", "none"), ("{ seconds: 5, !ignore x: 1 }", "5s"), ("{}", "none"), ("null", "15s"), ("~", "15s"),
        ("15", ""), ("500ms", ""), ("1m", ""), ("1h", ""), (".5s", ""), ("5.s", ""), ("1.0000000001s", ""),
        ("-1s", ""), ("+1s", ""), ("1S", ""), ("\" 1s\"", ""), ("1 s", ""), ("1e1s", ""), ("0x5s", ""), ("\"\"", ""),
        ("{ seconds: 1, nanos: -1 }", ""), ("{ nanos: 1000000000 }", ""), ("{ seconds: 5, x: 1 }", ""),
        ("{ value: 5s }", ""), ("[15s]", ""), ("[]", ""), ("[{ seconds: 5 }]", ""),
    ];
    check("timeout: 0s", "timeout: $", &rows, |_, listener| {
        let timeout = listener.virtual_hosts[0].routes[0].timeout;
        timeout.map_or("none".to_owned(), |timeout| format!("{timeout:?}"))
    });
}

#[test]
fn words() {
    #[rustfmt::skip]
    let rows = [
        ("RING_HASH", "ring"), ("ring_hash", "ring"), ("Ring_Hash", "ring"), ("\"RING_HASH\"", "ring"),
        ("2", "ring"), ("\"2\"", "ring"), ("02", "ring"), ("\"02\"", "ring"), ("+2", "ring"), ("\" 2\"", "ring"), ("0x2", "ring"), ("maglev", "maglev"), ("5", "maglev"),
        ("2.0", ""), ("RINGHASH", ""), ("ring-hash", ""), ("[RING_HASH]", ""), ("{ value: 2 }", ""), ("99", ""),
        ("-1", ""), ("\"0x2\"", ""), ("\"\"", ""), ("true", ""), ("[]", ""),
    ];
    check("lb_policy: RING_HASH", "lb_policy: $", &rows, |cluster, _| match cluster.lb_policy {
        LbPolicy::RingHash { .. } => "ring".to_owned(),
        LbPolicy::Maglev { .. } => "maglev".to_owned(),
    });
    let murmur =
        [("murmur_hash_2", "MurmurHash2"), ("1", "MurmurHash2"), ("0", "XxHash"), ("DEFAULT_HASH", "")];
    let function = |cluster: &Cluster| match cluster.lb_policy {
        LbPolicy::RingHash { hash_function, .. } => format!("{hash_function:?}"),
        LbPolicy::Maglev { .. } => String::new(),
    };
    check("hash_function: XX_HASH", "hash_function: $", &murmur, |cluster, _| function(cluster));
    let extension = "load_balancing_policy: { policies: [{ typed_extension_config: { name: x, typed_config: {
          \"@type\": type.googleapis.com/envoy.extensions.load_balancing_policies.ring_hash.v3.RingHash,
          hash_function: $ } } }] }";
    let rows = [("2", "MurmurHash2"), ("1", "XxHash"), ("default_hash", "XxHash")];
    check("lb_policy: RING_HASH", extension, &rows, |cluster, _| function(cluster));
    let rows = [("healthy", "true"), ("2", "false"), ("\"2\"", "false"), ("UNKNOWN", "true"), ("~", "true")];
    check("- endpoint:", "- health_status: $\n          endpoint:", &rows, |cluster, _| {
        (cluster.endpoints[0].health == Health::Healthy).to_string()
    });
    let kinds = [("static", "2"), ("0", "2"), ("\"1\"", "2"), ("Strict_Dns", "2"), ("null", "2"), ("3", "")];
    check("type: STATIC", "type: $", &kinds, |cluster, _| cluster.endpoints.len().to_string());
    for codec in ["auto", "0", "\"1\"", "Http1", "null"] {
        check("codec_type: AUTO", &format!("codec_type: {codec}"), &[("", "ok")], |_, _| "ok".to_owned());
    }
}

#[test]
fn lists() {
    #[rustfmt::skip]
    let domains = [
        ("[\"*\"]", "*"), ("\"*\"", "*"), ("[[\"*\"]]", "*"), ("[[[\"*\"]]]", "*"), ("[\"*\", [a.b]]", "* a.b"),
        ("[\"*\", []]", "*"), ("null", ""), ("[]", ""), ("{}", ""), ("[5]", ""),
    ];
    check("domains: [\"*\"]", "domains: $", &domains, |_, listener| {
        listener.virtual_hosts[0].domains.join(" ")
    });
    #[rustfmt::skip]
    let policies = [
        ("[{ header: { header_name: x-user } }]", "1"), ("{ header: { header_name: x-user } }", "1"),
        ("[[{ header: { header_name: x-user } }]]", "1"), ("[{ header: { headerName: x-user } }]", "1"),
        ("[{ header: null, cookie: { name: s } }]", "1"), ("[{ header: { header_name: x }, cookie: null }]", "1"),
        ("[{ header: { header_name: x-user }, terminal: null }]", "1"), ("null", "0"),
        ("[{ cookie: { name: s, ttl: { seconds: 5 } } }]", "1"), ("[{ cookie: { name: s, ttl: null } }]", "1"),
        ("[{ connection_properties: { source_ip: yes } }]", "1"), ("{ connectionProperties: { sourceIp: true } }", "1"),
        ("[null]", ""), ("{}", ""), ("[{}]", ""), ("\"\"", ""), ("5", ""), ("[{ header: { header_name: null } }]", ""),
        ("[{ header: [{ header_name: x-user }] }]", ""), ("[{ header: { Header_Name: x-user } }]", ""),
        ("[{ header: { header_name: x-user }, cookie: { name: s } }]", ""), ("[{ header: { header_name: x }, cookie: {} }]", ""),
        ("[{ header: { header_name: x-user, headerName: y } }]", ""),
    ];
    let list = "hash_policy:\n                  - header: { header_name: x-forwarded-for }";
    check(list, "hash_policy: $", &policies, |_, listener| {
        listener.virtual_hosts[0].routes[0].hash_policy.len().to_string()
    });
}

#[test]
fn each_list_may_be_its_only_item() {
    let good = format!("{:?}", parse(ENVOY_V3, "file").unwrap().config);
    let keys = [
        "listeners",
        "filter_chains",
        "filters",
        "virtual_hosts",
        "routes",
        "upgrade_configs",
        "http_filters",
        "clusters",
        "endpoints",
    ];
    let mut text = ENVOY_V3.to_owned();
    for key in keys {
        let list = regex::Regex::new(&format!(r"(?m)^( *){key}:\n *- ")).unwrap();
        assert!(list.is_match(&text), "{key}");
        text = list
            .replace(&text, |found: &regex::Captures<'_>| format!("{}{key}:\n{}  ", &found[1], &found[1]))
            .into();
    }
    assert!(!text.contains("- match"), "{text}");
    // The columns of the warnings, and nothing else, may differ; there are none.
    assert_eq!(
        format!("{:?}", parse(&text, "file").unwrap_or_else(|error| panic!("{error}\n{text}")).config),
        good
    );
}

#[test]
fn a_field_that_is_null_is_absent() {
    let ok = |_: &Cluster, _: &super::super::Listener| "ok".to_owned();
    #[rustfmt::skip]
    let rows = [
        ("common_lb_config: null", "ok"), ("health_checks: ~", "ok"), ("transport_socket:", "ok"),
        ("typed_extension_protocol_options: null", "ok"), ("lb_subset_config: ~", "ok"), ("unknown: null", ""),
        ("common_lb_config: \"\"", ""), ("common_lb_config: [{}]", ""), ("common_lb_config: []", ""),
        ("common_lb_config: 5", ""), ("connectTimeout: 2s", ""),
    ];
    check("type: STATIC", "type: STATIC\n    $", &rows, ok);
    check("codec_type: AUTO", "$", &[("rds: null", "ok"), ("rds: {}", "")], ok);
    let rows = [("pipe: ~, socket_address", "ok"), ("pipe: {}, socket_address", ""), ("socketAddress", "ok")];
    check("socket_address: { address: 10", "$: { address: 10", &rows, ok);
}

#[test]
fn aliases_are_read_and_merge_keys_are_not() {
    let good = parse(ENVOY_V3, "file").unwrap().config;
    let text = ENVOY_V3.replacen("port_value: 3000", "port_value: &port 3000", 1).replacen(
        "121, port_value: 3000",
        "121, port_value: *port",
        1,
    );
    assert_eq!(format!("{:?}", parse(&text, "file").unwrap().config), format!("{good:?}"));
    let text = ENVOY_V3
        .replacen("- endpoint: { address", "- &first\n          endpoint: { address", 1)
        .replacen("- endpoint: { address", "- <<: *first\n          endpoint: { address", 1);
    let message = parse(&text, "file").unwrap_err().to_string();
    assert!(message.starts_with("file:41:11: "), "{message}");
    assert!(message.contains("merge keys are not read") && message.contains("use an alias"), "{message}");
}

#[test]
fn a_key_that_is_tagged_ignore_is_skipped() {
    let text = format!("!ignore templates: {{ limit: &limit 5s }}\n{ENVOY_V3}")
        .replace("connect_timeout: 0.25s", "!ignore \"note\": {}\n    connect_timeout: *limit");
    let config = parse(&text, "file").unwrap_or_else(|error| panic!("{error}")).config;
    assert_eq!(config.clusters[0].connect_timeout.as_secs(), 5);
    let value = format!("templates: !ignore {{ limit: 5s }}\n{ENVOY_V3}");
    assert!(parse(&value, "file").unwrap_err().to_string().contains("unknown key"));
    let native = parse(&format!("!ignore templates: 5s\n{NATIVE}"), "file").unwrap_err().to_string();
    assert!(native.contains("templates: unknown key"), "{native}");
}

#[test]
fn refusals_name_the_fix() {
    for (from, to, want) in [
        ("timeout: 0s", "timeout: 500ms", "hint: Envoy takes seconds only: 0.5s"),
        ("timeout: 0s", "timeout: 1m", "hint: Envoy takes seconds only: 60s"),
        ("timeout: 0s", "timeout: 15", "hint: write seconds, such as 15s or 0.25s"),
        ("lb_policy: RING_HASH", "lb_policy: ring-hash", "must be one of RING_HASH, MAGLEV, is `ring-hash`"),
        ("lb_policy: RING_HASH", "lb_policy: 0", "`ROUND_ROBIN` keeps no client on its endpoint"),
        ("lb_policy: RING_HASH", "lb_policy: 7", "`load_balancing_policy` is missing"),
        ("lb_policy: RING_HASH", "lb_policy: ~", "`lb_policy` is missing"),
        ("type: STATIC", "type: 3", "EDS is not supported"),
        ("codec_type: AUTO", "server_name: yes", "hint: quote it: \"yes\""),
        (
            "connect_timeout: 0.25s",
            "connect_timeout: 1s\n    connectTimeout: 2s",
            "also as `connect_timeout`",
        ),
    ] {
        let message = parse(&ENVOY_V3.replacen(from, to, 1), "file").unwrap_err().to_string();
        assert!(message.contains(want), "want {want}\nfound {message}");
    }
}

#[test]
fn the_native_format_is_as_strict_as_before() {
    for (from, to) in [
        ("timeout: 5s", "timeout: { seconds: 5 }"),
        ("timeout: 5s", "timeout: null"),
        ("upgrade_configs: [websocket]", "upgrade_configs: websocket"),
        ("lb_policy: ring_hash", "lb_policy: 2"),
        ("minimum_ring_size: 1024", "minimum_ring_size: 0x400"),
        ("minimum_ring_size: 1024", "minimum_ring_size: { value: 1024 }"),
        ("minimum_ring_size: 1024", "minimumRingSize: 1024"),
    ] {
        let text = NATIVE.replacen(from, to, 1);
        assert_ne!(text, NATIVE);
        assert!(parse(&text, "file").is_err(), "{to}");
    }
}
