//! An Envoy v3 bootstrap, as far as Steer does the same. Fields have their proto names, also in
//! camelCase. A field that would change where a request goes or how it looks, and that Steer does
//! not honour, is refused. A feature that Steer merely lacks gets a warning. A field that cannot
//! matter is accepted by name.

mod bind;
mod cluster;
mod http;
mod http1;
mod route;

use std::net::{IpAddr, SocketAddr};

use super::reader::{Field, Map};
use super::{Config, listening};

pub(super) fn read(root: &Field<'_>) -> Option<Config> {
    let map = root.map()?;
    map.harmless(&["node", "flags_path", "@type"]);
    map.refuse(
        &["dynamic_resources", "xds_delegate_extension", "xds_config_tracker_extension", "hds_config"],
        "Steer reads no configuration from a server",
        "write the listeners and clusters under static_resources",
    );
    map.warn(
        &[
            "stats_sinks",
            "stats_config",
            "stats_flush_interval",
            "stats_flush_on_admin",
            "stats_server_version_override",
            "layered_runtime",
            "overload_manager",
            "watchdog",
            "watchdogs",
            "cluster_manager",
            "enable_dispatcher_stats",
            "header_prefix",
            "use_tcp_for_dns_lookups",
            "application_log_config",
            "memory_allocator_manager",
        ],
        "not read: Steer has its own limits, metrics and logs",
    );
    let admin = map.get("admin").and_then(|field| admin(&field));
    let resources = map.require("static_resources", "{ listeners: [...], clusters: [...] }");
    map.finish();

    let map = resources?.map()?;
    // Only TLS uses secrets, and every use of TLS is refused.
    map.harmless(&["secrets"]);
    let clusters = map.get("clusters").map(|list| list.items()).unwrap_or_default();
    let names = listening::cluster_names(&clusters);
    listening::unique(clusters.iter().filter_map(|cluster| cluster.peek("name")), "cluster");
    let listeners = map.require("listeners", "[...]");
    map.finish();

    let listeners = listeners?;
    let items = listeners.items();
    if items.is_empty() {
        listeners.error("must have at least one listener", "add a listener with an HttpConnectionManager");
    }
    listening::unique_listener_names(&items);
    let mut servers: Vec<_> = admin.iter().cloned().collect();
    let preserve_case: Vec<_> = clusters.iter().filter_map(cluster::header_key_format).collect();
    let clusters = clusters.iter().filter_map(cluster::read).collect();
    let read = |(index, field)| {
        let listener = http::listener(field, index, &names)?;
        servers.push((field.peek("address")?, listener.address));
        Some(listener)
    };
    let listeners: Vec<_> = items.iter().enumerate().filter_map(read).collect();
    if !listeners.iter().any(|listener| listener.options.preserve_case) {
        for field in preserve_case {
            field.warn(
                "has no effect: Steer keeps the case of header names, both ways, where the \
                 connection manager's http_protocol_options ask for it",
            );
        }
    }
    listening::unique_addresses(&servers);
    Some(Config::new(listeners, clusters, admin.map(|(_, address)| address)))
}

fn admin<'t>(field: &Field<'t>) -> Option<(Field<'t>, SocketAddr)> {
    let map = field.map()?;
    map.harmless(&["profile_path"]);
    map.warn(
        &["access_log", "access_log_path", "socket_options", "ignore_global_conn_limit", "allow_paths"],
        "not honoured by Steer's admin server",
    );
    let address = map.require("address", "{ socket_address: { address: 127.0.0.1, port_value: 9901 } }");
    map.finish();
    let address_field = address?;
    let address = socket_address(&address_field, true)?;
    listening::warn_if_open(&address_field, address);
    Some((address_field, address))
}

/// Reports a `core.v3.SocketAddress` of another protocol than TCP.
fn expect_tcp(map: &Map<'_>) {
    if let Some(protocol) = map.get("protocol") {
        protocol.one_of(&[("TCP", ())]);
    }
}

/// Reads a `core.v3.Address`.
fn socket_address(field: &Field<'_>, port_zero: bool) -> Option<SocketAddr> {
    let map = field.map()?;
    map.refuse(
        &["pipe", "envoy_internal_address"],
        "Steer speaks TCP only",
        "use socket_address with an IP address and port_value",
    );
    let socket = map.require("socket_address", "{ address: 10.0.0.1, port_value: 3000 }");
    map.finish();
    let map = socket?.map()?;
    expect_tcp(&map);
    map.harmless(&["ipv4_compat"]);
    map.refuse(
        &["named_port", "resolver_name", "network_namespace_filepath"],
        "not supported",
        "use port_value with a number",
    );
    let text = map.require("address", "10.0.0.1").and_then(|text| Some((text.string()?, text)));
    let port = map.require("port_value", "3000");
    map.finish();
    let port = port.and_then(|port| port.unsigned(u64::from(!port_zero)..=65535));
    let (text, field) = text?;
    match text.parse::<IpAddr>() {
        Ok(ip) => Some(SocketAddr::new(ip, u16::try_from(port?).ok()?)),
        Err(_) => {
            field.error(
                format_args!("`{text}` is not an IP address"),
                "write the IP address; host names are not resolved yet",
            );
            None
        }
    }
}

/// Reads an `Any` or typed config of one of the types that `types` names, which stand for the end
/// of its `@type`.
fn typed<'t>(field: &Field<'t>, types: &[&'static str], hint: &str) -> Option<(&'static str, Map<'t>)> {
    let map = field.map()?;
    let kind = map.require("@type", "type.googleapis.com/...")?;
    let name = kind.string()?;
    let hit = types.iter().find(|known| name.rsplit(['.', '/']).next() == Some(known));
    if hit.is_none() {
        kind.error(format_args!("`{name}` is not supported"), hint);
    }
    Some((hit?, map))
}
