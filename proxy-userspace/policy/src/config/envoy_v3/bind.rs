//! A cluster's `upstream_bind_config`: the addresses that connections come from.

use std::net::IpAddr;

use super::super::packet_splice::source_address;
use super::super::reader::Field;
use super::expect_tcp;

/// `source_address` first, then the extra ones. Envoy takes one of each family; Steer uses them
/// all.
pub(super) fn source_addresses(field: &Field<'_>) -> Option<Vec<IpAddr>> {
    let map = field.map()?;
    let first = map.get("source_address");
    let items = |name| map.get(name).map(|list| list.items()).unwrap_or_default();
    let (extra, additional) = (items("extra_source_addresses"), items("additional_source_addresses"));
    if let Some(freebind) = map.get("freebind").filter(|freebind| freebind.boolean() == Some(true)) {
        freebind.warn("not honoured: the address must be this host's");
    }
    map.warn(&["socket_options"], "not honoured: Steer has its own socket options");
    map.refuse(&["local_address_selector"], "Steer uses its source addresses in turn", "remove it");
    map.finish();
    let extra = extra.iter().filter_map(|item| {
        let map = item.map()?;
        map.warn(&["socket_options"], "not honoured: Steer has its own socket options");
        let address = map.require("address", "{ address: 10.0.0.5, port_value: 0 }");
        map.finish();
        address
    });
    let all: Vec<_> = first.into_iter().chain(extra).chain(additional).collect();
    let mut addresses = Vec::new();
    for address in all.iter().filter_map(socket_address) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    Some(addresses)
}

/// A `core.v3.SocketAddress` without a port.
fn socket_address(field: &Field<'_>) -> Option<IpAddr> {
    let map = field.map()?;
    expect_tcp(&map);
    map.harmless(&["ipv4_compat"]);
    let hint = "use port_value: 0";
    map.refuse(&["named_port", "resolver_name", "network_namespace_filepath"], "not supported", hint);
    if let Some(port) =
        map.get("port_value").filter(|port| port.unsigned(0..=65535).is_some_and(|port| port > 0))
    {
        port.error("Steer chooses the ports of its connections itself", hint);
    }
    let address = map.require("address", "10.0.0.5");
    map.finish();
    let address = address?;
    match address.string()? {
        "0.0.0.0" | "::" => None,
        text => source_address(&address, text),
    }
}
