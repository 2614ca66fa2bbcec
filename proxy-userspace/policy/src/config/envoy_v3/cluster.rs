//! A v3 `Cluster`.

use super::super::reader::{Field, Map};
use super::super::{Cluster, Endpoint, LbPolicy, load_balancing, native};
use super::{bind, http1, socket_address, typed};

const HTTP_PROTOCOL_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// Whose name stands for an endpoint without `hostname`, if the cluster hashes by host name.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Discovery {
    Static,
    StrictDns,
}

struct Balancing {
    policy: LbPolicy,
    by_hostname: bool,
    /// Written as `load_balancing_policy`, not `lb_policy`.
    typed: bool,
}

pub(super) fn read(field: &Field<'_>) -> Option<Cluster> {
    let map = field.map()?;
    harmless_and_warned(&map);
    refused(&map);
    let name = map.require("name", "sio").and_then(|name| name.not_empty());
    let discovery = map.get("type").and_then(|kind| discovery(&kind)).unwrap_or(Discovery::Static);
    let connect_timeout = map.get("connect_timeout").and_then(|field| native::connect_timeout(&field));
    let common = map.get("common_lb_config").and_then(|field| field.map());
    let (threshold, common_by_hostname) = common.map(common_lb_config).unwrap_or_default();
    let mut balancing = match map.get("load_balancing_policy") {
        Some(policy) => {
            // Envoy ignores everything else then, too.
            map.harmless(&["lb_policy", "ring_hash_lb_config", "maglev_lb_config"]);
            load_balancing_policy(&policy)
        }
        None => lb_policy(&map),
    };
    protocol_options(&map);
    let source_addresses = map.get("upstream_bind_config").and_then(|field| bind::source_addresses(&field));
    let assignment = map.require("load_assignment", "{ endpoints: [...] }");
    map.finish();
    if let (Some(balancing), Some(place)) = (&mut balancing, common_by_hostname)
        && !balancing.typed
    {
        balancing.by_hostname = true;
        if discovery == Discovery::Static {
            place.error(
                "a STATIC cluster cannot hash by host name, Envoy refuses that too",
                "use `type: STRICT_DNS`, or give each endpoint a metadata hash_key",
            );
        }
    }
    // Endpoints are looked at in any case, so that one run names their problems, too.
    let by_hostname = balancing.as_ref().is_some_and(|balancing| balancing.by_hostname);
    let endpoints = load_assignment(&assignment?, by_hostname, discovery)?;
    let balancing = balancing?;
    Some(Cluster {
        name: name?.to_owned(),
        lb_policy: balancing.policy,
        connect_timeout: connect_timeout.unwrap_or(native::DEFAULT_CONNECT_TIMEOUT),
        endpoints,
        healthy_panic_threshold: threshold.unwrap_or(native::DEFAULT_PANIC_THRESHOLD),
        source_addresses: source_addresses.unwrap_or_default(),
    })
}

fn harmless_and_warned(map: &Map<'_>) {
    map.harmless(&[
        "alt_stat_name",
        "metadata",
        "dns_refresh_rate",
        "dns_failure_refresh_rate",
        "dns_jitter",
        "dns_lookup_family",
        "dns_resolvers",
        "dns_resolution_config",
        "typed_dns_resolver_config",
        "respect_dns_ttl",
        "use_tcp_for_dns_lookups",
        "wait_for_warm_on_init",
        "ignore_health_on_host_removal",
        "cleanup_interval",
        "warming_timeout",
    ]);
    map.warn(
        &["health_checks", "outlier_detection", "close_connections_on_host_health_failure"],
        "not honoured: Steer checks no health yet, an endpoint is as its health_status says",
    );
    map.warn(
        &[
            "circuit_breakers",
            "per_connection_buffer_limit_bytes",
            "max_requests_per_connection",
            "preconnect_policy",
        ],
        "not honoured: Steer has its own limits for connections",
    );
    map.warn(
        &[
            "track_timeout_budgets",
            "track_cluster_stats",
            "upstream_connection_options",
            "connection_pool_per_downstream_connection",
        ],
        "not honoured by Steer",
    );
}

fn refused(map: &Map<'_>) {
    map.refuse(&["hosts"], "belongs to Envoy's v2 API", "write the endpoints as load_assignment");
    map.refuse(
        &["eds_cluster_config", "cluster_type", "lrs_server"],
        "Steer reads no endpoints from a server",
        "use type STATIC with a load_assignment",
    );
    map.refuse(
        &["transport_socket", "transport_socket_matches", "tls_context"],
        "Steer does not speak TLS to endpoints",
        "use plain TCP towards the endpoints",
    );
    map.refuse(
        &["http2_protocol_options"],
        "Steer speaks HTTP/1.1 to endpoints",
        "remove it if the endpoints accept HTTP/1.1",
    );
    map.refuse(
        &["lb_subset_config", "least_request_lb_config", "round_robin_lb_config", "original_dst_lb_config"],
        "Steer chooses endpoints by ring_hash_lb_config or maglev_lb_config only",
        "remove it",
    );
}

fn discovery(field: &Field<'_>) -> Option<Discovery> {
    match field.enum_word() {
        Some(kind @ ("EDS" | "LOGICAL_DNS" | "ORIGINAL_DST")) => {
            field.error(
                format_args!("{kind} is not supported"),
                "use STATIC, or STRICT_DNS with IP addresses, and write the endpoints as load_assignment",
            );
            None
        }
        _ => field.one_of(&[("STATIC", Discovery::Static), ("STRICT_DNS", Discovery::StrictDns)]),
    }
}

/// The panic threshold, and where hashing by host name is switched on.
fn common_lb_config<'t>(map: Map<'t>) -> (Option<f64>, Option<Field<'t>>) {
    // Zones do not matter to ring_hash and maglev. The other fields concern changes at run time.
    map.harmless(&["zone_aware_lb_config", "update_merge_window", "close_connections_on_host_set_change"]);
    map.warn(&["ignore_new_hosts_until_first_hc"], "not honoured: Steer checks no health yet");
    map.refuse(
        &["locality_weighted_lb_config", "override_host_status"],
        "Steer does not weigh localities",
        "remove it, or give each endpoint its load_balancing_weight",
    );
    let threshold = map.get("healthy_panic_threshold").and_then(|field| {
        let percent = field.map()?;
        let value = percent.get("value").map_or(Some(0.0), |value| value.percent());
        percent.finish();
        value
    });
    let hashing = map.get("consistent_hashing_lb_config").and_then(|field| consistent_hashing(&field));
    map.finish();
    (threshold, hashing)
}

/// Where `use_hostname_for_hashing` is switched on.
fn consistent_hashing<'t>(field: &Field<'t>) -> Option<Field<'t>> {
    let map = field.map()?;
    let by_hostname = hostname_switch(&map);
    map.finish();
    by_hostname
}

fn hostname_switch<'t>(map: &Map<'t>) -> Option<Field<'t>> {
    map.refuse(
        &["hash_balance_factor"],
        "Steer always keeps to the ring, whatever the load",
        "remove it; the default is off",
    );
    map.refuse(&["hash_policy"], "Steer reads hash policies from routes only", "move it into the routes");
    map.get("use_hostname_for_hashing").filter(|field| field.boolean() == Some(true))
}

fn lb_policy(map: &Map<'_>) -> Option<Balancing> {
    let word = map.require("lb_policy", "RING_HASH");
    let ring_config = map.get("ring_hash_lb_config").and_then(|field| field.map());
    let maglev_config = map.get("maglev_lb_config").and_then(|field| field.map());
    let word = word?;
    let policy = match word.enum_word() {
        Some("RING_HASH") => {
            ring_config.map_or(LbPolicy::RING_HASH, |map| finished(map, load_balancing::ring_hash))
        }
        Some("MAGLEV") => {
            let default = LbPolicy::Maglev { table_size: LbPolicy::DEFAULT_TABLE_SIZE };
            maglev_config.map_or(default, |map| finished(map, load_balancing::maglev))
        }
        Some("LOAD_BALANCING_POLICY_CONFIG") => {
            word.error("`load_balancing_policy` is missing", "add it, or use RING_HASH or MAGLEV");
            return None;
        }
        Some(other) => {
            word.error(format_args!("`{other}` keeps no client on its endpoint"), "use RING_HASH or MAGLEV");
            return None;
        }
        None => {
            word.one_of(&[("RING_HASH", ()), ("MAGLEV", ())]);
            return None;
        }
    };
    Some(Balancing { policy, by_hostname: false, typed: false })
}

fn finished(map: Map<'_>, read: fn(&Map<'_>) -> LbPolicy) -> LbPolicy {
    let policy = read(&map);
    map.finish();
    policy
}

/// Envoy takes the first policy that it knows, and it knows all of them: only the first counts.
fn load_balancing_policy(field: &Field<'_>) -> Option<Balancing> {
    let map = field.map()?;
    let policies = map.require("policies", "[...]");
    map.finish();
    let policies = policies?;
    let Some(first) = policies.items().into_iter().next() else {
        policies.error("must have a policy", "add the RingHash or Maglev extension");
        return None;
    };
    let map = first.map()?;
    let extension = map.require("typed_extension_config", "{ name: ..., typed_config: ... }");
    map.finish();
    let map = extension?.map()?;
    map.harmless(&["name"]);
    let config = map.require("typed_config", "{ \"@type\": ... }");
    map.finish();
    let hint = "use the RingHash or Maglev extension";
    let (kind, map) = typed(&config?, &["RingHash", "Maglev"], hint)?;
    map.refuse(&["locality_weighted_lb_config"], "Steer does not weigh localities", "remove it");
    let policy =
        if kind == "RingHash" { load_balancing::ring_hash(&map) } else { load_balancing::maglev(&map) };
    let old_switch = if kind == "RingHash" { hostname_switch(&map) } else { None };
    let switch = map.get("consistent_hashing_lb_config").and_then(|field| consistent_hashing(&field));
    map.finish();
    Some(Balancing { policy, by_hostname: switch.or(old_switch).is_some(), typed: true })
}

/// HTTP/1.1 is all that may be asked for.
fn protocol_options(map: &Map<'_>) {
    map.warn(
        &["common_http_protocol_options", "upstream_http_protocol_options"],
        "not honoured: Steer has its own limits for connections",
    );
    if let Some(field) = map.get("http_protocol_options").and_then(|field| field.map()) {
        http1::upstream(field);
    }
    let Some(map) = map.get("typed_extension_protocol_options").and_then(|field| field.map()) else { return };
    if let Some(field) = map.get(HTTP_PROTOCOL_OPTIONS)
        && let Some((_, map)) = typed(&field, &["HttpProtocolOptions"], "remove it")
    {
        map.warn(&["common_http_protocol_options"], "not honoured: Steer has its own limits for connections");
        if let Some(explicit) = map.get("explicit_http_config").and_then(|field| field.map()) {
            if let Some(options) = explicit.get("http_protocol_options").and_then(|field| field.map()) {
                http1::upstream(options);
            }
            explicit.refuse(
                &["http2_protocol_options", "http3_protocol_options"],
                "Steer speaks HTTP/1.1 to endpoints",
                "use http_protocol_options if the endpoints accept HTTP/1.1",
            );
            explicit.finish();
        }
        map.finish();
    }
    map.finish();
}

/// Where the cluster asks for a format of header names; reports nothing.
pub(super) fn header_key_format<'t>(field: &Field<'t>) -> Option<Field<'t>> {
    let typed = || {
        let extensions = field.peek("typed_extension_protocol_options")?;
        extensions.peek(HTTP_PROTOCOL_OPTIONS)?.peek("explicit_http_config")?.peek("http_protocol_options")
    };
    field.peek("http_protocol_options").or_else(typed)?.peek("header_key_format")
}

fn load_assignment(field: &Field<'_>, by_hostname: bool, discovery: Discovery) -> Option<Vec<Endpoint>> {
    let map = field.map()?;
    map.harmless(&["cluster_name", "named_endpoints"]);
    if let Some(policy) = map.get("policy").and_then(|field| field.map()) {
        policy.harmless(&["endpoint_stale_after"]);
        policy.refuse(
            &["drop_overloads", "overprovisioning_factor", "weighted_priority_health"],
            "Steer has one priority, and the factor 140",
            "remove it",
        );
        policy.finish();
    }
    let localities = map.get("endpoints").map(|list| list.items()).unwrap_or_default();
    map.finish();
    let mut endpoints = Vec::new();
    for locality in &localities {
        let Some(map) = locality.map() else { continue };
        // Without locality_weighted_lb_config, which is refused, localities are one flat list.
        map.harmless(&["locality", "load_balancing_weight", "proximity", "metadata"]);
        map.refuse(
            &["load_balancer_endpoints", "leds_cluster_locality_config"],
            "not supported",
            "use lb_endpoints",
        );
        if let Some(priority) = map.get("priority")
            && priority.unsigned(0..=128).is_some_and(|priority| priority > 0)
        {
            priority.error("Steer has one priority", "use priority 0 for all, or leave these endpoints out");
        }
        let list = map.get("lb_endpoints").map(|list| list.items()).unwrap_or_default();
        map.finish();
        endpoints.extend(list.iter().filter_map(|item| lb_endpoint(item, by_hostname, discovery)));
    }
    load_balancing::check_endpoints(field, &endpoints);
    Some(endpoints)
}

fn lb_endpoint(field: &Field<'_>, by_hostname: bool, discovery: Discovery) -> Option<Endpoint> {
    let map = field.map()?;
    map.refuse(&["endpoint_name"], "not supported", "write the endpoint itself");
    let health = map.get("health_status").and_then(|word| word.one_of(&load_balancing::HEALTH));
    let weight = map.get("load_balancing_weight").and_then(|weight| weight.unsigned(1..=u64::from(u32::MAX)));
    let hash_key = map.get("metadata").and_then(|metadata| metadata_hash_key(&metadata));
    let endpoint = map.require("endpoint", "{ address: ... }");
    map.finish();
    let endpoint = endpoint?;
    let map = endpoint.map()?;
    map.warn(&["health_check_config"], "not honoured: Steer checks no health yet");
    map.refuse(&["additional_addresses"], "Steer tries one address for each endpoint", "remove it");
    let address = map.require("address", "{ socket_address: ... }");
    let address = address.and_then(|field| socket_address(&field, false));
    let hostname = map.get("hostname").and_then(|name| name.string()).filter(|name| !name.is_empty());
    map.finish();
    let address = address?;
    let hostname = match hostname {
        _ if !by_hostname => None,
        None if discovery == Discovery::StrictDns => Some(address.ip().to_string()),
        None if hash_key.is_none() => {
            endpoint.error(
                "has no hostname to hash by: all such endpoints would share one place on the ring",
                "add `hostname`",
            );
            None
        }
        hostname => hostname.map(str::to_owned),
    };
    Some(Endpoint {
        address,
        weight: weight.and_then(|weight| u32::try_from(weight).ok()).unwrap_or(1),
        hash_key: hash_key.or(hostname).unwrap_or_else(|| load_balancing::address_text(address)),
        health: health.unwrap_or_default(),
    })
}

/// `filter_metadata["envoy.lb"].hash_key`, if it is a non-empty string; other metadata has no
/// effect without subsets, which are refused.
fn metadata_hash_key(field: &Field<'_>) -> Option<String> {
    let key = field.peek("filter_metadata")?.peek("envoy.lb")?.peek("hash_key")?;
    if !key.is_string() {
        key.warn("not a string, so it is ignored, as Envoy does");
        return None;
    }
    key.string().filter(|key| !key.is_empty()).map(str::to_owned)
}
