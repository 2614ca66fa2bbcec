//! A v3 `Listener` with its one `HttpConnectionManager` and route table.

use std::collections::HashMap;

use super::super::reader::{Field, Map};
use super::super::{HttpOptions, Listener, VirtualHost, listening, native};
use super::http1::{self, Downstream};
use super::route::virtual_host;
use super::{socket_address, typed};

const HTTP_INSPECTOR: &str = ".http_inspector.v3.HttpInspector";
const TLS: &str = "Steer does not terminate TLS";
pub(super) const EDITS: &str = "Steer does not edit headers";
pub(super) const NO_TRACING: &str = "not done: Steer adds no trace headers, so a trace has a gap here";
pub(super) const KEEP_PLAIN: &str = "remove it, or do this in front of Steer or in the endpoints";

/// Fields with which every level of the route table may edit headers.
pub(super) const HEADER_EDITS: [&str; 4] = [
    "request_headers_to_add",
    "request_headers_to_remove",
    "response_headers_to_add",
    "response_headers_to_remove",
];

pub(super) fn listener(field: &Field<'_>, index: usize, clusters: &[&str]) -> Option<Listener> {
    let map = field.map()?;
    map.harmless(&[
        "stat_prefix",
        "metadata",
        "drain_type",
        "traffic_direction",
        "listener_filters_timeout",
        "continue_on_listener_filters_timeout",
        "ignore_global_conn_limit",
    ]);
    map.warn(
        &[
            "access_log",
            "per_connection_buffer_limit_bytes",
            "enable_reuse_port",
            "reuse_port",
            "tcp_backlog_size",
            "tcp_fast_open_queue_length",
            "connection_balance_config",
            "socket_options",
            "max_connections_to_accept_per_socket_event",
        ],
        "not honoured: Steer has its own sockets and logs",
    );
    map.warn_if_true(&["enable_mptcp"], "not honoured: Steer has its own sockets");
    map.refuse(
        &["default_filter_chain"],
        "Steer has one filter chain for each listener",
        "use filter_chains",
    );
    map.refuse_true(&["use_original_dst", "transparent", "freebind"], "not supported", "remove it");
    if let Some(bind) = map.get("bind_to_port")
        && bind.boolean() == Some(false)
    {
        bind.error("Steer binds every listener", "remove it");
    }
    let name = map.get("name").and_then(|name| name.string()).filter(|name| !name.is_empty());
    let address = map.require("address", "{ socket_address: { address: 0.0.0.0, port_value: 8080 } }");
    let filters = map.get("listener_filters");
    let chains = map.require("filter_chains", "[{ filters: [...] }]");
    map.finish();
    for filter in filters.map(|list| list.items()).unwrap_or_default() {
        listener_filter(&filter);
    }
    let address = address.and_then(|address| socket_address(&address, true));
    // A second chain is a problem, and so may be its content.
    let chains = chains.map(|list| one_item(&list, "filter chain")).unwrap_or_default();
    let read = |chain: &Field<'_>| connection_manager(&filter_chain(chain)?, clusters);
    let (options, virtual_hosts) = chains.iter().map(read).collect::<Vec<_>>().pop()??;
    let name = listening::listener_name(name, index);
    Some(Listener { name, address: address?, options, virtual_hosts })
}

fn listener_filter(field: &Field<'_>) {
    let name = field.peek("name").and_then(|name| name.scalar()).map_or("?", |(name, _)| name);
    let config = field.peek("typed_config");
    // The type decides, not the name. This filter finds out whether a connection speaks HTTP, on
    // which only a filter_chain_match can depend, and every match is refused.
    if config.and_then(|config| type_of(&config)).is_some_and(|kind| kind.ends_with(HTTP_INSPECTOR)) {
        return;
    }
    let why = match name {
        "envoy.filters.listener.proxy_protocol" => {
            "Steer does not read PROXY protocol headers, so clients would be taken for others"
        }
        _ => "Steer has no listener filters",
    };
    field.error(format_args!("`{name}`: {why}"), "remove it, or use a listener without it");
}

/// The `@type` of an `Any`; reports nothing.
fn type_of<'t>(config: &Field<'t>) -> Option<&'t str> {
    Some(config.peek("@type")?.scalar()?.0)
}

/// The items of a list that must have one.
fn one_item<'t>(list: &Field<'t>, what: &str) -> Vec<Field<'t>> {
    let items = list.items();
    if items.len() != 1 {
        let count = items.len();
        list.error(
            format_args!("Steer takes exactly one {what} here, found {count}"),
            "keep the one with the HttpConnectionManager; write one listener for each port",
        );
    }
    items
}

/// The connection manager's typed config.
fn filter_chain<'t>(chain: &Field<'t>) -> Option<Field<'t>> {
    let map = chain.map()?;
    map.harmless(&["name", "metadata", "transport_socket_connect_timeout"]);
    map.refuse(&["transport_socket", "tls_context"], TLS, "terminate TLS in front of Steer");
    map.refuse_true(&["use_proxy_proto"], "Steer does not read PROXY protocol headers", "remove it");
    if let Some(matching) = map.get("filter_chain_match").and_then(|field| field.map()) {
        matching.finish();
    }
    let filters = map.require("filters", "[HttpConnectionManager]");
    map.finish();
    let map = one_item(&filters?, "network filter").pop()?.map()?;
    map.harmless(&["name"]);
    let config = map.require("typed_config", "{ \"@type\": ...HttpConnectionManager }");
    map.finish();
    config
}

fn connection_manager(field: &Field<'_>, clusters: &[&str]) -> Option<(HttpOptions, Vec<VirtualHost>)> {
    let hint = "use an HttpConnectionManager; for bare TCP, Steer is not the right tool";
    let (_, map) = typed(field, &["HttpConnectionManager"], hint)?;
    let options = http_options(&map);
    not_honoured(&map);
    for filter in map.get("http_filters").map(|list| list.items()).unwrap_or_default() {
        http_filter(&filter);
    }
    let routes = map.require("route_config", "{ virtual_hosts: [...] }");
    map.finish();
    let map = routes?.map()?;
    map.harmless(&[
        "name",
        "validate_clusters",
        "max_direct_response_body_size_bytes",
        "most_specific_header_mutations_wins",
    ]);
    map.refuse(&HEADER_EDITS, EDITS, KEEP_PLAIN);
    map.refuse(&["vhds"], "Steer reads no routes from a server", "write the virtual hosts here");
    map.refuse_true(
        &["ignore_port_in_host_matching", "ignore_path_parameters_in_path_matching"],
        "Steer compares hosts and paths as they come",
        "remove it; list domains with their ports",
    );
    let hosts =
        map.require("virtual_hosts", "[...]").map(|list| listening::virtual_hosts(&list)).unwrap_or_default();
    map.finish();
    let mut seen = HashMap::new();
    let hosts = hosts.iter().filter_map(|host| virtual_host(host, clusters, &options, &mut seen)).collect();
    Some((options, hosts))
}

fn http_options(map: &Map<'_>) -> HttpOptions {
    let default = HttpOptions::default();
    let yes = |name, default| map.boolean(name).unwrap_or(default);
    let text = |name| map.get(name)?.header_text().map(str::to_owned);
    let limit =
        |map: &Map<'_>, name, default| map.get(name).and_then(|field| field.limit()).unwrap_or(default);
    let common = map.get("common_http_protocol_options").and_then(|field| field.map());
    let mut idle_timeout = default.idle_timeout;
    let mut max_request_headers_count = default.max_request_headers_count;
    if let Some(common) = common {
        idle_timeout = limit(&common, "idle_timeout", idle_timeout);
        max_request_headers_count = native::max_headers_count(&common);
        common.warn(
            &[
                "max_connection_duration",
                "max_stream_duration",
                "max_requests_per_connection",
                "max_response_headers_kb",
            ],
            "not honoured: Steer ends no stream for its age",
        );
        if let Some(action) = common.get("headers_with_underscores_action") {
            action.one_of(&[("ALLOW", ())]);
        }
        common.finish();
    }
    let Downstream { accept_http_10, preserve_case } =
        map.get("http_protocol_options").map(|field| http1::downstream(&field)).unwrap_or_default();
    HttpOptions {
        use_remote_address: yes("use_remote_address", default.use_remote_address),
        xff_num_trusted_hops: native::trusted_hops(map),
        skip_xff_append: yes("skip_xff_append", default.skip_xff_append),
        via: map
            .get("via")
            .filter(|via| via.scalar() != Some(("", false)))
            .and_then(|via| via.header_text().map(str::to_owned)),
        server_name: text("server_name").unwrap_or(default.server_name),
        generate_request_id: yes("generate_request_id", default.generate_request_id),
        preserve_external_request_id: yes(
            "preserve_external_request_id",
            default.preserve_external_request_id,
        ),
        preserve_case,
        accept_http_10,
        upgrade_websocket: map
            .get("upgrade_configs")
            .and_then(|list| upgrade_configs(&list))
            .unwrap_or(false),
        max_request_headers_bytes: native::max_request_headers_bytes(map),
        max_request_headers_count,
        request_headers_timeout: limit(map, "request_headers_timeout", default.request_headers_timeout),
        idle_timeout,
        stream_idle_timeout: limit(map, "stream_idle_timeout", default.stream_idle_timeout),
    }
}

/// The connection manager's other fields.
fn not_honoured(map: &Map<'_>) {
    map.harmless(&["stat_prefix", "typed_header_validation_config"]);
    if let Some(codec) = map.get("codec_type") {
        codec.one_of(&[("AUTO", ()), ("HTTP1", ())]);
    }
    map.warn(
        &["access_log", "access_log_flush_interval", "flush_access_log_on_new_request", "access_log_options"],
        "not written: Steer has its own logs and /flows",
    );
    map.warn(
        &["http2_protocol_options", "http3_protocol_options"],
        "not honoured: Steer speaks HTTP/1.1 only",
    );
    map.warn(
        &["delayed_close_timeout", "drain_timeout", "request_timeout", "stream_flush_timeout"],
        "not honoured: Steer has its own way of closing",
    );
    map.refuse(
        &["rds", "scoped_routes", "scoped_rds"],
        "Steer reads no routes from a server",
        "write a route_config",
    );
    map.warn(&["tracing"], NO_TRACING);
    map.warn_if_true(&["add_user_agent"], "not honoured: Steer adds no `user-agent`");
    if let Some(field) = map.get("server_header_transformation")
        && field.enum_word() != Some("OVERWRITE")
        && field.one_of(&[("OVERWRITE", ()), ("APPEND_IF_ABSENT", ()), ("PASS_THROUGH", ())]).is_some()
    {
        field.warn("not honoured: Steer writes `server` itself, with the value of server_name");
    }
    map.refuse(
        &["local_reply_config", "set_current_client_cert_details", "early_header_mutation_extensions"],
        EDITS,
        KEEP_PLAIN,
    );
    map.refuse(
        &["original_ip_detection_extensions", "internal_address_config"],
        "Steer knows clients by the peer's address and x-forwarded-for only",
        "remove it; see use_remote_address and xff_num_trusted_hops",
    );
    map.refuse_true(
        &[
            "normalize_path",
            "merge_slashes",
            "strip_matching_host_port",
            "strip_any_host_port",
            "strip_trailing_host_dot",
        ],
        "Steer compares and forwards hosts and paths as they come",
        "remove it",
    );
    map.refuse_true(
        &[
            "always_set_request_id_in_response",
            "append_x_forwarded_port",
            "append_local_overload",
            "represent_ipv4_remote_address_as_ipv4_mapped_ipv6",
            "proxy_100_continue",
            "stream_error_on_invalid_http_message",
            "add_proxy_protocol_connection_state",
        ],
        "not done by Steer",
        "remove it",
    );
    if let Some(field) = map.get("forward_client_cert_details") {
        field.one_of(&[("SANITIZE", ())]);
    }
    if let Some(field) = map.get("path_with_escaped_slashes_action") {
        field.one_of(&[("KEEP_UNCHANGED", ()), ("IMPLEMENTATION_SPECIFIC_DEFAULT", ())]);
    }
}

fn http_filter(field: &Field<'_>) {
    let Some(map) = field.map() else { return };
    let name = map.require("name", "envoy.filters.http.router").and_then(|name| name.string());
    let disabled = map.boolean("disabled").unwrap_or(false);
    map.harmless(&["is_optional"]);
    let config = map.get("typed_config");
    map.finish();
    if disabled {
        return;
    }
    let Some(name) = name else { return };
    let kind = config.as_ref().and_then(type_of);
    if kind.is_some_and(|kind| kind.ends_with(".compressor.v3.Compressor")) {
        field.warn("not done: Steer compresses no responses");
        return;
    }
    let is_router = match kind {
        Some(kind) => kind.ends_with(".router.v3.Router"),
        None => matches!(name, "envoy.filters.http.router" | "envoy.router"),
    };
    if !is_router {
        field.error(format_args!("`{name}`: Steer runs no HTTP filter but the router"), KEEP_PLAIN);
        return;
    }
    let Some(map) = config.and_then(|config| config.map()) else { return };
    map.harmless(&["@type", "dynamic_stats", "start_child_span", "suppress_grpc_request_failure_code_stats"]);
    map.warn(&["upstream_log", "upstream_log_options"], "not written: Steer has its own logs");
    map.refuse_true(
        &["suppress_envoy_headers", "respect_expected_rq_timeout"],
        "not done by Steer",
        "remove it",
    );
    map.finish();
}

/// Whether `websocket` is allowed; `None` if the list does not say.
pub(super) fn upgrade_configs(list: &Field<'_>) -> Option<bool> {
    let mut websocket = None;
    for item in list.items() {
        let Some(map) = item.map() else { continue };
        let kind = map.require("upgrade_type", "websocket").and_then(|kind| Some((kind.string()?, kind)));
        let enabled = map.boolean("enabled").unwrap_or(true);
        map.refuse(&["filters", "connect_config"], "Steer runs no filters", "remove it");
        map.finish();
        match kind {
            Some((text, _)) if text.eq_ignore_ascii_case("websocket") => websocket = Some(enabled),
            Some((text, kind)) if enabled => {
                kind.error(format_args!("`{text}`: Steer carries only websocket upgrades"), "remove it");
            }
            _ => {}
        }
    }
    websocket
}
