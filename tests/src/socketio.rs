//! What the programs of `tests/apps` say: JSON objects, one a line, with their kind in `event`.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::eventually::eventually;
use crate::process::Process;

/// The configuration of the case that Steer is for: one cluster of socket.io servers, by x-forwarded-for.
pub fn config(listen: SocketAddr, endpoints: &[SocketAddr]) -> String {
    // To YAML, a bracket at the start of an IPv6 address would begin a list.
    let quoted = |address: &SocketAddr| match address {
        SocketAddr::V4(address) => address.to_string(),
        SocketAddr::V6(address) => format!("\"{address}\""),
    };
    let listen = quoted(&listen);
    let endpoints: Vec<_> = endpoints.iter().map(quoted).collect();
    format!(
        "\
listeners:
- address: {listen}
  routes:
  - match: {{ prefix: / }}
    cluster: sio
    hash_policy:
    - header: {{ header_name: x-forwarded-for }}
    upgrade_configs: [websocket]
clusters:
- name: sio
  lb_policy: ring_hash
  endpoints: [{}]
",
        endpoints.join(", ")
    )
}

/// From start to the first word, and from the first client to the last.
const PATIENCE: Duration = Duration::from_secs(90);

/// The events of this kind in a program's standard output.
pub fn events(output: &str, kind: &str) -> Result<Vec<Value>> {
    let mut events = said(output)?;
    events.retain(|event| event["event"] == kind);
    Ok(events)
}

/// Waits until the program has said this, and fails if it ends first.
pub fn wait_for(kind: &str, program: &mut Process) -> Result<()> {
    eventually(&format!("word `{kind}`"), PATIENCE, || {
        // Asked first: what an ended program has said is complete then.
        let running = program.ensure_running();
        if !events(&program.stdout()?, kind)?.is_empty() {
            return Ok(Some(()));
        }
        running.map(|()| None)
    })
}

/// A string as itself, anything else as JSON.
pub fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn said(output: &str) -> Result<Vec<Value>> {
    // The last line may be half written.
    let whole = output.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let parse = |line: &str| serde_json::from_str(line).with_context(|| format!("this is no JSON: {line}"));
    whole.lines().map(parse).collect()
}
