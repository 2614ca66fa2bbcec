//! The configuration that `steer run --listen ADDR --backend ADDR... --hash SOURCE` stands for.

use std::net::SocketAddr;

use super::{
    Cluster, Config, Endpoint, HashPolicy, HashSource, Health, HttpOptions, LbPolicy, Listener, PathMatch,
    Route, VirtualHost, load_balancing, native,
};

/// Of the one cluster.
const NAME: &str = "backends";

/// One listener, one route that allows websocket, one ring over `backends`; the rest is the native
/// format's default. Ports and the number of backends are for the caller to check.
pub fn from_flags(listen: SocketAddr, backends: &[SocketAddr], hash: HashSource) -> Config {
    let endpoint = |address: &SocketAddr| Endpoint {
        address: *address,
        weight: 1,
        hash_key: load_balancing::address_text(*address),
        health: Health::Healthy,
    };
    let route = Route {
        path: PathMatch::Prefix("/".to_owned()),
        cluster: NAME.to_owned(),
        timeout: None,
        idle_timeout: None,
        upgrade_websocket: Some(true),
        hash_policy: vec![HashPolicy { source: hash, terminal: false }],
    };
    let listener = Listener {
        name: "listener_0".to_owned(),
        address: listen,
        options: HttpOptions::default(),
        virtual_hosts: vec![VirtualHost {
            name: native::ONLY_VIRTUAL_HOST.to_owned(),
            domains: vec!["*".to_owned()],
            routes: vec![route],
        }],
    };
    let cluster = Cluster {
        name: NAME.to_owned(),
        lb_policy: LbPolicy::RING_HASH,
        connect_timeout: native::DEFAULT_CONNECT_TIMEOUT,
        endpoints: backends.iter().map(endpoint).collect(),
        healthy_panic_threshold: native::DEFAULT_PANIC_THRESHOLD,
        source_addresses: Vec::new(),
    };
    Config::new(vec![listener], vec![cluster], Some(native::DEFAULT_ADMIN))
}
