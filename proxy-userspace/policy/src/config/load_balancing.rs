//! Rings, tables and endpoints: the checks that all formats share, and the two `*_lb_config` maps,
//! which the native format and Envoy v3 write alike.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use super::protobuf_json::EXTENSION_HASH_FUNCTION;
use super::reader::{Field, Map};
use super::{Endpoint, HashFunction, Health, LbPolicy};

const HASH_FUNCTIONS: [(&str, HashFunction); 3] = [
    ("xx_hash", HashFunction::XxHash),
    ("murmur_hash_2", HashFunction::MurmurHash2),
    ("default_hash", HashFunction::XxHash),
];

/// Envoy's words; `HEALTHY` and `UNKNOWN` are the same without active checks.
pub(super) const HEALTH: [(&str, Health); 6] = [
    ("HEALTHY", Health::Healthy),
    ("UNHEALTHY", Health::Unhealthy),
    ("DRAINING", Health::Draining),
    ("DEGRADED", Health::Degraded),
    ("TIMEOUT", Health::Unhealthy),
    ("UNKNOWN", Health::Healthy),
];

/// Reads the keys of `ring_hash_lb_config`. Does not finish `map`.
pub(super) fn ring_hash(map: &Map<'_>) -> LbPolicy {
    let is_extension = map.field.peek("@type").is_some();
    let hash_function = map.get("hash_function").and_then(|word| {
        let word = if is_extension { word.named(EXTENSION_HASH_FUNCTION) } else { word };
        word.one_of_any_case(&HASH_FUNCTIONS)
    });
    let minimum = map.get("minimum_ring_size");
    let maximum = map.get("maximum_ring_size");
    ring(hash_function.unwrap_or_default(), minimum.as_ref(), maximum.as_ref(), &map.field)
}

pub(super) fn ring(
    hash_function: HashFunction,
    minimum: Option<&Field<'_>>,
    maximum: Option<&Field<'_>>,
    config: &Field<'_>,
) -> LbPolicy {
    let limit = LbPolicy::DEFAULT_MAXIMUM_RING_SIZE;
    let minimum_ring_size = minimum.and_then(|size| size.unsigned(0..=limit));
    let minimum_ring_size = minimum_ring_size.unwrap_or(LbPolicy::DEFAULT_MINIMUM_RING_SIZE);
    let maximum_ring_size = maximum.and_then(|size| size.unsigned(1..=limit)).unwrap_or(limit);
    if minimum_ring_size > maximum_ring_size {
        let place = maximum.or(minimum).unwrap_or(config);
        place.error(
            format_args!(
                "maximum_ring_size {maximum_ring_size} is less than minimum_ring_size {minimum_ring_size}{}",
                if minimum.is_none() { " (the default)" } else { "" }
            ),
            "set minimum_ring_size to at most maximum_ring_size",
        );
    }
    if let (0, Some(minimum)) = (minimum_ring_size, minimum) {
        minimum.warn("a ring of size 0 is empty: every request is answered with 503");
    }
    LbPolicy::RingHash { hash_function, minimum_ring_size, maximum_ring_size }
}

/// Reads the key of `maglev_lb_config`. Does not finish `map`.
pub(super) fn maglev(map: &Map<'_>) -> LbPolicy {
    let size = map.get("table_size");
    let table_size = size.as_ref().and_then(|size| size.unsigned(2..=LbPolicy::MAXIMUM_TABLE_SIZE));
    let table_size = table_size.unwrap_or(LbPolicy::DEFAULT_TABLE_SIZE);
    if let Some(size) = size
        && !is_prime(table_size)
    {
        let next = (table_size..=LbPolicy::MAXIMUM_TABLE_SIZE).find(|n| is_prime(*n));
        size.error(
            format_args!("table_size must be a prime number, {table_size} is none"),
            format!("the next prime is {}", next.unwrap_or(LbPolicy::MAXIMUM_TABLE_SIZE)),
        );
    }
    LbPolicy::Maglev { table_size }
}

fn is_prime(n: u64) -> bool {
    n >= 2 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
}

/// What all formats demand of a cluster's endpoints.
pub(super) fn check_endpoints(list: &Field<'_>, endpoints: &[Endpoint]) {
    if endpoints.is_empty() {
        list.warn("no endpoints: every request to this cluster is answered with 503");
    }
    let sum: u64 = endpoints.iter().map(|endpoint| u64::from(endpoint.weight)).sum();
    if sum > u64::from(u32::MAX) {
        list.error(
            format_args!("the weights add up to {sum}, more than {}", u32::MAX),
            "divide all weights by the same number",
        );
    }
    let mut keys = HashMap::new();
    for endpoint in endpoints {
        let first = *keys.entry(&endpoint.hash_key).or_insert(endpoint.address);
        if first != endpoint.address {
            list.warn(format_args!(
                "{first} and {} share the hash key `{}`, so they share their places on the ring",
                endpoint.address, endpoint.hash_key
            ));
        }
    }
}

/// The text by which Envoy names an address, and hashes it.
pub(super) fn address_text(address: SocketAddr) -> String {
    match address.ip() {
        IpAddr::V6(ip) => match ip.segments() {
            // inet_ntop writes such addresses with a dotted tail; Rust does not.
            [0, 0, 0, 0, 0, 0, high, _] if high != 0 => {
                let [.., a, b, c, d] = ip.octets();
                format!("[::{a}.{b}.{c}.{d}]:{}", address.port())
            }
            _ => address.to_string(),
        },
        IpAddr::V4(_) => address.to_string(),
    }
}

/// `ip:port`, which is the only form: names are not resolved.
pub(super) fn socket_address(field: &Field<'_>, text: &str, port_zero: bool) -> Option<SocketAddr> {
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() == 0 && !port_zero => {
            field.error(format_args!("`{text}` has no port"), "write ip:port with a port from 1 to 65535");
            None
        }
        Ok(address) => Some(address),
        Err(_) => {
            field.error(
                format_args!("`{text}` is not an address"),
                "write ip:port, such as 10.0.0.1:3000 or [fd00::1]:3000; host names are not resolved",
            );
            None
        }
    }
}
