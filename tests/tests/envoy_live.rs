//! A real Envoy and Steer run with the same configuration (except for the ports on which they
//! listen) and the same backends. Each request must reach the same backend through both, and `steer
//! route` must name this backend.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rand::rngs::StdRng;
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use serde_json::{Value, json};
use steer_tests::peers::{Envoy, envoy_binary};
use steer_tests::steer::{Steer, binary, free_address, route};
use tokio::net::{TcpListener, TcpStream};

const REQUESTS: usize = 1000;
/// How many of the requests are sent a second time as WebSocket upgrades.
const UPGRADES: usize = 100;
const BACKENDS: usize = 12;
/// Printed when a test fails. `STEER_TESTS_SEED` sets another seed.
const SEED: u64 = 20_240_601;

#[test]
fn ring_hash_picks_as_envoy_does() {
    compare("lb_policy: RING_HASH", &[1; BACKENDS]);
}

#[test]
fn ring_hash_with_murmur_weights_and_sizes_picks_as_envoy_does() {
    let policy = "lb_policy: RING_HASH\n    ring_hash_lb_config: \
                  { hash_function: MURMUR_HASH_2, minimum_ring_size: 333, maximum_ring_size: 5000 }";
    compare(policy, &[3, 1, 7, 1, 1, 2, 9, 4, 1, 1, 5, 6]);
}

#[test]
fn maglev_picks_as_envoy_does() {
    compare("lb_policy: MAGLEV", &[2, 1, 1, 3, 1, 1, 1, 1, 5, 1, 1, 1]);
}

/// The parts of a request on which the choice may depend.
#[derive(Debug, Clone)]
struct Asked {
    path: String,
    headers: Vec<(&'static str, Vec<u8>)>,
}

fn compare(lb_policy: &str, weights: &[u32; BACKENDS]) {
    let Some(envoy_binary) = envoy_binary() else { return };
    let seed = std::env::var("STEER_TESTS_SEED").map_or(SEED, |seed| seed.parse().unwrap());
    eprintln!("STEER_TESTS_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let requests: Vec<_> = (0..REQUESTS).map(|i| asked(i, &mut random)).collect();

    let directory = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let backends = runtime.block_on(backends());
    let [envoy_address, envoy_admin, steer_address] = [(); 3].map(|()| free_address().unwrap());
    let config = |listener, admin| bootstrap(listener, admin, lb_policy, &backends, weights);
    let admin = free_address().unwrap();
    let steer = Steer::start(&config(steer_address, admin), None, &[]).unwrap();
    let envoy_config = config(envoy_address, envoy_admin);
    let _envoy = Envoy::start(&envoy_binary, directory.path(), &envoy_config, envoy_admin, None).unwrap();

    let foretold = foretold(steer.config(), &requests, &backends);
    let (by_envoy, by_steer) = runtime
        .block_on(async { (picks(envoy_address, &requests).await, picks(steer_address, &requests).await) });
    let differing: Vec<_> = (0..REQUESTS)
        .filter(|&i| by_envoy[i] != by_steer[i] || by_envoy[i] != foretold[i])
        .map(|i| {
            format!("{:?}: envoy {}, steer {}, route {}", requests[i], by_envoy[i], by_steer[i], foretold[i])
        })
        .collect();
    assert!(
        differing.is_empty(),
        "{} of {REQUESTS} differ, such as {:#?}",
        differing.len(),
        &differing[..differing.len().min(5)]
    );
    let reached = (0..BACKENDS).filter(|backend| by_envoy.contains(backend)).count();
    assert!(reached > BACKENDS / 2, "the requests reached only {reached} backends, which proves little");

    let upgrades = &requests[..UPGRADES];
    let (by_envoy, by_steer) = runtime.block_on(async {
        (upgraded(envoy_address, upgrades).await, upgraded(steer_address, upgrades).await)
    });
    assert_eq!(by_envoy, by_steer, "upgrades");
    assert_eq!(by_envoy, foretold[..UPGRADES], "an upgrade is routed differently from a plain request");
}

/// Makes a request of the kind that `i` selects, with a random key. Every request has a key,
/// because the choice without a key is random.
fn asked(i: usize, random: &mut StdRng) -> Asked {
    let word = |random: &mut StdRng| format!("{:x}", random.next_u64() >> random.random_range(0..60));
    let v4 = |random: &mut StdRng| std::net::Ipv4Addr::from_bits(random.next_u32()).to_string();
    let v6 = |random: &mut StdRng| {
        std::net::Ipv6Addr::from_bits(u128::from(random.next_u64()) << 64 | u128::from(random.next_u32()))
            .to_string()
    };
    let (path, headers) = match i % 10 {
        0 => ("/header".to_owned(), vec![("x-forwarded-for", v4(random))]),
        1 => ("/header".to_owned(), vec![("x-forwarded-for", v6(random))]),
        // A known header: Envoy joins its lines into one value.
        2 => (
            "/header".to_owned(),
            vec![
                ("x-forwarded-for", v4(random)),
                ("x-forwarded-for", format!("{}, {}", v6(random), v4(random))),
            ],
        ),
        // Any other header: Envoy sorts its values.
        3 => ("/lines".to_owned(), (0..3).map(|_| ("x-user", word(random))).collect()),
        4 => ("/lines".to_owned(), vec![("x-user", format!("  {} \t", word(random)))]),
        5 => (
            "/cookie".to_owned(),
            vec![("cookie", format!("a=b; sid={}; c", word(random))), ("cookie", "sid=later".to_owned())],
        ),
        6 => ("/cookie".to_owned(), vec![("cookie", format!("sid=\"{}\"", word(random)))]),
        7 => (format!("/query?x=1&room={}%20{}&room=2", word(random), word(random)), Vec::new()),
        8 => (
            "/address".to_owned(),
            vec![(
                "x-forwarded-for",
                format!("{}, {}", word(random), if random.random() { v4(random) } else { v6(random) }),
            )],
        ),
        _ => (
            format!("/several?room={}", word(random)),
            if random.random() {
                vec![("x-user", word(random)), ("cookie", format!("sid={}", word(random)))]
            } else {
                vec![("x-user", word(random))]
            },
        ),
    };
    let mut headers: Vec<_> = headers.into_iter().map(|(name, value)| (name, value.into_bytes())).collect();
    if i % 20 == 4 {
        // Bytes that are not valid text.
        headers[0].1 = (0..random.random_range(1..40)).map(|_| random.random_range(0x80..=0xff)).collect();
    }
    Asked { path, headers }
}

/// The backends that `steer route --batch` names, as numbers.
fn foretold(config: &Path, requests: &[Asked], backends: &[SocketAddr]) -> Vec<usize> {
    let json_header = |(name, value): &(&str, Vec<u8>)| match std::str::from_utf8(value) {
        Ok(text) => json!([name, text]),
        Err(_) => {
            json!([name, { "hex": value.iter().map(|byte| format!("{byte:02x}")).collect::<String>() }])
        }
    };
    let line = |asked: &Asked| {
        let headers: Vec<_> = asked.headers.iter().map(json_header).collect();
        json!({ "host": "t", "path": asked.path, "method": "GET", "headers": headers, "source": "127.0.0.1:1", "local": "127.0.0.1:2" })
    };
    let lines: Vec<_> = requests.iter().map(line).collect();
    let number = |answer: Value| {
        let endpoint = answer["endpoint"].as_str().unwrap_or_else(|| panic!("no endpoint: {answer}"));
        backends.iter().position(|address| address.to_string() == endpoint).unwrap()
    };
    route(&binary().unwrap(), config, &lines).unwrap().into_iter().map(number).collect()
}

fn request(asked: &Asked) -> http::request::Builder {
    let mut request = Request::get(&asked.path).header("host", "t");
    for (name, value) in &asked.headers {
        request = request.header(*name, HeaderValue::from_bytes(value).unwrap());
    }
    request
}

/// Sends all requests on one connection. Returns the backends that answered.
async fn picks(proxy: SocketAddr, requests: &[Asked]) -> Vec<usize> {
    let mut sender = connect(proxy).await;
    let mut picks = Vec::new();
    for asked in requests {
        sender.ready().await.unwrap();
        let response = sender.send_request(request(asked).body(Empty::new()).unwrap()).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK, "{asked:?}");
        picks.push(backend_of(&response));
    }
    picks
}

/// Sends each request as an upgrade on a new connection.
async fn upgraded(proxy: SocketAddr, requests: &[Asked]) -> Vec<usize> {
    let mut picks = Vec::new();
    for asked in requests {
        let upgrade = request(asked)
            .header("connection", "Upgrade")
            .header("upgrade", "websocket")
            .header("sec-websocket-version", "13")
            .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
        let mut sender = connect(proxy).await;
        let response = sender.send_request(upgrade.body(Empty::new()).unwrap()).await.unwrap();
        assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS, "{asked:?}");
        picks.push(backend_of(&response));
    }
    picks
}

async fn connect(proxy: SocketAddr) -> SendRequest<Empty<Bytes>> {
    let stream = TcpStream::connect(proxy).await.unwrap();
    let (sender, connection) = handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection.with_upgrades());
    sender
}

fn backend_of(response: &Response<Incoming>) -> usize {
    response.headers()["x-backend"].to_str().unwrap().parse().unwrap()
}

/// Servers on loopback that answer with their number, also when they accept an upgrade.
async fn backends() -> Vec<SocketAddr> {
    let mut addresses = Vec::new();
    for number in 0..BACKENDS {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        addresses.push(listener.local_addr().unwrap());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let answer =
                    service_fn(move |request| async move { Ok::<_, Infallible>(answer(number, &request)) });
                tokio::spawn(
                    server::Builder::new().serve_connection(TokioIo::new(stream), answer).with_upgrades(),
                );
            }
        });
    }
    addresses
}

fn answer(number: usize, request: &Request<Incoming>) -> Response<Empty<Bytes>> {
    let mut response = Response::builder().header("x-backend", number);
    if request.headers().contains_key("upgrade") {
        response = response.status(101).header("connection", "upgrade").header("upgrade", "websocket");
    }
    response.body(Empty::new()).unwrap()
}

fn bootstrap(
    listener: SocketAddr,
    admin: SocketAddr,
    lb_policy: &str,
    backends: &[SocketAddr],
    weights: &[u32],
) -> String {
    let socket = |address: SocketAddr| {
        format!("{{ socket_address: {{ address: {}, port_value: {} }} }}", address.ip(), address.port())
    };
    let policies = [
        ("/header", "[{ header: { header_name: x-forwarded-for } }]"),
        ("/lines", "[{ header: { header_name: X-User } }]"),
        ("/cookie", "[{ cookie: { name: sid } }]"),
        ("/query", "[{ query_parameter: { name: room } }]"),
        ("/address", "[{ connection_properties: { source_ip: true } }]"),
        (
            "/several",
            "[{ header: { header_name: x-user } }, { cookie: { name: sid } }, { query_parameter: { name: room } }]",
        ),
    ];
    let routes: String = policies
        .iter()
        .map(|(prefix, policy)| {
            format!(
                "
              - match: {{ prefix: {prefix} }}
                route:
                  cluster: c
                  hash_policy: {policy}
                  upgrade_configs: [{{ upgrade_type: websocket }}]"
            )
        })
        .collect();
    let endpoints: String = backends
        .iter()
        .zip(weights)
        .map(|(backend, weight)| {
            format!(
                "\n        - endpoint: {{ address: {} }}\n          load_balancing_weight: {weight}",
                socket(*backend)
            )
        })
        .collect();
    format!(
        "\
admin:
  address: {admin}
static_resources:
  listeners:
  - name: front
    address: {listener}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: front
          route_config:
            virtual_hosts:
            - name: all
              domains: ['*']
              routes:{routes}
          http_filters:
          - name: envoy.filters.http.router
            typed_config:
              \"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
  clusters:
  - name: c
    type: STATIC
    connect_timeout: 2s
    {lb_policy}
    load_assignment:
      cluster_name: c
      endpoints:
      - lb_endpoints:{endpoints}
",
        admin = socket(admin),
        listener = socket(listener),
    )
}
