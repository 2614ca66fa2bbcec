//! Virtual hosts and routes of a v3 `RouteConfiguration`.

use std::collections::HashMap;

use super::super::reader::Field;
use super::super::{HttpOptions, PathMatch, Route, VirtualHost, hash_policy, listening};
use super::http::{EDITS, HEADER_EDITS, KEEP_PLAIN, NO_TRACING, upgrade_configs};

const RETRY: &str = "not honoured: Steer sends a request once; a failure is answered with 502, 503 or 504";

pub(super) fn virtual_host(
    field: &Field<'_>,
    clusters: &[&str],
    options: &HttpOptions,
    seen: &mut HashMap<String, usize>,
) -> Option<VirtualHost> {
    let map = field.map()?;
    map.harmless(&["metadata", "virtual_clusters"]);
    map.warn_if_true(&["include_attempt_count_in_response"], "not honoured: Steer adds no such header");
    map.refuse(&HEADER_EDITS, EDITS, KEEP_PLAIN);
    if let Some(tls) = map.get("require_tls") {
        tls.one_of(&[("NONE", ())]);
    }
    map.warn(&["retry_policy", "hedge_policy"], RETRY);
    let name = map.require("name", "default").and_then(|name| name.string());
    let domains = map.require("domains", "[\"*\"]").map(|list| listening::domains(&list, seen));
    let routes = map.get("routes");
    map.finish();
    let routes = routes.map(|list| list.items()).unwrap_or_default();
    if routes.is_empty() {
        field.warn("no routes: every request is answered with 404");
    }
    let routes = routes.iter().filter_map(|item| route(item, clusters, options)).collect();
    Some(VirtualHost { name: name?.to_owned(), domains: domains?, routes })
}

fn route(field: &Field<'_>, clusters: &[&str], options: &HttpOptions) -> Option<Route> {
    let map = field.map()?;
    map.harmless(&["name", "metadata", "stat_prefix"]);
    map.warn(
        &["per_request_buffer_limit_bytes", "request_body_buffer_limit"],
        "not honoured: Steer buffers no bodies",
    );
    map.refuse(&HEADER_EDITS, EDITS, KEEP_PLAIN);
    map.refuse(
        &["redirect", "direct_response", "filter_action", "non_forwarding_action"],
        "Steer forwards requests and answers none itself",
        KEEP_PLAIN,
    );
    map.warn(&["decorator", "tracing"], NO_TRACING);
    map.refuse(&["typed_per_filter_config"], "Steer has no filters", "remove it");
    let path = map.require("match", "{ prefix: / }").and_then(|field| path_match(&field));
    let action = map.get("route");
    map.finish();
    let Some(action) = action else {
        field.error("`route` is missing", "add `route: { cluster: NAME, hash_policy: [...] }`");
        return None;
    };
    let mut route = route_action(&action, clusters)?;
    route.path = path?;
    listening::warn_if_not_sticky(field, &route, options);
    if action.peek("timeout").is_none() {
        listening::warn_if_polls_end(&action, &route, options, "timeout: 0s");
    }
    Some(route)
}

fn path_match(field: &Field<'_>) -> Option<PathMatch> {
    let map = field.map()?;
    map.refuse(
        &[
            "headers",
            "query_parameters",
            "cookies",
            "grpc",
            "runtime_fraction",
            "tls_context",
            "dynamic_metadata",
            "filter_state",
            "safe_regex",
            "connect_matcher",
            "path_separated_prefix",
            "path_match_policy",
        ],
        "Steer matches by host and by prefix or path only",
        "use prefix or path",
    );
    if let Some(sensitive) = map.get("case_sensitive")
        && sensitive.boolean() == Some(false)
    {
        sensitive.error("Steer compares paths case-sensitively", "remove it, and list each spelling");
    }
    let found = (map.get("prefix"), map.get("path"));
    map.finish();
    listening::path_match(field, found, "write `match: { prefix: / }`")
}

/// Reads a `RouteAction`; the caller knows the path.
fn route_action(field: &Field<'_>, clusters: &[&str]) -> Option<Route> {
    let map = field.map()?;
    map.harmless(&["cluster_not_found_response_code", "include_vh_rate_limits", "metadata"]);
    map.warn(&["retry_policy", "retry_policy_typed_config", "hedge_policy", "priority"], RETRY);
    map.warn(&["request_mirror_policies"], "not honoured: Steer mirrors no requests");
    map.warn(&["max_stream_duration", "flush_timeout"], "not honoured: Steer ends no stream for its age");
    map.refuse(
        &[
            "weighted_clusters",
            "cluster_header",
            "cluster_specifier_plugin",
            "inline_cluster_specifier_plugin",
            "metadata_match",
        ],
        "a route of Steer has one fixed cluster",
        "use `cluster`",
    );
    map.refuse(
        &[
            "prefix_rewrite",
            "regex_rewrite",
            "path_rewrite",
            "path_rewrite_policy",
            "host_rewrite",
            "host_rewrite_literal",
            "host_rewrite_header",
            "host_rewrite_path_regex",
            "auto_host_rewrite",
            "auto_host_rewrite_header",
            "append_x_forwarded_host",
        ],
        "Steer forwards path and Host as they come",
        KEEP_PLAIN,
    );
    map.refuse(
        &[
            "rate_limits",
            "cors",
            "internal_redirect_policy",
            "internal_redirect_action",
            "max_grpc_timeout",
            "early_data_policy",
        ],
        "not done by Steer",
        KEEP_PLAIN,
    );
    let cluster = map.require("cluster", clusters.first().copied().unwrap_or("NAME"));
    let cluster = cluster.and_then(|name| listening::known_cluster(&name, clusters));
    let timeout = map.get("timeout").and_then(|field| field.limit());
    let idle_timeout = map.get("idle_timeout").and_then(|field| field.limit());
    let upgrade_websocket = map.get("upgrade_configs").and_then(|list| upgrade_configs(&list));
    let hash_policy = map.get("hash_policy").map(|list| hash_policy::read(&list, false)).unwrap_or_default();
    map.finish();
    Some(Route {
        path: PathMatch::Prefix(String::new()),
        cluster: cluster?,
        timeout: timeout.unwrap_or(Some(listening::ENVOY_ROUTE_TIMEOUT)),
        idle_timeout,
        upgrade_websocket,
        hash_policy,
    })
}
