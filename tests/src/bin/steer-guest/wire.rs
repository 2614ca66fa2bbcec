//! Steer in a machine's own network namespace, on a network card with queues and offloads. The
//! clients are on the host.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::json;
use steer_tests::eventually::eventually;
use steer_tests::kernels::STREAMS;
use steer_tests::netns::{self, NetNs};
use steer_tests::streams;

use crate::Report;
use crate::kernel;
use crate::phases::Bed;

/// The card, and the device that leads to the endpoint on this machine.
const DEVICES: [&str; 2] = ["eth0", "behind"];
/// How long the host may take to open its streams, and to close them.
const PATIENCE: Duration = Duration::from_secs(180);

/// Carries the streams that the host opens, until the host has closed all of them.
pub(crate) fn carry(report: &mut Report) -> Result<()> {
    netns::ip(&["address", "add", "10.77.0.2/24", "dev", "eth0"])?;
    netns::ip(&["link", "set", "eth0", "up"])?;
    let behind = NetNs::new("steer-t", "behind")?;
    netns::ip(&["link", "add", "behind", "type", "veth", "peer", "name", "eth0", "netns", behind.name()])?;
    netns::ip(&["address", "add", "10.78.0.1/24", "dev", "behind"])?;
    netns::ip(&["link", "set", "behind", "up"])?;
    behind.ip(&["address", "add", "10.78.0.2/24", "dev", "eth0"])?;
    behind.ip(&["link", "set", "eth0", "up"])?;
    let address =
        |text: &str| text.parse::<SocketAddr>().with_context(|| format!("{text} is not an address"));
    // The second endpoint is on the host, as the clients are.
    let endpoints = vec![address("10.78.0.2:3000")?, address("10.77.0.1:3000")?];
    streams::serve(&behind, endpoints[0])?;
    let queues = std::fs::read_dir("/sys/class/net/eth0/queues").context("eth0 has no queues")?.count();

    let front = address("10.77.0.2:8080")?;
    let mut bed = Bed::start_in(report, (None, &DEVICES), ["wire", "auto"], front, endpoints)?;
    bed.say("ready", json!({ "queues": queues }))?;
    let streams = usize::try_from(STREAMS).context("a number of streams")?;
    eventually("streams of the host", PATIENCE, || Ok((bed.steer.flows()?.len() == streams).then_some(())))?;
    bed.say_opened("opened", streams, &[])?;
    eventually("end of the host's streams", PATIENCE, || Ok(bed.steer.flows()?.is_empty().then_some(())))?;
    let count = |what: &str| bed.steer.metric("steer_packet_total", &[("what", what)]);
    let counted = json!({
        "spliced": count("spliced")?,
        "dropped": count("drop_rewrite")?,
        "bad_checksums": kernel::tcp_counter("InCsumErrors")?,
    });
    bed.say("counted", counted)?;
    bed.end()?;
    report.say("log", json!({ "complaints": kernel::complaints()? }))
}
