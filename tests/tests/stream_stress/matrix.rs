//! Hand-overs in full flow between peers with different settings, with and without faults on the
//! path.

use std::time::Duration;

use anyhow::{Context as _, Result};
use steer_tests::counters::Counters;
use steer_tests::faults::{Faults, Rates};
use steer_tests::netns::NetNs;
use steer_tests::topology::Topology;

use crate::bed::{Bed, Family, Round};
use crate::load::{Load, Outcome};
use crate::plan::Kind;

/// The settings of the peers' kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Options {
    Default,
    ClientWithoutSack,
    EndpointWithoutSack,
    NobodyHasTimestamps,
    ClientWithoutScaling,
    EndpointWithoutScaling,
    ClientAsksForEcn,
    /// Steer makes the endpoint agree.
    ClientWithoutTimestamps,
    /// Steer makes the client agree, as soon as streams have shown what the endpoint does not have.
    EndpointWithoutTimestamps,
}

impl Options {
    const ALL: [Self; 9] = [
        Self::Default,
        Self::ClientWithoutSack,
        Self::EndpointWithoutSack,
        Self::NobodyHasTimestamps,
        Self::ClientWithoutScaling,
        Self::EndpointWithoutScaling,
        Self::ClientAsksForEcn,
        Self::ClientWithoutTimestamps,
        Self::EndpointWithoutTimestamps,
    ];

    /// Settings at the client and at the endpoint.
    fn settings(self) -> (&'static [&'static str], &'static [&'static str]) {
        match self {
            Self::Default => (&[], &[]),
            Self::ClientWithoutSack => (&["tcp_sack=0"], &[]),
            Self::EndpointWithoutSack => (&[], &["tcp_sack=0"]),
            Self::NobodyHasTimestamps => (&["tcp_timestamps=0"], &["tcp_timestamps=0"]),
            Self::ClientWithoutScaling => (&["tcp_window_scaling=0"], &[]),
            Self::EndpointWithoutScaling => (&[], &["tcp_window_scaling=0"]),
            Self::ClientAsksForEcn => (&["tcp_ecn=1"], &[]),
            Self::ClientWithoutTimestamps => (&["tcp_timestamps=0"], &[]),
            Self::EndpointWithoutTimestamps => (&[], &["tcp_timestamps=0"]),
        }
    }

    /// Whether Steer learns from the streams. They need a Steer of their own: what it has learned
    /// would change the streams of the other cells.
    fn is_learned(self) -> bool {
        self == Self::EndpointWithoutTimestamps
    }

    /// All options are tried within a family. Only some of them matter for the change of the IP header.
    fn are_for(self, family: Family) -> bool {
        let is_one = matches!(family, Family::V4 | Family::V6);
        is_one || matches!(self, Self::Default | Self::NobodyHasTimestamps | Self::ClientAsksForEcn)
    }

    fn apply(self, topology: &Topology) -> Result<()> {
        const DEFAULTS: [&str; 4] = ["tcp_sack=1", "tcp_timestamps=1", "tcp_window_scaling=1", "tcp_ecn=2"];
        let (client, endpoint) = self.settings();
        for (netns, settings) in [(&topology.clients, client), (&topology.endpoints[0], endpoint)] {
            for setting in DEFAULTS.iter().chain(settings) {
                let (name, value) = setting.split_once('=').context("the setting has no value")?;
                netns.sysctl(&format!("net.ipv4.{name}"), value)?;
            }
        }
        Ok(())
    }
}

/// Counters of damage that the splice must not do: a segment that is refused as too old, or as
/// damaged.
const DAMAGE: [&str; 5] =
    ["TcpExtPAWSActive", "TcpExtPAWSEstab", "TcpInCsumErrors", "TcpExtTCPACKSkippedPAWS", "IpInHdrErrors"];
/// Further counters that are shown.
const SHOWN: [&str; 11] = [
    "TcpRetransSegs",
    "TcpOutRsts",
    "TcpEstabResets",
    "TcpExtTCPTimeouts",
    "TcpExtTCPLossProbes",
    "TcpExtTCPOFOQueue",
    "TcpExtTCPSACKDiscard",
    "TcpExtBeyondWindow",
    "TcpExtPAWSOldAck",
    "TcpExtTSEcrRejected",
    "TcpExtTCPChallengeACK",
];

/// How many streams are open at a time: few enough that no stream waits long for its share of the
/// processor.
const PARALLEL: usize = 20;

pub(crate) struct Matrix<'t> {
    topology: &'t Topology,
    packet: Bed<'t>,
    learning: Bed<'t>,
    faults: [Faults<'t>; 2],
}

impl<'t> Matrix<'t> {
    pub(crate) fn new(topology: &'t Topology) -> Result<Self> {
        topology.route_directly()?;
        for (netns, device) in devices(topology) {
            netns.without_super_packets(device)?;
        }
        let endpoint = &topology.endpoints[0];
        Ok(Self {
            topology,
            packet: Bed::new(topology, "packet", 8080)?,
            learning: Bed::new(topology, "packet", 8081)?,
            faults: [Faults::attach(&topology.clients, "eth0")?, Faults::attach(endpoint, "eth0")?],
        })
    }

    /// Runs all cells with `rates`. Returns how many streams were handed over. Without faults, the
    /// network also keeps the packets in order.
    pub(crate) fn run(&mut self, rates: Rates, mut seed: u64, streams: usize) -> Result<u64> {
        if rates == Rates::NONE {
            for (netns, device) in devices(self.topology) {
                netns.receive_in_order(device)?;
            }
        }
        self.faults.iter_mut().try_for_each(|faults| faults.set(rates))?;
        let mut hand_overs = 0.0;
        for family in Family::ALL {
            for options in Options::ALL {
                if !options.are_for(family) || !is_wanted(&format!("{family:?} {options:?}")) {
                    continue;
                }
                options.apply(self.topology)?;
                seed = seed.wrapping_add(1);
                println!("\n{family:?}, {options:?}, {rates:?}, seed {seed:x}");
                hand_overs += self
                    .cell(family, options, rates, seed, streams)
                    .with_context(|| format!("{family:?}, {options:?}, {rates:?}, seed {seed:x}"))?;
            }
        }
        self.packet.print_metrics()?;
        self.learning.print_metrics()?;
        Ok(hand_overs as u64)
    }

    fn cell(&self, family: Family, options: Options, rates: Rates, seed: u64, streams: usize) -> Result<f64> {
        let bed = if options.is_learned() { &self.learning } else { &self.packet };
        let load = Load { kind: Kind::Whole, seed, streams, parallel: PARALLEL };
        let before = self.observe()?;
        let direct = bed.without_steer(family, load)?;
        for (netns, grown) in self.topology.all().zip(self.since(&before)?) {
            println!("  direct, {}: {}", netns.name(), grown.only(&DAMAGE));
        }
        let before = self.observe()?;
        let round = bed.round(family, load)?;
        let grown = self.since(&before)?;
        for (netns, grown) in self.topology.all().zip(&grown) {
            println!("  {}: {}", netns.name(), grown.only(&[&DAMAGE[..], &SHOWN[..]].concat()));
        }
        for faults in &self.faults {
            println!("  faults so far: {}", faults.counts()?);
        }
        println!("  hand-overs {}, failed {}", round.counted.hand_overs, round.counted.failed_hand_overs);
        // The streams that were open when the first one was refused had their connections already.
        let may_be_refused = if options.is_learned() { PARALLEL } else { 0 };
        let refused = round.counted.timestamps_differ;
        anyhow::ensure!(refused <= may_be_refused as f64, "{:?}", round.counted);
        ensure_spliced(&round, streams - refused as usize)?;
        ensure_no_stall(&round, &direct, rates)?;
        let repeated =
            self.topology.all().zip(&grown).find(|(netns, _)| netns.name() == self.topology.proxy.name());
        let repeated = repeated.map_or(0, |(_, grown)| grown.get("TcpRetransSegs"));
        for (netns, grown) in self.topology.all().zip(&grown) {
            ensure_intact(netns, grown)?;
            ensure_accepted(netns, grown, rates, repeated)?;
        }
        Ok(round.counted.hand_overs)
    }

    fn observe(&self) -> Result<Vec<Counters>> {
        self.topology.all().map(Counters::of).collect()
    }

    fn since(&self, before: &[Counters]) -> Result<Vec<Counters>> {
        Ok(self.observe()?.iter().zip(before).map(|(now, before)| now.since(before)).collect())
    }
}

/// All devices between the client and the endpoint, with their namespaces.
fn devices(topology: &Topology) -> [(&NetNs, &'static str); 4] {
    let Topology { clients, proxy, endpoints } = topology;
    [(clients, "eth0"), (proxy, "clients"), (proxy, "endpoint0"), (&endpoints[0], "eth0")]
}

/// Whether to run a cell. All cells are run unless `STEER_MATRIX_CELLS` is set. Then the name must
/// contain its value.
fn is_wanted(name: &str) -> bool {
    std::env::var("STEER_MATRIX_CELLS").map_or(true, |part| name.contains(&part))
}

/// Streams that end before their hand-over stay relayed.
fn ensure_spliced(round: &Round, streams: usize) -> Result<()> {
    let counted = &round.counted;
    anyhow::ensure!(counted.failed_hand_overs == 0.0, "{counted:?}");
    anyhow::ensure!(counted.hand_overs >= streams as f64 / 2.0, "of {streams}: {counted:?}");
    Ok(())
}

/// No stream may wait longer than the same streams without a proxy, plus three retransmission
/// timeouts. Steer has more to do than the peers, so on a busy machine Steer waits longer for a
/// processor: the usual wait counts as many times as Steer's work took longer.
///
/// Where packets are lost, a retransmission is sometimes lost, too, even if none was lost without a
/// proxy. So the first two timeouts count as usual; the second is twice as long as the first (RFC
/// 6298, 5.5).
fn ensure_no_stall(round: &Round, direct: &Outcome, rates: Rates) -> Result<()> {
    let timeouts = &round.outcome.retransmission_timeouts;
    let timeout = timeouts.get(timeouts.len() / 2).copied().unwrap_or(Duration::from_millis(200));
    let lucky = if rates == Rates::NONE { Duration::ZERO } else { 3 * timeout };
    let usual = direct.longest_gap().mul_f64(round.slowdown).max(lucky);
    let (gap, limit) = (round.outcome.longest_gap(), usual + 3 * timeout);
    let gaps = &round.outcome.gaps;
    println!(
        "  gaps: median {:?}, longest {gap:?} of at most {limit:?}; retransmission timeout {timeout:?}, \
         steer slower by {:.2}",
        gaps.get(gaps.len() / 2).copied().unwrap_or_default(),
        round.slowdown,
    );
    let worst: Vec<_> = gaps.iter().rev().take(5).collect();
    anyhow::ensure!(gap <= limit, "a stream stalled: longest gaps {worst:?}, more than {limit:?}");
    Ok(())
}

/// No packet may be damaged.
fn ensure_intact(netns: &NetNs, grown: &Counters) -> Result<()> {
    let bad_checksums = grown.get("TcpInCsumErrors") + grown.get("IpInHdrErrors");
    anyhow::ensure!(bad_checksums == 0, "{}: {}", netns.name(), grown.only(&DAMAGE));
    Ok(())
}

/// No segment of a spliced stream may be refused as too old, with two exceptions:
///
/// - With faults, a few in a thousand may be refused, on the relay as well: segments that come twice
///   and late, or that others have overtaken.
/// - During a hand-over Steer's sockets repeat segments with the timestamp of the first time. On a
///   busy machine some of the `repeated` segments arrive after newer ones, and are refused: a whole
///   window of them after a timeout that was not needed. They were received before, since only
///   segments that follow in order make a receiver refuse older timestamps (RFC 7323, 4.3). A wrong
///   shift of timestamps has several times more segments refused than are repeated.
fn ensure_accepted(netns: &NetNs, grown: &Counters, rates: Rates, repeated: i64) -> Result<()> {
    let refused = grown.get("TcpExtPAWSEstab") + grown.get("TcpExtPAWSActive");
    let allowed = if rates == Rates::NONE { repeated / 4 } else { grown.get("TcpInSegs") / 300 };
    anyhow::ensure!(refused <= allowed, "{}: {}, more than {allowed}", netns.name(), grown.only(&DAMAGE));
    Ok(())
}
