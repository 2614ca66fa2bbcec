//! The JSON configuration that Envoy read up to 1.8: a whole file, or the bare `route_config` and
//! `clusters` that articles of the time show.
//!
//! The reader translates the old words to their v3 successors, and Steer then behaves as v3 does.
//! One thing differs from the Envoy of that time: there, a route with `use_websocket` sent upgrades
//! through a TCP proxy that chose an endpoint at random. Here upgrades follow the route's hash
//! policy.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use super::reader::{Field, Map};
use super::{
    Cluster, Config, Endpoint, HashFunction, HashPolicy, Health, HttpOptions, LbPolicy, Listener, PathMatch,
    Route, VirtualHost, hash_policy, listening, load_balancing, native,
};

/// Where a bare fragment, which names no address, is served.
const FRAGMENT_ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);

const EDITS: &str = "Steer does not edit headers";
const NO_SERVER: &str = "Steer reads no configuration from a server";
const ELSEWHERE: &str = "remove it, or do this in front of Steer or in the endpoints";

pub(super) fn read(root: &Field<'_>) -> Option<Config> {
    let map = root.map()?;
    map.harmless(&["flags_path", "tracing_operation_name"]);
    map.warn(
        &[
            "statsd_udp_ip_address",
            "statsd_tcp_cluster_name",
            "stats_flush_interval_ms",
            "watchdog_miss_timeout_ms",
            "watchdog_megamiss_timeout_ms",
            "watchdog_kill_timeout_ms",
            "watchdog_multikill_timeout_ms",
            "runtime",
        ],
        "not read: Steer has its own limits and metrics",
    );
    map.refuse(&["lds"], NO_SERVER, "write the listeners out");
    map.refuse(&["tracing", "rate_limit_service"], "not done by Steer", "remove it");
    let admin = map.get("admin").and_then(|field| admin(&field));
    let clusters = match map.get("cluster_manager") {
        Some(manager) => cluster_manager(&manager),
        None => map.require("clusters", "[...]"),
    };
    let listeners = map.get("listeners");
    let fragment = if listeners.is_none() { map.get("route_config") } else { None };
    map.finish();

    let clusters = clusters.map(|list| list.items()).unwrap_or_default();
    let names = listening::cluster_names(&clusters);
    listening::unique(clusters.iter().filter_map(|cluster| cluster.peek("name")), "cluster");
    let clusters = clusters.iter().filter_map(cluster).collect();
    let mut servers: Vec<_> = admin.iter().cloned().collect();
    let listeners = match (listeners, fragment) {
        (Some(list), _) => {
            let read = |(index, field)| {
                let listener = listener(field, index, &names)?;
                servers.push((field.peek("address")?, listener.address));
                Some(listener)
            };
            let items = list.items();
            listening::unique_listener_names(&items);
            items.iter().enumerate().filter_map(read).collect()
        }
        (None, Some(routes)) => {
            routes.warn(format_args!("stands without a listener: served on {FRAGMENT_ADDRESS}"));
            vec![fragment_listener(&routes, &names)?]
        }
        (None, None) => {
            root.error("`listeners` is missing", "add `\"listeners\": [...]`");
            Vec::new()
        }
    };
    listening::unique_addresses(&servers);
    Some(Config::new(listeners, clusters, admin.map(|(_, address)| address)))
}

fn admin<'t>(field: &Field<'t>) -> Option<(Field<'t>, SocketAddr)> {
    let map = field.map()?;
    map.harmless(&["profile_path"]);
    if let Some(path) = map.get("access_log_path")
        && path.scalar().is_none_or(|(text, _)| text != "/dev/null")
    {
        path.warn("not written: Steer has its own logs");
    }
    let address = map.require("address", "\"tcp://127.0.0.1:9901\"");
    map.finish();
    let field = address?;
    let address = tcp_address(&field, true)?;
    listening::warn_if_open(&field, address);
    Some((field, address))
}

fn cluster_manager<'t>(field: &Field<'t>) -> Option<Field<'t>> {
    let map = field.map()?;
    map.refuse(&["sds", "cds"], NO_SERVER, "write the clusters and hosts out");
    map.warn(&["outlier_detection", "local_cluster_name"], "not honoured: Steer checks no health yet");
    let clusters = map.require("clusters", "[...]");
    map.finish();
    clusters
}

/// `tcp://ip:port`.
fn tcp_address(field: &Field<'_>, port_zero: bool) -> Option<SocketAddr> {
    let text = field.string()?;
    match text.strip_prefix("tcp://") {
        Some(address) => load_balancing::socket_address(field, address, port_zero),
        None => {
            field.error(format_args!("`{text}` is not a TCP address"), "write tcp://ip:port");
            None
        }
    }
}

fn listener(field: &Field<'_>, index: usize, clusters: &[&str]) -> Option<Listener> {
    let map = field.map()?;
    map.harmless(&["drain_type"]);
    map.warn(&["per_connection_buffer_limit_bytes"], "not honoured: Steer has its own buffers");
    map.refuse(&["ssl_context"], "Steer does not terminate TLS", "terminate TLS in front of Steer");
    map.refuse_true(
        &["use_proxy_proto"],
        "Steer does not read PROXY protocol headers, so clients would be taken for others",
        "remove it",
    );
    map.refuse_true(&["use_original_dst"], "not supported", "remove it");
    if let Some(bind) = map.get("bind_to_port")
        && bind.boolean() == Some(false)
    {
        bind.error("Steer binds every listener", "remove it");
    }
    let name = map.get("name").and_then(|name| name.string()).filter(|name| !name.is_empty());
    let address =
        map.require("address", "\"tcp://0.0.0.0:8080\"").and_then(|field| tcp_address(&field, true));
    let filters = map.require("filters", "[...]");
    map.finish();
    let filters = filters?;
    let [filter] = &filters.items()[..] else {
        filters.error("must have exactly one filter", "keep the http_connection_manager only");
        return None;
    };
    let (options, virtual_hosts) =
        connection_manager(&filter_config(filter, "http_connection_manager")?, clusters)?;
    let name = listening::listener_name(name, index);
    Some(Listener { name, address: address?, options, virtual_hosts })
}

fn fragment_listener(routes: &Field<'_>, clusters: &[&str]) -> Option<Listener> {
    let options = HttpOptions::default();
    Some(Listener {
        name: "listener_0".to_owned(),
        address: FRAGMENT_ADDRESS,
        virtual_hosts: route_config(routes, clusters, &options)?,
        options,
    })
}

/// The `config` of a filter that must be `wanted`.
fn filter_config<'t>(field: &Field<'t>, wanted: &str) -> Option<Field<'t>> {
    let map = field.map()?;
    map.harmless(&["type"]);
    let name = map.require("name", wanted).and_then(|name| Some((name.string()?, name)));
    let config = map.require("config", "{}");
    map.finish();
    let (text, name) = name?;
    if text != wanted {
        name.error(format_args!("Steer runs no filter `{text}`, only {wanted}"), ELSEWHERE);
        return None;
    }
    config
}

fn connection_manager(field: &Field<'_>, clusters: &[&str]) -> Option<(HttpOptions, Vec<VirtualHost>)> {
    let map = field.map()?;
    map.harmless(&["stat_prefix"]);
    map.warn(&["access_log"], "not written: Steer has its own logs and /flows");
    map.warn(&["http2_settings", "drain_timeout_ms"], "not honoured by Steer");
    map.refuse(&["rds"], NO_SERVER, "write a route_config");
    map.refuse(&["tracing", "set_current_client_cert_details"], EDITS, "remove it");
    map.warn_if_true(&["add_user_agent"], "not honoured: Steer adds no `user-agent`");
    if let Some(codec) = map.get("codec_type") {
        codec.one_of(&[("auto", ()), ("http1", ())]);
    }
    if let Some(certificate) = map.get("forward_client_cert") {
        certificate.one_of(&[("sanitize", ())]);
    }
    let mut options = HttpOptions::default();
    if let Some(http1) = map.get("http1_settings").and_then(|field| field.map()) {
        http1.harmless(&["allow_absolute_url"]);
        options.accept_http_10 = http1.boolean("accept_http_10").unwrap_or(options.accept_http_10);
        http1.finish();
    }
    options.use_remote_address = map.boolean("use_remote_address").unwrap_or(options.use_remote_address);
    options.generate_request_id = map.boolean("generate_request_id").unwrap_or(options.generate_request_id);
    if let Some(name) = map.get("server_name").and_then(|name| name.header_text()) {
        options.server_name = name.to_owned();
    }
    if let Some(seconds) = map.get("idle_timeout_s").and_then(|field| field.unsigned(0..=u64::from(u32::MAX)))
    {
        options.idle_timeout = limit(Duration::from_secs(seconds));
    }
    for filter in map.get("filters").map(|list| list.items()).unwrap_or_default() {
        if let Some(router) = filter_config(&filter, "router").and_then(|config| config.map()) {
            router.harmless(&["dynamic_stats", "start_child_span"]);
            router.finish();
        }
    }
    let routes = map.require("route_config", "{ \"virtual_hosts\": [...] }");
    map.finish();
    let virtual_hosts = route_config(&routes?, clusters, &options)?;
    Some((options, virtual_hosts))
}

/// A duration of which 0 means "no limit".
fn limit(duration: Duration) -> Option<Duration> {
    Some(duration).filter(|duration| !duration.is_zero())
}

fn route_config(field: &Field<'_>, clusters: &[&str], options: &HttpOptions) -> Option<Vec<VirtualHost>> {
    let map = field.map()?;
    map.harmless(&["validate_clusters"]);
    map.refuse(
        &[
            "internal_only_headers",
            "response_headers_to_add",
            "response_headers_to_remove",
            "request_headers_to_add",
        ],
        EDITS,
        ELSEWHERE,
    );
    let hosts =
        map.require("virtual_hosts", "[...]").map(|list| listening::virtual_hosts(&list)).unwrap_or_default();
    map.finish();
    let mut seen = HashMap::new();
    Some(hosts.iter().filter_map(|host| virtual_host(host, clusters, options, &mut seen)).collect())
}

fn virtual_host(
    field: &Field<'_>,
    clusters: &[&str],
    options: &HttpOptions,
    seen: &mut HashMap<String, usize>,
) -> Option<VirtualHost> {
    let map = field.map()?;
    map.harmless(&["virtual_clusters"]);
    map.refuse(&["request_headers_to_add"], EDITS, ELSEWHERE);
    map.refuse(&["require_ssl", "rate_limits", "cors"], "not done by Steer", ELSEWHERE);
    let name = map.require("name", "\"default\"").and_then(|name| name.string());
    let domains = map.require("domains", "[\"*\"]").map(|list| listening::domains(&list, seen));
    let routes = map.require("routes", "[...]").map(|list| list.items()).unwrap_or_default();
    map.finish();
    let routes = routes.iter().filter_map(|item| route(item, clusters, options)).collect();
    Some(VirtualHost { name: name?.to_owned(), domains: domains?, routes })
}

fn route(field: &Field<'_>, clusters: &[&str], options: &HttpOptions) -> Option<Route> {
    let map = field.map()?;
    map.harmless(&["opaque_config", "include_vh_rate_limits"]);
    map.warn(
        &["retry_policy", "priority", "shadow"],
        "not honoured: Steer sends a request once, to one endpoint",
    );
    map.refuse(
        &["weighted_clusters", "cluster_header", "runtime", "regex", "headers", "query_params"],
        "Steer matches by host and by prefix or path only, and a route has one cluster",
        "use prefix or path, and cluster",
    );
    map.refuse(
        &["host_redirect", "path_redirect", "prefix_rewrite", "host_rewrite", "request_headers_to_add"],
        "Steer forwards requests as they come",
        ELSEWHERE,
    );
    map.refuse(&["rate_limits", "decorator", "cors"], "not done by Steer", ELSEWHERE);
    map.refuse_true(&["auto_host_rewrite"], "Steer forwards requests as they come", ELSEWHERE);
    if let Some(sensitive) = map.get("case_sensitive")
        && sensitive.boolean() == Some(false)
    {
        sensitive.error("Steer compares paths case-sensitively", "remove it, and list each spelling");
    }
    let path = path_match(field, &map);
    let cluster =
        map.require("cluster", "\"sio\"").and_then(|name| listening::known_cluster(&name, clusters));
    let timeout_field = map.get("timeout_ms");
    let timeout = timeout_field.as_ref().and_then(|field| field.unsigned(0..=u64::from(u32::MAX)));
    let websocket = map.boolean("use_websocket");
    let hash_policy = map.get("hash_policy").and_then(|field| hash_policy_object(&field));
    map.finish();
    let route = Route {
        path: path?,
        cluster: cluster?,
        timeout: timeout.map_or(Some(listening::ENVOY_ROUTE_TIMEOUT), |ms| limit(Duration::from_millis(ms))),
        idle_timeout: None,
        upgrade_websocket: websocket,
        hash_policy: hash_policy.into_iter().collect(),
    };
    listening::warn_if_not_sticky(field, &route, options);
    if timeout_field.is_none() {
        listening::warn_if_polls_end(field, &route, options, "\"timeout_ms\": 0");
    }
    Some(route)
}

fn path_match(route: &Field<'_>, map: &Map<'_>) -> Option<PathMatch> {
    listening::path_match(route, (map.get("prefix"), map.get("path")), "write `\"prefix\": \"/\"`")
}

/// One object with one header: v1 knew nothing else.
fn hash_policy_object(field: &Field<'_>) -> Option<HashPolicy> {
    let map = field.map()?;
    let name = map.require("header_name", "\"x-forwarded-for\"");
    map.finish();
    Some(HashPolicy { source: hash_policy::plain_header(&name?)?, terminal: false })
}

fn cluster(field: &Field<'_>) -> Option<Cluster> {
    let map = field.map()?;
    map.harmless(&["dns_refresh_rate_ms", "dns_lookup_family", "dns_resolvers", "cleanup_interval_ms"]);
    map.warn(
        &["health_check", "outlier_detection"],
        "not honoured: Steer checks no health yet, every host counts as healthy",
    );
    map.warn(
        &["circuit_breakers", "per_connection_buffer_limit_bytes", "max_requests_per_connection"],
        "not honoured: Steer has its own limits for connections",
    );
    map.refuse(&["ssl_context"], "Steer does not speak TLS to endpoints", "use plain TCP");
    map.refuse(&["features", "http2_settings"], "Steer speaks HTTP/1.1 to endpoints", "remove it");
    map.refuse(&["service_name", "lb_subset_config"], NO_SERVER, "write the hosts out");
    let name = map.require("name", "\"sio\"").and_then(|name| name.not_empty());
    if let Some(kind) = map.require("type", "\"static\"") {
        discovery(&kind);
    }
    let connect_timeout = map.require("connect_timeout_ms", "5000");
    let connect_timeout = connect_timeout.and_then(|field| field.unsigned(1..=u64::from(u32::MAX)));
    if let Some(word) = map.require("lb_type", "\"ring_hash\"")
        && let Some(text) = word.string()
        && text != "ring_hash"
    {
        word.error(format_args!("`{text}` keeps no client on its endpoint"), "use ring_hash");
    }
    let config = map.get("ring_hash_lb_config");
    let hosts = map.require("hosts", "[{ \"url\": \"tcp://10.0.0.1:3000\" }]");
    map.finish();
    let lb_policy = ring_hash(config.and_then(|config| config.map()), field);
    let hosts = hosts?;
    let endpoints: Vec<_> = hosts.items().iter().filter_map(host).collect();
    load_balancing::check_endpoints(&hosts, &endpoints);
    Some(Cluster {
        name: name?.to_owned(),
        lb_policy,
        connect_timeout: connect_timeout.map_or(native::DEFAULT_CONNECT_TIMEOUT, Duration::from_millis),
        endpoints,
        healthy_panic_threshold: native::DEFAULT_PANIC_THRESHOLD,
        source_addresses: Vec::new(),
    })
}

fn discovery(field: &Field<'_>) {
    match field.string() {
        Some(kind @ ("sds" | "logical_dns" | "original_dst")) => {
            let hint = "use static, or strict_dns with IP addresses, and write the hosts out";
            field.error(format_args!("{kind} is not supported"), hint);
        }
        Some(_) => {
            field.one_of(&[("static", ()), ("strict_dns", ())]);
        }
        None => {}
    }
}

/// `use_std_hash` chose the C++ library's hash, which is Murmur with libstdc++, and was on unless
/// switched off.
fn ring_hash(map: Option<Map<'_>>, cluster: &Field<'_>) -> LbPolicy {
    let std_hash = map.as_ref().and_then(|map| map.boolean("use_std_hash")).unwrap_or(true);
    let hash_function = if std_hash { HashFunction::MurmurHash2 } else { HashFunction::XxHash };
    let minimum = map.as_ref().and_then(|map| map.get("minimum_ring_size"));
    if let Some(map) = map {
        map.finish();
    }
    load_balancing::ring(hash_function, minimum.as_ref(), None, cluster)
}

fn host(field: &Field<'_>) -> Option<Endpoint> {
    let map = field.map()?;
    let url = map.require("url", "\"tcp://10.0.0.1:3000\"");
    map.finish();
    let address = tcp_address(&url?, false)?;
    // The ring was built from the address without "tcp://".
    let hash_key = load_balancing::address_text(address);
    Some(Endpoint { address, weight: 1, hash_key, health: Health::Healthy })
}
