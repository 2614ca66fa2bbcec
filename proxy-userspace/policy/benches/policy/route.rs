//! From a request head to a cluster and a key hash.

use divan::Bencher;
use steer_policy::config::{Config, parse};
use steer_policy::http1::request::RequestHead;
use steer_policy::routing::{Connection, route};

use super::POLL;

const CONFIG: &str = include_str!("../../../../examples/socketio.yaml");

fn config() -> Config {
    parse(CONFIG, "examples/socketio.yaml").expect("an example is right").config
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
    let head = RequestHead::parse(POLL).expect("the head is right");
    bencher.bench_local(|| {
        let mut head = head.clone();
        let routed = route(&config.listeners[0], &connection, &mut head);
        routed.expect("the example routes everything").hash
    });
}
