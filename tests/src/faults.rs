//! Faults on the path of TCP packets: loss, duplication, reordering. Many kernels lack netem, so a
//! BPF program makes the faults (`tests/faults-ebpf`).

use std::ops::{Add, Sub};
use std::path::Path;
use std::{fmt, fs};

use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya::maps::{Array, MapData, PerCpuArray};
use aya::programs::{SchedClassifier, TcAttachType};
use faults_ebpf::{count, setting};

use crate::netns::NetNs;

/// Built by `cargo xtask build-ebpf`, relative to the workspace.
const OBJECT: &str = "target/bpf/faults-ebpf.o";
/// The two ends of the detour.
const DETOUR: &str = "detour0";
const DETOUR_END: &str = "detour1";
/// The slow queue of the detour. At one per cent of a busy link, a packet waits for up to about ten
/// other packets, which is up to 25 ms. Packets that do not fit into the queue are lost.
const QUEUE: [&str; 7] = ["tbf", "rate", "10mbit", "burst", "2kb", "limit", "32kb"];

/// How often each fault happens to a packet, per mille, at each hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rates {
    pub loss: u32,
    pub duplication: u32,
    pub reordering: u32,
}

impl Rates {
    pub const NONE: Self = Self { loss: 0, duplication: 0, reordering: 0 };
    /// One per cent of each fault on the path from one host with faults to another.
    pub const PERCENT: Self = Self { loss: 5, duplication: 5, reordering: 5 };
}

/// Numbers of packets, summed over all CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// All packets to which a fault could happen: all TCP packets without SYN.
    pub seen: u64,
    pub lost: u64,
    pub duplicated: u64,
    /// Packets that came late, perhaps after packets that were sent later.
    pub delayed: u64,
    /// Packets that were lost on the detour.
    pub dropped: u64,
}

/// The faults of a namespace's device, at its ingress and its egress. They end when the guard is
/// dropped.
pub struct Faults<'n> {
    netns: &'n NetNs,
    ebpf: Ebpf,
    settings: Array<MapData, u32>,
}

impl<'n> Faults<'n> {
    /// Attaches the program. No fault happens until [`Self::set`] is called.
    ///
    /// # Errors
    /// When the object is not built, the kernel refuses the program, or the namespace has a detour
    /// already.
    pub fn attach(netns: &'n NetNs, device: &str) -> Result<Self> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(OBJECT);
        let object =
            fs::read(&path).with_context(|| format!("{OBJECT} is missing: run cargo xtask build-ebpf"))?;
        let mut ebpf = Ebpf::load(&object).context("cannot load the fault program's maps")?;
        let settings =
            ebpf.take_map(faults_ebpf::MAP_SETTINGS).context("the fault program has no settings")?;
        netns.ip(&["link", "add", DETOUR, "type", "veth", "peer", "name", DETOUR_END])?;
        // From here on, Drop removes the detour.
        let mut faults = Self { netns, ebpf, settings: Array::try_from(settings)? };
        for end in [DETOUR, DETOUR_END] {
            netns.ip(&["link", "set", end, "up", "addrgenmode", "none"])?;
        }
        netns.tc(&[&["qdisc", "add", "dev", DETOUR, "root"], &QUEUE[..]].concat())?;
        faults.settings.set(setting::DETOUR, netns.index_of(DETOUR)?, 0)?;
        faults.settings.set(setting::HOME, netns.index_of(device)?, 0)?;
        netns.run(|| {
            for (program, device, hook) in [
                (faults_ebpf::PROG_RETURN, DETOUR_END, TcAttachType::Ingress),
                (faults_ebpf::PROG_INGRESS, device, TcAttachType::Ingress),
                (faults_ebpf::PROG_EGRESS, device, TcAttachType::Egress),
            ] {
                start(&mut faults.ebpf, program, device, hook).with_context(|| program.to_owned())?;
            }
            anyhow::Ok(())
        })??;
        Ok(faults)
    }

    /// Changes the rates from the next packet on. Their sum is at most 1000.
    pub fn set(&mut self, rates: Rates) -> Result<()> {
        for (index, value) in [
            (setting::LOSS, rates.loss),
            (setting::DUPLICATION, rates.duplication),
            (setting::REORDERING, rates.reordering),
        ] {
            self.settings.set(index, value, 0).context("cannot set a fault's rate")?;
        }
        Ok(())
    }

    /// What has happened so far.
    pub fn counts(&self) -> Result<Counts> {
        let map = self.ebpf.map(faults_ebpf::MAP_COUNTS).context("the fault program has no counts")?;
        let map = PerCpuArray::<_, u64>::try_from(map)?;
        // Reads `returned` before `left`. In the other order, a packet could return between the two
        // reads.
        let returned = sum(&map, count::RETURNED)?;
        let left = sum(&map, count::LEFT)?;
        Ok(Counts {
            seen: sum(&map, count::SEEN)?,
            lost: sum(&map, count::LOST)?,
            duplicated: sum(&map, count::DUPLICATED)?,
            delayed: returned,
            dropped: left - returned,
        })
    }
}

impl Drop for Faults<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.netns.ip(&["link", "del", DETOUR]) {
            eprintln!("cannot remove the detour {DETOUR}: {error:#}");
        }
    }
}

impl Sub for Counts {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            seen: self.seen - before.seen,
            lost: self.lost - before.lost,
            duplicated: self.duplicated - before.duplicated,
            delayed: self.delayed - before.delayed,
            // Packets that are still on the detour count as dropped here.
            dropped: self.dropped.saturating_sub(before.dropped),
        }
    }
}

impl Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            seen: self.seen + other.seen,
            lost: self.lost + other.lost,
            duplicated: self.duplicated + other.duplicated,
            delayed: self.delayed + other.delayed,
            dropped: self.dropped + other.dropped,
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seen, lost, duplicated, delayed, dropped } = self;
        write!(f, "{seen} packets: {lost} lost, {duplicated} doubled, {delayed} late, {dropped} lost late")
    }
}

/// Loads a program and attaches it in the calling thread's namespace.
fn start(ebpf: &mut Ebpf, name: &str, device: &str, hook: TcAttachType) -> Result<()> {
    let program = ebpf.program_mut(name).context("the object does not have the program")?;
    let program: &mut SchedClassifier = program.try_into()?;
    program.load().context("the kernel refuses the fault program")?;
    program.attach(device, hook).with_context(|| format!("cannot attach the fault program to {device}"))?;
    Ok(())
}

fn sum<T: std::borrow::Borrow<MapData>>(map: &PerCpuArray<T, u64>, index: u32) -> Result<u64> {
    Ok(map.get(&index, 0).context("cannot read a count")?.iter().sum())
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::thread;

    use super::*;
    use crate::counters::Counters;
    use crate::topology::Topology;

    #[test]
    fn each_fault_happens_at_its_rate_and_tcp_repairs_it() {
        if !crate::require::root() {
            return;
        }
        let topology = Topology::new(0).unwrap();
        let listener = topology.proxy.run(|| TcpListener::bind((Topology::PROXY6, 80)).unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        for (netns, device) in [(&topology.clients, "eth0"), (&topology.proxy, "clients")] {
            netns.without_super_packets(device).unwrap();
        }
        let mut faults = Faults::attach(&topology.clients, "eth0").unwrap();
        let run = || {
            let before = Counters::of(&topology.proxy).unwrap();
            let sent: Vec<u8> = (0..4_000_000_u32).map(|i| (i ^ i >> 8) as u8).collect();
            let mut client = topology.clients.run(|| TcpStream::connect(address).unwrap()).unwrap();
            let mut server = listener.accept().unwrap().0;
            let copy = sent.clone();
            let writer = thread::spawn(move || client.write_all(&copy).unwrap());
            let mut received = Vec::new();
            server.read_to_end(&mut received).unwrap();
            writer.join().unwrap();
            assert!(received == sent);
            Counters::of(&topology.proxy).unwrap().since(&before)
        };
        run();
        let none = faults.counts().unwrap();
        assert!(none.seen > 3_000 && none == Counts { seen: none.seen, ..Counts::default() }, "{none}");
        faults.set(Rates { loss: 10, duplication: 10, reordering: 10 }).unwrap();
        let seen = run();
        let counts = faults.counts().unwrap() - none;
        eprintln!("{counts}; {seen}");
        assert!(counts.lost > 0 && counts.duplicated > 0 && counts.delayed > 0, "{counts}");
        assert!(seen.get("TcpExtTCPOFOQueue") > 0, "nothing came out of order: {seen}");
    }
}
