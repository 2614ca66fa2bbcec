//! The configurations of the proxies. Each has two workers, no logs, kept connections to the
//! endpoints, no time limit on streams, and a consistent hash of `x-forwarded-for` over the three
//! endpoints.

use std::path::Path;

use steer_tests::socketio;

use super::Kind;
use crate::lanes::Lane;

/// The configuration of the lane's subject. Its files may be in `directory`.
pub(crate) fn of(lane: &Lane, directory: &Path) -> String {
    match lane.kind {
        Kind::Direct => String::new(),
        Kind::SteerPacket | Kind::SteerSockmap | Kind::SteerRelay => steer(lane),
        Kind::Haproxy => haproxy(lane),
        Kind::Nginx => nginx(lane, directory),
        Kind::Envoy => envoy(lane),
    }
}

/// Steer has one worker for each processor. It makes no request ids, since the others do not make
/// them either.
fn steer(lane: &Lane) -> String {
    let config = socketio::config(lane.listen(), &lane.endpoints());
    config.replacen("  routes:\n", "  generate_request_id: false\n  routes:\n", 1)
}

/// Follows HAProxy's configuration manual: `option splice-auto` and `timeout tunnel` for tunnels,
/// `http-reuse always` for kept connections. Without `maxconn`, HAProxy takes as many connections
/// as its descriptors allow.
fn haproxy(lane: &Lane) -> String {
    let servers: String = (0..)
        .zip(lane.endpoints())
        .map(|(index, address): (u8, _)| format!("    server endpoint{index} {address}\n"))
        .collect();
    format!(
        "\
global
    nbthread 2

defaults
    mode http
    option splice-auto
    option http-keep-alive
    http-reuse always
    timeout connect 5s
    timeout client 1h
    timeout server 1h
    timeout tunnel 1h

frontend clients
    bind {listen} backlog 16384
    default_backend endpoints

backend endpoints
    balance hdr(x-forwarded-for)
    hash-type consistent
{servers}",
        listen = lane.listen()
    )
}

/// Follows nginx' pages on WebSocket proxying, `keepalive` and `reuseport`. The body buffer holds
/// the largest request of the benchmark, so that nginx writes no request to a file.
fn nginx(lane: &Lane, directory: &Path) -> String {
    let servers: String =
        lane.endpoints().iter().map(|address| format!("        server {address};\n")).collect();
    let directory = directory.display();
    format!(
        "\
daemon off;
user root;
worker_processes 2;
worker_rlimit_nofile 20000;
pid {directory}/nginx.pid;
error_log stderr crit;

events {{
    worker_connections 19000;
    multi_accept on;
}}

http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    client_body_buffer_size 64k;
    keepalive_timeout 1h;
    keepalive_requests 1000000000;

    map $http_upgrade $connection_upgrade {{
        default upgrade;
        ''      '';
    }}

    upstream endpoints {{
        hash $http_x_forwarded_for consistent;
{servers}        keepalive 128;
        keepalive_timeout 1h;
        keepalive_requests 1000000000;
    }}

    server {{
        listen {listen} reuseport backlog=16384;

        location / {{
            proxy_pass http://endpoints;
            proxy_http_version 1.1;
            proxy_set_header Host $host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
            proxy_read_timeout 1h;
            proxy_send_timeout 1h;
        }}
    }}
}}
",
        listen = lane.listen()
    )
}

/// Follows Envoy's pages on edge best practices, ring hash, upgrades and circuit breakers. The
/// headers, counters and limits that Envoy's router adds are off, since the others do not have them
/// either.
fn envoy(lane: &Lane) -> String {
    let address = |address: std::net::SocketAddr| {
        format!("{{ socket_address: {{ address: {}, port_value: {} }} }}", address.ip(), address.port())
    };
    let listen = address(lane.listen());
    let endpoints: String = lane
        .endpoints()
        .into_iter()
        .map(|endpoint| format!("        - endpoint: {{ address: {} }}\n", address(endpoint)))
        .collect();
    format!(
        "\
static_resources:
  listeners:
  - name: clients
    address: {listen}
    tcp_backlog_size: 16384
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: clients
          codec_type: HTTP1
          generate_request_id: false
          stream_idle_timeout: 0s
          common_http_protocol_options: {{ idle_timeout: 0s }}
          upgrade_configs: [{{ upgrade_type: websocket }}]
          http_filters:
          - name: envoy.filters.http.router
            typed_config:
              \"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
              dynamic_stats: false
              suppress_envoy_headers: true
          route_config:
            virtual_hosts:
            - name: all
              domains: [\"*\"]
              routes:
              - match: {{ prefix: / }}
                route:
                  cluster: endpoints
                  timeout: 0s
                  hash_policy: [{{ header: {{ header_name: x-forwarded-for }} }}]
  clusters:
  - name: endpoints
    type: STATIC
    connect_timeout: 5s
    lb_policy: RING_HASH
    circuit_breakers:
      thresholds:
      - max_connections: 1000000
        max_pending_requests: 1000000
        max_requests: 1000000
    load_assignment:
      cluster_name: endpoints
      endpoints:
      - lb_endpoints:
{endpoints}"
    )
}
