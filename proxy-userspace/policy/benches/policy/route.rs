//! From a request head to a cluster and a key hash.

use divan::Bencher;
use http::request;
use steer_policy::config::{Config, parse};
use steer_policy::routing::{Connection, route};

use super::POLL;

const CONFIG: &str = include_str!("../../../../examples/socketio.yaml");

fn config() -> Config {
    parse(CONFIG, "examples/socketio.yaml").expect("an example is right").config
}

/// The head of [`POLL`] as hyper hands it over.
fn head() -> request::Parts {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut parsed = httparse::Request::new(&mut headers);
    parsed.parse(POLL).expect("the head is right");
    let mut builder = http::Request::builder();
    if let (Some(method), Some(target)) = (parsed.method, parsed.path) {
        builder = builder.method(method).uri(target);
    }
    for header in parsed.headers {
        builder = builder.header(header.name, header.value);
    }
    builder.body(()).expect("the head is right").into_parts().0
}

#[divan::bench]
fn poll(bencher: Bencher<'_, '_>) {
    let config = config();
    let connection = Connection {
        remote: ([198, 51, 100, 9], 40_000).into(),
        local: ([10, 0, 0, 9], 8080).into(),
        node: [10, 0, 0, 9].into(),
        interface_index: |_| None,
    };
    let head = head();
    bencher.with_inputs(|| head.clone()).bench_local_refs(|head| {
        let routed = route(&config.listeners[0], &connection, head).expect("the example routes everything");
        routed.hash
    });
}
