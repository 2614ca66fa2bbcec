//! The output of the programs of `tests/apps`: one JSON object on each line. Its field `event` is
//! the kind.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::eventually::eventually;
use crate::process::Process;

/// The configuration of Steer's main use: one cluster of socket.io servers, hashed by
/// x-forwarded-for.
pub fn config(listen: SocketAddr, endpoints: &[SocketAddr]) -> String {
    // YAML reads a bracket at the start of an IPv6 address as the start of a list.
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

/// The longest time from the start to the first event, and from the first client to the last.
const PATIENCE: Duration = Duration::from_secs(90);

/// The events of this kind in a program's standard output.
pub fn events(output: &str, kind: &str) -> Result<Vec<Value>> {
    let mut events = said(output)?;
    events.retain(|event| event["event"] == kind);
    Ok(events)
}

/// Waits until the program has printed an event of this kind. Fails if the program ends before.
pub fn wait_for(kind: &str, program: &mut Process) -> Result<()> {
    eventually(&format!("word `{kind}`"), PATIENCE, || {
        // Checks whether the program runs before it reads the output. So the output of an ended
        // program is complete.
        let running = program.ensure_running();
        if !events(&program.stdout()?, kind)?.is_empty() {
            return Ok(Some(()));
        }
        running.map(|()| None)
    })
}

/// A JSON string without its quotes, anything else as JSON.
pub fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn said(output: &str) -> Result<Vec<Value>> {
    // The last line may be incomplete.
    let whole = output.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let parse =
        |line: &str| serde_json::from_str(line).with_context(|| format!("this line is not JSON: {line}"));
    whole.lines().map(parse).collect()
}
