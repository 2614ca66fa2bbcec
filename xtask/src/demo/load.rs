//! What the streams cost Steer while their clients talk: sockets, processor time, and the packets
//! that the kernel forwards past it.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use steer_tests::eventually::eventually;
use steer_tests::process::Process;
use steer_tests::socketio::events;
use steer_tests::sockets::{self, State, Tuple};
use steer_tests::steer::Steer;
use steer_tests::topology::Topology;

/// Texts that each client has echoed.
pub(super) const MESSAGES: u64 = 1000;
const PATIENCE: Duration = Duration::from_secs(60);
/// Processor time that Steer may take for its own once-a-second housekeeping, and for the answers
/// to our questions.
const IDLE: Duration = Duration::from_millis(30);

/// The numbers of the streams at one moment.
#[derive(Debug, Clone, Copy)]
struct Look {
    /// In `/flows`, and those of them that are spliced by packets.
    streams: usize,
    spliced: usize,
    /// Sockets that the proxy's host has for the two connections of each stream.
    sockets: usize,
    /// Packets that the program has forwarded.
    forwarded: u64,
    cpu: Duration,
}

/// What the load has shown.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shown {
    /// Everything was as it should be.
    pub(super) good: bool,
    /// All streams are spliced by packets.
    pub(super) spliced: bool,
}

/// Lets all clients talk, and prints what this took of Steer. If the streams are spliced by
/// packets, that must be nothing.
pub(super) fn show(steer: &Steer<'_>, topology: &Topology, clients: &[Process]) -> Result<Shown> {
    let before = Look::take(steer, topology)?;
    let echoed = talk(clients)?;
    let after = Look::take(steer, topology)?;
    let cpu = after.cpu.saturating_sub(before.cpu);
    let forwarded = after.forwarded - before.forwarded;

    let spliced = after.spliced == after.streams;
    // A message takes at least one packet each way.
    let lines = [
        ("texts echoed meanwhile", echoed.to_string(), true),
        ("streams alive", after.streams.to_string(), after.streams == before.streams),
        ("sockets that the proxy has for them", after.sockets.to_string(), !spliced || after.sockets == 0),
        ("packets that the TC program forwarded", forwarded.to_string(), !spliced || forwarded >= 2 * echoed),
        (
            "processor time that steer took",
            format!("{:.1} ms", cpu.as_secs_f64() * 1e3),
            !spliced || cpu < IDLE,
        ),
    ];
    for (what, value, good) in &lines {
        println!("  {} {what:<38} {value:>9}", if *good { " " } else { "!" });
    }
    Ok(Shown { good: lines.iter().all(|(_, _, good)| *good), spliced })
}

/// Returns how many texts came back.
fn talk(clients: &[Process]) -> Result<u64> {
    for group in clients {
        group.signal(libc::SIGUSR2)?;
    }
    let mut echoed = 0;
    for group in clients {
        let report =
            eventually("end of the load", PATIENCE, || Ok(events(&group.stdout()?, "loaded")?.pop()))?;
        let errors = report["errors"].as_array().context("a report has no errors")?;
        anyhow::ensure!(errors.is_empty(), "under load: {errors:?}");
        echoed += report["echoed"].as_u64().context("a report has no count")?;
    }
    Ok(echoed)
}

impl Look {
    fn take(steer: &Steer<'_>, topology: &Topology) -> Result<Self> {
        let flows = steer.flows()?;
        let address =
            |value: &serde_json::Value| value.as_str().and_then(|text| text.parse::<SocketAddr>().ok());
        let clients: Vec<_> = flows.iter().filter_map(|flow| address(&flow["client"])).collect();
        let mut far = connected(topology.clients.run(sockets::tcp)??);
        far.retain(|tuple| clients.contains(&tuple.local));
        for endpoint in &topology.endpoints {
            far.extend(connected(endpoint.run(sockets::tcp)??));
        }
        let near = connected(topology.proxy.run(sockets::tcp)??);
        // The servers also have connections with Steer's pool, but Steer has sockets for these.
        far.retain(|far| !near.iter().any(|near| near.local == far.remote && near.remote == far.local));
        Ok(Self {
            streams: flows.len(),
            spliced: flows.iter().filter(|flow| flow["path"] == "packet").count(),
            sockets: (2 * flows.len()).saturating_sub(far.len()),
            forwarded: steer.metric("steer_packet_total", &[("what", "spliced")])? as u64,
            cpu: cpu_time(steer.pid())?,
        })
    }
}

fn connected(mut tuples: Vec<Tuple>) -> Vec<Tuple> {
    tuples.retain(|tuple| tuple.state == State::Connection);
    tuples
}

/// Processor time of all threads of a process, in user and kernel mode.
fn cpu_time(pid: u32) -> Result<Duration> {
    let pid = libc::pid_t::try_from(pid).context("a process id is too large")?;
    let (mut clock, mut time) = (0, libc::timespec { tv_sec: 0, tv_nsec: 0 });
    // SAFETY: it writes one clock id, which lives until the call returns.
    let error = unsafe { libc::clock_getcpuclockid(pid, &mut clock) };
    anyhow::ensure!(error == 0, "no processor clock of {pid}: {}", io::Error::from_raw_os_error(error));
    // SAFETY: it writes one timespec, which lives until the call returns.
    let result = unsafe { libc::clock_gettime(clock, &mut time) };
    anyhow::ensure!(result == 0, "cannot read the processor clock of {pid}: {}", io::Error::last_os_error());
    Ok(Duration::new(time.tv_sec.try_into()?, time.tv_nsec.try_into()?))
}
