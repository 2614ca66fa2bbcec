//! The native format: Envoy v3's names, with short values where Envoy's are long.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use super::reader::{Field, Map};
use super::{
    Cluster, Config, Endpoint, HttpOptions, LbPolicy, Listener, PathMatch, Route, SpliceMode, VirtualHost,
    hash_policy, instance, listening, load_balancing, packet_splice,
};

pub const DEFAULT_ADMIN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9901);
pub(super) const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
pub(super) const DEFAULT_PANIC_THRESHOLD: f64 = 50.0;
/// The virtual host that `routes` directly under a listener stands for.
pub(super) const ONLY_VIRTUAL_HOST: &str = "default";
pub(super) const DEFAULT_DRAIN_TIMEOUT: Duration = Duration::from_secs(600);

pub(super) fn read(root: &Field<'_>) -> Option<Config> {
    let map = root.map()?;
    let clusters = map.require("clusters", "[...]").map(|list| list.items()).unwrap_or_default();
    let names = listening::cluster_names(&clusters);
    listening::unique(clusters.iter().filter_map(|cluster| cluster.peek("name")), "cluster");
    let listeners = map.require("listeners", "[...]");
    if let Some(list) = &listeners
        && list.items().is_empty()
    {
        list.error("must have at least one listener", "add `- address: 0.0.0.0:8080` with its routes");
    }
    let listeners = listeners.map(|list| list.items()).unwrap_or_default();
    listening::unique_listener_names(&listeners);
    let admin = map.get("admin");
    let splice = map
        .get("splice")
        .and_then(|mode| mode.one_of_any_case(&SpliceMode::ALL.map(|mode| (mode.as_str(), mode))))
        .unwrap_or_default();
    let packet_splice = map.get("packet_splice").and_then(|field| packet_splice::read(&field));
    let instance = map.get("instance").and_then(|field| instance::read(&field));
    let drain_timeout = map.get("drain_timeout").and_then(|field| field.duration());
    map.finish();

    let mut servers = Vec::new();
    let admin_address = match &admin {
        None => Some(DEFAULT_ADMIN),
        Some(field) if field.scalar().is_some_and(|(text, _)| text == "off") => None,
        Some(field) => field.string().and_then(|text| load_balancing::socket_address(field, text, true)),
    };
    if let (Some(field), Some(address)) = (admin, admin_address) {
        listening::warn_if_open(&field, address);
        servers.push((field, address));
    }
    let clusters = clusters.iter().filter_map(cluster).collect();
    let listeners: Vec<_> = listeners
        .iter()
        .enumerate()
        .filter_map(|(index, field)| {
            let listener = listener(field, index, &names)?;
            servers.push((field.peek("address")?, listener.address));
            Some(listener)
        })
        .collect();
    listening::unique_addresses(&servers);
    Some(Config {
        listeners,
        clusters,
        admin: admin_address,
        splice,
        packet_splice: packet_splice.unwrap_or_default(),
        instance: instance.unwrap_or_default(),
        drain_timeout: drain_timeout.unwrap_or(DEFAULT_DRAIN_TIMEOUT),
        warnings: Vec::new(),
    })
}

fn listener(field: &Field<'_>, index: usize, clusters: &[&str]) -> Option<Listener> {
    let map = field.map()?;
    let name = map.get("name").and_then(|name| name.not_empty());
    let address = map.require("address", "0.0.0.0:8080");
    let address = address.and_then(|field| load_balancing::socket_address(&field, field.string()?, true));
    let options = http_options(&map);
    let routes = map.get("routes");
    let virtual_hosts = map.get("virtual_hosts");
    map.finish();
    let virtual_hosts = match (routes, virtual_hosts) {
        (Some(list), None) => vec![VirtualHost {
            name: ONLY_VIRTUAL_HOST.to_owned(),
            domains: vec!["*".to_owned()],
            routes: routes_of(&list, clusters, &options),
        }],
        (None, Some(list)) => {
            let mut seen = HashMap::new();
            let read = |(index, item)| virtual_host(item, index, clusters, &options, &mut seen);
            listening::virtual_hosts(&list).iter().enumerate().filter_map(read).collect()
        }
        (Some(_), Some(list)) => {
            list.error(
                "stands beside `routes`",
                "move the routes into a virtual host with `domains: [\"*\"]`",
            );
            Vec::new()
        }
        (None, None) => {
            field.error("`routes` is missing", "add `routes: [{ cluster: NAME, hash_policy: [...] }]`");
            Vec::new()
        }
    };
    let name = listening::listener_name(name, index);
    Some(Listener { name, address: address?, options, virtual_hosts })
}

fn http_options(map: &Map<'_>) -> HttpOptions {
    let default = HttpOptions::default();
    let limit = |name, default| map.get(name).and_then(|field| field.limit()).unwrap_or(default);
    let yes = |name, default| map.boolean(name).unwrap_or(default);
    let text = |name| map.get(name).and_then(|field| field.header_text()).map(str::to_owned);
    HttpOptions {
        use_remote_address: yes("use_remote_address", default.use_remote_address),
        xff_num_trusted_hops: trusted_hops(map),
        skip_xff_append: yes("skip_xff_append", default.skip_xff_append),
        via: text("via"),
        server_name: text("server_name").unwrap_or(default.server_name),
        generate_request_id: yes("generate_request_id", default.generate_request_id),
        preserve_external_request_id: yes(
            "preserve_external_request_id",
            default.preserve_external_request_id,
        ),
        preserve_case: map
            .get("header_key_format")
            .and_then(|format| format.one_of_any_case(&[("lower_case", false), ("preserve_case", true)]))
            .unwrap_or(default.preserve_case),
        accept_http_10: yes("accept_http_10", default.accept_http_10),
        upgrade_websocket: map.get("upgrade_configs").is_some_and(|list| upgrades(&list)),
        max_request_headers_bytes: max_request_headers_bytes(map),
        max_request_headers_count: max_headers_count(map),
        request_headers_timeout: limit("request_headers_timeout", default.request_headers_timeout),
        idle_timeout: limit("idle_timeout", default.idle_timeout),
        stream_idle_timeout: limit("stream_idle_timeout", default.stream_idle_timeout),
    }
}

pub(super) fn trusted_hops(map: &Map<'_>) -> u32 {
    let hops = map.get("xff_num_trusted_hops").and_then(|hops| hops.unsigned(0..=u64::from(u32::MAX)));
    hops.and_then(|hops| u32::try_from(hops).ok()).unwrap_or_default()
}

pub(super) fn max_request_headers_bytes(map: &Map<'_>) -> usize {
    let kilobytes = map.get("max_request_headers_kb").and_then(|size| size.unsigned(1..=8192));
    let bytes = kilobytes.and_then(|kilobytes| usize::try_from(kilobytes * 1024).ok());
    bytes.unwrap_or(HttpOptions::default().max_request_headers_bytes)
}

pub(super) fn max_headers_count(map: &Map<'_>) -> usize {
    let count = map.get("max_headers_count").and_then(|count| count.unsigned(1..=u64::from(u32::MAX)));
    let count = count.and_then(|count| usize::try_from(count).ok());
    count.unwrap_or(HttpOptions::default().max_request_headers_count)
}

/// `[websocket]` or `[]`.
fn upgrades(list: &Field<'_>) -> bool {
    let items = list.items();
    for item in &items {
        item.one_of_any_case(&[("websocket", ())]);
    }
    !items.is_empty()
}

fn virtual_host(
    field: &Field<'_>,
    index: usize,
    clusters: &[&str],
    options: &HttpOptions,
    seen: &mut HashMap<String, usize>,
) -> Option<VirtualHost> {
    let map = field.map()?;
    let name = map.get("name").and_then(|name| name.string()).map(str::to_owned);
    let domains = map.require("domains", "[\"*\"]").map(|list| listening::domains(&list, seen));
    let routes = map.require("routes", "[{ cluster: NAME }]").map(|list| routes_of(&list, clusters, options));
    map.finish();
    let name = name.unwrap_or_else(|| format!("virtual_host_{index}"));
    Some(VirtualHost { name, domains: domains?, routes: routes? })
}

fn routes_of(list: &Field<'_>, clusters: &[&str], options: &HttpOptions) -> Vec<Route> {
    let items = list.items();
    if items.is_empty() {
        list.warn("no routes: every request is answered with 404");
    }
    items.iter().filter_map(|item| route(item, clusters, options)).collect()
}

fn route(field: &Field<'_>, clusters: &[&str], options: &HttpOptions) -> Option<Route> {
    let map = field.map()?;
    let path = map.get("match").and_then(|field| path_match(&field));
    let cluster = map.require("cluster", clusters.first().unwrap_or(&"NAME"));
    let cluster = cluster.and_then(|name| listening::known_cluster(&name, clusters));
    let timeout = map.get("timeout").and_then(|field| field.limit()).unwrap_or_default();
    let idle_timeout = map.get("idle_timeout").and_then(|field| field.limit());
    let upgrade_websocket = map.get("upgrade_configs").map(|list| upgrades(&list));
    let hash_policy = map.get("hash_policy").map(|list| hash_policy::read(&list, true)).unwrap_or_default();
    map.finish();
    let path = path.unwrap_or_else(|| PathMatch::Prefix("/".to_owned()));
    let route = Route { path, cluster: cluster?, timeout, idle_timeout, upgrade_websocket, hash_policy };
    listening::warn_if_not_sticky(field, &route, options);
    Some(route)
}

fn path_match(field: &Field<'_>) -> Option<PathMatch> {
    let map = field.map()?;
    let found = (map.get("prefix"), map.get("path"));
    map.finish();
    listening::path_match(field, found, "write `match: { prefix: / }`")
}

fn cluster(field: &Field<'_>) -> Option<Cluster> {
    let map = field.map()?;
    let name = map.require("name", "sio").and_then(|name| name.not_empty());
    let policy = map.require("lb_policy", "ring_hash");
    let maglev = policy.and_then(|word| word.one_of_any_case(&[("ring_hash", false), ("maglev", true)]));
    let ring_config = map.get("ring_hash_lb_config").and_then(|field| field.map());
    let maglev_config = map.get("maglev_lb_config").and_then(|field| field.map());
    let (used, unused) =
        if maglev == Some(true) { (maglev_config, ring_config) } else { (ring_config, maglev_config) };
    if let Some(unused) = unused {
        unused.field.error("is not the one that lb_policy names", "remove it, or change lb_policy");
    }
    let lb_policy = match (used, maglev) {
        (Some(used), Some(is_maglev)) => {
            let read =
                if is_maglev { load_balancing::maglev(&used) } else { load_balancing::ring_hash(&used) };
            used.finish();
            read
        }
        (_, Some(true)) => LbPolicy::Maglev { table_size: LbPolicy::DEFAULT_TABLE_SIZE },
        (_, _) => LbPolicy::RING_HASH,
    };
    let connect_timeout = map.get("connect_timeout").and_then(|field| connect_timeout(&field));
    let threshold = map.get("healthy_panic_threshold").and_then(|field| field.percent());
    let by_hostname = map.boolean("use_hostname_for_hashing").unwrap_or(false);
    let list = map.require("endpoints", "[10.0.0.1:3000, 10.0.0.2:3000]");
    let sources = map.get("source_addresses");
    map.finish();
    let list = list?;
    let endpoints: Vec<_> = list.items().iter().filter_map(|item| endpoint(item, by_hostname)).collect();
    load_balancing::check_endpoints(&list, &endpoints);
    let source_addresses =
        sources.map(|list| packet_splice::source_addresses(&list, &endpoints)).unwrap_or_default();
    Some(Cluster {
        name: name?.to_owned(),
        lb_policy,
        connect_timeout: connect_timeout.unwrap_or(DEFAULT_CONNECT_TIMEOUT),
        endpoints,
        healthy_panic_threshold: threshold.unwrap_or(DEFAULT_PANIC_THRESHOLD),
        source_addresses,
    })
}

/// Greater than zero, as Envoy demands.
pub(super) fn connect_timeout(field: &Field<'_>) -> Option<Duration> {
    let timeout = field.duration()?;
    if timeout.is_zero() {
        field.error("must be more than 0", "write a duration such as 5s");
        return None;
    }
    Some(timeout)
}

fn endpoint(field: &Field<'_>, by_hostname: bool) -> Option<Endpoint> {
    if !field.is_map() {
        let address = load_balancing::socket_address(field, field.string()?, false)?;
        if by_hostname {
            field.error("has no hostname to hash by", "write `{ address: ip:port, hostname: NAME }`");
        }
        return Some(Endpoint {
            address,
            weight: 1,
            hash_key: load_balancing::address_text(address),
            health: Default::default(),
        });
    }
    let map = field.map()?;
    let address = map.require("address", "10.0.0.1:3000");
    let address = address.and_then(|field| load_balancing::socket_address(&field, field.string()?, false));
    let weight = map.get("weight").and_then(|weight| weight.unsigned(1..=u64::from(u32::MAX)));
    let hash_key = map.get("hash_key").and_then(|key| key.not_empty()).map(str::to_owned);
    let hostname = map.get("hostname").and_then(|name| name.not_empty()).map(str::to_owned);
    let health = map.get("health_status").and_then(|word| word.one_of_any_case(&load_balancing::HEALTH));
    map.finish();
    if by_hostname && hash_key.is_none() && hostname.is_none() {
        field.error("has no hostname to hash by", "add `hostname: NAME`");
    }
    let address = address?;
    let hostname = hostname.filter(|_| by_hostname);
    Some(Endpoint {
        address,
        weight: weight.and_then(|weight| u32::try_from(weight).ok()).unwrap_or(1),
        hash_key: hash_key.or(hostname).unwrap_or_else(|| load_balancing::address_text(address)),
        health: health.unwrap_or_default(),
    })
}
