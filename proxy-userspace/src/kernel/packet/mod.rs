//! The packet splice's part of the kernel: programs, maps, and the interfaces that they are attached to. The programs
//! need Linux 5.17 (bpf_loop).

mod conns;
pub mod inspect;
mod interfaces;
mod key;
mod records;

use std::fmt;
use std::io;
use std::os::fd::AsFd as _;
use std::sync::{Mutex, MutexGuard, PoisonError};

use aya::maps::{HashMap, Map, MapData, MapError, PerCpuArray, RingBuf};
use aya::{EbpfLoader, Pod};
use proxy_common::abi;
use proxy_common::flow::{FlowEvent, FlowKey4, FlowKey6, FlowRef};
use proxy_common::reason::Reason;
use proxy_common::stat::Stat;

pub use conns::Conns;
pub use interfaces::{AttachError, Hook};
pub use key::{Ends, FlowKey, wire_address, wire_ports};

use super::events::Events;
use super::loader::{self, Capability, LoadError};
use super::maps::{self, BPF_NOEXIST, into_io};
use interfaces::Interfaces;

/// All maps of the packet splice.
pub(super) const MAPS: [&str; 5] =
    [abi::MAP_FLOWS4, abi::MAP_FLOWS6, abi::MAP_CONNS, abi::MAP_FLOW_EVENTS, abi::MAP_FLOW_STATS];

/// PERFMON, because the verifier lets nobody else compute with packet pointers as the programs do; NET_RAW for
/// [`super::raw`].
const NEEDED: [Capability; 4] =
    [Capability::BPF, Capability::PERFMON, Capability::NET_ADMIN, Capability::NET_RAW];

/// What the programs tell of flows.
pub type FlowEvents = Events<FlowEvent>;

/// A flow's key was not taken into its map.
#[derive(Debug, thiserror::Error)]
pub enum InsertError {
    #[error("the flow map is full")]
    Full,
    #[error("the tuple belongs to another flow")]
    Taken,
    #[error("the kernel refused the flow")]
    Refused(#[source] io::Error),
}

impl InsertError {
    /// The reason of streams that are relayed because of it.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Full => Reason::MapFull,
            Self::Taken | Self::Refused(_) => Reason::InsertFailed,
        }
    }

    fn from_map(error: MapError) -> Self {
        let error = into_io(error);
        match error.raw_os_error() {
            Some(libc::E2BIG | libc::ENOSPC) => Self::Full,
            Some(libc::EEXIST) => Self::Taken,
            _ => Self::Refused(error),
        }
    }
}

/// Programs, maps and links. Dropping it detaches everything: the streams that were spliced end with a
/// reset as soon as a peer sends something.
pub struct PacketKernel {
    flows4: FlowMap<FlowKey4>,
    flows6: FlowMap<FlowKey6>,
    conns: Conns,
    stats: PerCpuArray<MapData, u64>,
    interfaces: Interfaces,
    mark: u32,
}

impl fmt::Debug for PacketKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // aya's maps are not `Debug`.
        f.write_str("PacketKernel")
    }
}

impl PacketKernel {
    /// Loads programs and maps for `max_conns` sessions (2 or more; [`inspect`] takes a map of one for unused). `mark` and
    /// the number behind it are the packet marks of hand-overs. Must be called inside a tokio runtime, which the event
    /// ring joins.
    ///
    /// # Errors
    /// There is no BPF object, a capability is missing (CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN, CAP_NET_RAW), or the kernel
    /// refuses.
    pub fn load(max_conns: u32, mark: u32) -> Result<(Self, FlowEvents), LoadError> {
        Self::load_for(Hook::of_this_kernel(), max_conns, mark)
    }

    /// The same for a given kind of hook.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_for(hook: Hook, max_conns: u32, mark: u32) -> Result<(Self, FlowEvents), LoadError> {
        let mut loader = EbpfLoader::new();
        loader::shrink(&mut loader, &maps::MAPS);
        loader
            .map_max_entries(abi::MAP_CONNS, max_conns)
            .map_max_entries(abi::MAP_FLOWS4, max_conns.saturating_mul(2))
            .map_max_entries(abi::MAP_FLOWS6, max_conns.saturating_mul(2))
            .override_global(abi::GLOBAL_MARK, &mark, true);
        let mut ebpf = loader::load_object(&mut loader, &NEEDED)?;
        interfaces::load_programs(&mut ebpf)?;

        let mut take = |name| loader::take(&mut ebpf, name);
        let flows4 = FlowMap::new(take(abi::MAP_FLOWS4)?, abi::MAP_FLOWS4)?;
        let flows6 = FlowMap::new(take(abi::MAP_FLOWS6)?, abi::MAP_FLOWS6)?;
        let stats = loader::typed(take(abi::MAP_FLOW_STATS)?, abi::MAP_FLOW_STATS)?;
        // Open until the programs that refer to it are loaded.
        let conns_map = take(abi::MAP_CONNS)?;
        let conns = map_conns(&conns_map, max_conns)?;
        let ring = loader::typed::<RingBuf<MapData>>(take(abi::MAP_FLOW_EVENTS)?, abi::MAP_FLOW_EVENTS)?;
        let events = Events::new(ring).map_err(|error| LoadError::refused("the event ring", error))?;
        let interfaces = Interfaces::new(ebpf, hook)?;
        Ok((Self { flows4, flows6, conns, stats, interfaces, mark }, events))
    }

    /// Makes the programs see what arrives and leaves at an interface of the caller's network namespace. Does nothing
    /// if they do already.
    ///
    /// # Errors
    /// The interface is neither Ethernet nor loopback, is gone, or the kernel refuses.
    pub fn attach(&self, ifindex: u32) -> Result<(), AttachError> {
        self.interfaces.attach(ifindex)
    }

    /// Makes packets with this key those of a flow, whose record decides (by its state) what becomes of them.
    ///
    /// # Errors
    /// The map is full, or the key is there already.
    pub fn insert(&self, key: &FlowKey, flow: FlowRef) -> Result<(), InsertError> {
        match key {
            FlowKey::V4(key) => self.flows4.insert(key, flow),
            FlowKey::V6(key) => self.flows6.insert(key, flow),
        }
    }

    /// Takes a key out, if it still is this flow's: the program takes it out itself when a new connection uses the
    /// tuple, which may have become a flow in its turn.
    pub fn remove(&self, key: &FlowKey, flow: FlowRef) {
        let removed = match key {
            FlowKey::V4(key) => self.flows4.remove(key, flow),
            FlowKey::V6(key) => self.flows6.remove(key, flow),
        };
        if let Err(error) = removed {
            tracing::warn!(%error, ?key, "cannot remove a flow from its BPF map");
        }
    }

    /// The records of sessions.
    pub fn conns(&self) -> &Conns {
        &self.conns
    }

    /// What the programs have counted since they were loaded, summed over CPUs.
    ///
    /// # Errors
    /// The kernel does not let the map be read.
    pub fn stats(&self) -> io::Result<Vec<(Stat, u64)>> {
        Stat::ALL.iter().map(|stat| Ok((*stat, self.stat(*stat)?))).collect()
    }

    /// One of [`stats`](Self::stats).
    ///
    /// # Errors
    /// As there.
    pub fn stat(&self, stat: Stat) -> io::Result<u64> {
        Ok(self.stats.get(&stat.number(), 0).map_err(into_io)?.iter().sum())
    }

    /// The mark that the sockets of a hand-over get.
    pub fn mark(&self) -> u32 {
        self.mark
    }
}

/// A map from tuples to flows. Only userspace inserts, so that what is found under the lock stays, or is removed
/// by the program, until it is released.
struct FlowMap<K>(Mutex<HashMap<MapData, K, FlowRef>>);

impl<K: Pod> FlowMap<K> {
    fn new(map: Map, name: &'static str) -> Result<Self, LoadError> {
        loader::typed(map, name).map(|map| Self(Mutex::new(map)))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<MapData, K, FlowRef>> {
        // The handle holds a descriptor and nothing that a panic could leave half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn insert(&self, key: &K, flow: FlowRef) -> Result<(), InsertError> {
        self.lock().insert(key, flow, BPF_NOEXIST).map_err(InsertError::from_map)
    }

    fn remove(&self, key: &K, flow: FlowRef) -> io::Result<()> {
        let mut map = self.lock();
        let removed = match map.get(key, 0) {
            Ok(found) if found == flow => map.remove(key),
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
        match removed.map_err(into_io) {
            // The program was quicker.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            other => other,
        }
    }
}

fn map_conns(map: &Map, capacity: u32) -> Result<Conns, LoadError> {
    let name = abi::MAP_CONNS;
    let Map::Array(data) = map else { return Err(LoadError::Incomplete { name }) };
    Conns::map(data.fd().as_fd(), capacity).map_err(|error| LoadError::refused(name, error))
}
