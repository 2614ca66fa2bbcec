//! The benchmark behind `cargo xtask bench`: Steer on each of its paths beside a direct connection, HAProxy, nginx
//! and Envoy, under the same load, interleaved in one run.
//!
//! The runner lays out the network and starts the subjects; the load (`load`) and the endpoint (`serve`) are processes
//! of their own, started from this same binary inside their namespaces, so that their descriptors and their CPU time
//! are not the runner's.

mod lanes;
mod memory;
mod plan;
mod programs;
mod report;
mod results;
mod run;
mod spec;
mod subjects;

fn main() -> anyhow::Result<()> {
    anyhow::bail!("not there yet")
}
