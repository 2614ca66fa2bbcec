//! The benchmark behind `cargo xtask bench`: Steer on each of its paths beside a direct connection, HAProxy, nginx
//! and Envoy, under the same load, interleaved in one run.
//!
//! The runner lays out the network and starts the subjects; the load (`load`) and the endpoint (`serve`) are processes
//! of their own, started from this same binary inside their namespaces, so that their descriptors and their CPU time
//! are not the runner's.

mod head;
mod link;
mod load;
mod machine;
mod results;
mod serve;
mod spec;
mod ws;

use anyhow::{Context as _, Result};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (command, rest) = arguments.split_first().context("nothing to do")?;
    match command.as_str() {
        "load" => {
            let load = serde_json::from_str(rest.first().context("load wants a JSON")?)?;
            println!("{}", serde_json::to_string(&load::run(&load)?)?);
            Ok(())
        }
        "serve" => {
            let ports = rest.iter().map(|port| Ok(port.parse()?)).collect::<Result<Vec<u16>>>()?;
            serve::run(&ports)
        }
        other => anyhow::bail!("there is no command {other}"),
    }
}
