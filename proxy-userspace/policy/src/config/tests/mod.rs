//! Tests over whole files, from text to [`Config`](super::Config) or messages.

mod formats;
mod http1;
mod malformed;
mod mutated;
mod spellings;

/// A short file that uses most of the native format.
const NATIVE: &str = "\
listeners:
- address: 0.0.0.0:8080
  routes:
  - match: { prefix: / }
    cluster: sio
    timeout: 5s
    hash_policy:
    - header: { header_name: x-forwarded-for }
    upgrade_configs: [websocket]
clusters:
- name: sio
  lb_policy: ring_hash
  ring_hash_lb_config: { minimum_ring_size: 1024 }
  endpoints: [10.0.0.1:3000, 10.0.0.2:3000]
admin: 127.0.0.1:9901
";
const ENVOY_V3: &str = include_str!("../../../../../examples/envoy-v3.yaml");
const ENVOY_V1: &str = include_str!("../../../../../examples/envoy-v1.json");
const EVERY_KEY: &str = include_str!("../../../../../examples/every-key.yaml");
