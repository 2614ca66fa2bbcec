//! The packet splice's part of the kernel: programs, maps, and the interfaces that they are
//! attached to. The programs need Linux 5.15.

mod catch_up;
mod clsact;
pub mod cluster;
mod convert;
mod expiry;
mod flow_map;
pub mod inspect;
mod interfaces;
mod key;
mod mapped;
mod migrate;
mod no_stamps;
mod orphans;
pub mod pinned;
mod place;
mod programs;
mod records;

use std::fmt;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::os::fd::AsFd as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use aya::EbpfLoader;
use aya::maps::{Array, Map, MapData, MapError, PerCpuArray, RingBuf};
use proxy_common::abi;
use proxy_common::about::About;
use proxy_common::flow::{FlowEvent, FlowKey4, FlowKey6, FlowRef};
use proxy_common::reason::Reason;
use proxy_common::stat::Stat;

pub use interfaces::{AttachError, Hook};
pub use key::{Ends, FlowKey, wire_address, wire_ports};
pub use orphans::{Orphans, remove_pinned};
pub use records::Records;

use super::events::Events;
use super::loader::{self, LoadError};
use super::pins::{Pins, PinsError};
use crate::bpf::sock::maps::{self, into_io};
use crate::capability::Capability;
use expiry::Heartbeat;
use flow_map::FlowMap;
use interfaces::Interfaces;
use migrate::Goal;
use no_stamps::NoStamps;
use pinned::PinnedError;
use place::Place;
use programs::Programs;

/// All maps of the packet splice.
pub(super) const MAPS: [&str; 10] = [
    abi::MAP_FLOWS4,
    abi::MAP_FLOWS6,
    abi::MAP_CONNS,
    abi::MAP_FLOW_EVENTS,
    abi::MAP_FLOW_STATS,
    abi::MAP_ABOUT,
    abi::MAP_AGEING,
    abi::MAP_TIMER,
    abi::MAP_LAYOUT,
    abi::MAP_NO_STAMPS,
];

/// The events of flows that the programs report.
pub type FlowEvents = Events<FlowEvent>;

/// Why the packet splice cannot be loaded into the kernel.
#[derive(Debug, thiserror::Error)]
pub enum PacketLoadError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("the streams that an earlier process has left cannot be taken over")]
    Pinned(#[from] PinnedError),
}

impl PacketLoadError {
    /// The reason of streams that are relayed because of it.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Load(error) => error.reason(),
            Self::Pinned(_) => Reason::KernelRefused,
        }
    }
}

/// Why the key of a flow was not inserted into its map.
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

/// Programs, maps, and links or filters. Dropping it detaches everything that is not pinned.
/// Spliced streams then end with a reset as soon as a peer sends something.
pub struct PacketKernel {
    flows4: FlowMap<FlowKey4>,
    flows6: FlowMap<FlowKey6>,
    records: Records,
    stats: PerCpuArray<MapData, u64>,
    about: Mutex<Array<MapData, About>>,
    heartbeat: Heartbeat,
    no_stamps: NoStamps,
    interfaces: Interfaces,
    mark: u32,
    pins: Option<Pins>,
    are_new: bool,
}

impl fmt::Debug for PacketKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // aya's maps are not `Debug`.
        f.write_str("PacketKernel")
    }
}

impl PacketKernel {
    /// Loads the programs, and maps for `max_records` streams (2 or more, since [`inspect`] takes a
    /// map of one record for unused). `mark` and the next two numbers are packet marks
    /// ([`abi::GLOBAL_MARK`]). With `pins`, programs and maps outlive the process. If an earlier process has
    /// left streams there, its maps are taken over, or, if the maps are of another build or size,
    /// the streams are moved to new maps. Then the links or filters of the earlier process get the
    /// new programs. Call this inside a tokio runtime: the event ring registers with the runtime.
    ///
    /// # Errors
    /// There is no BPF object, a capability is missing (CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN,
    /// CAP_NET_RAW), the kernel refuses, or what is pinned cannot be used.
    pub fn load(
        max_records: u32,
        mark: u32,
        pins: Option<Pins>,
    ) -> Result<(Self, FlowEvents), PacketLoadError> {
        Self::load_for(Hook::of_this_kernel(), max_records, mark, pins)
    }

    /// [`load`](Self::load) for a given kind of hook.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_for(
        hook: Hook,
        max_records: u32,
        mark: u32,
        pins: Option<Pins>,
    ) -> Result<(Self, FlowEvents), PacketLoadError> {
        let Some(pins) = pins else { return Self::load_at(hook, max_records, mark, None) };
        let place = Place::find(&pins, max_records)?;
        let is_new = place.is_new();
        match Self::load_at(hook, max_records, mark, Some(place)) {
            Ok((kernel, events)) => Ok((Self { pins: Some(pins), ..kernel }, events)),
            Err(error) => {
                if let Err(error) = place::remove_refused(&pins, is_new) {
                    let error: &dyn std::error::Error = &error;
                    tracing::warn!(error, "cannot remove the pins of the packet splice");
                }
                Err(error)
            }
        }
    }

    /// [`load`](Self::load) with maps and links pinned at `place`. The caller adds the pins to the
    /// result.
    fn load_at(
        hook: Hook,
        max_records: u32,
        mark: u32,
        mut place: Option<Place>,
    ) -> Result<(Self, FlowEvents), PacketLoadError> {
        if hook == Hook::Clsact {
            orphans::remove_orphans();
        }
        let max_records = place.as_ref().map_or(max_records, |place| place.capacity);
        let has_loop = u32::from(loader::has_loop());
        let mut loader = EbpfLoader::new();
        loader::shrink(&mut loader, &maps::MAPS);
        loader
            .map_max_entries(abi::MAP_CONNS, max_records)
            .map_max_entries(abi::MAP_FLOWS4, max_records.saturating_mul(2))
            .map_max_entries(abi::MAP_FLOWS6, max_records.saturating_mul(2))
            .override_global(abi::GLOBAL_MARK, &mark, true)
            .override_global(abi::GLOBAL_HAS_LOOP, &has_loop, true);
        if let Some(place) = &place {
            for name in MAPS {
                loader.map_pin_path(name, place.path.join(name));
            }
        }
        let mut ebpf = loader::load_object(&mut loader, &Capability::OF_THE_SPLICE)?;
        let earlier =
            Programs::load(&mut ebpf, loader::build(mark), place.as_ref().map(|place| place.path.as_path()))?;
        // Before this process reads anything that the timer might be changing.
        let heartbeat = loader::typed(loader::take(&mut ebpf, abi::MAP_AGEING)?, abi::MAP_AGEING)?;
        let heartbeat =
            Heartbeat::begin(heartbeat).map_err(|error| LoadError::refused(abi::MAP_AGEING, error))?;
        if place.is_some()
            && let Err(error) = expiry::start_timer(&mut ebpf)
        {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(
                error,
                "streams whose peers vanish while no process runs stay until the next process starts"
            );
        }

        let mut take = |name| loader::take(&mut ebpf, name);
        let flows4 = FlowMap::new(take(abi::MAP_FLOWS4)?, abi::MAP_FLOWS4)?;
        let flows6 = FlowMap::new(take(abi::MAP_FLOWS6)?, abi::MAP_FLOWS6)?;
        let stats = loader::typed(take(abi::MAP_FLOW_STATS)?, abi::MAP_FLOW_STATS)?;
        let no_stamps = NoStamps::new(take(abi::MAP_NO_STAMPS)?)?;
        let mut about = loader::typed(take(abi::MAP_ABOUT)?, abi::MAP_ABOUT)?;
        let mut layout = loader::typed(take(abi::MAP_LAYOUT)?, abi::MAP_LAYOUT)?;
        // The map stays open until the programs that refer to it are loaded.
        let records_map = take(abi::MAP_CONNS)?;
        let records =
            map_records(&records_map, max_records, place.as_ref().is_some_and(|place| place.adopts))?;
        let ring = loader::typed::<RingBuf<MapData>>(take(abi::MAP_FLOW_EVENTS)?, abi::MAP_FLOW_EVENTS)?;
        let events = Events::new(ring).map_err(|error| LoadError::refused("the event ring", error))?;
        if let Some(place) = &mut place {
            place.fill(&Goal { records: &records, flows4: &flows4, flows6: &flows6 })?;
            place.complete(&mut about, &mut layout, &records)?;
        }
        // These are the maps of the socket splice, which is loaded separately.
        maps::MAPS.iter().for_each(|name| drop(ebpf.take_map(name)));
        let programs = Programs::new(ebpf, earlier);
        let pins = place.as_ref().map(|place| (place.instance.clone(), place.path.clone()));
        let interfaces = Interfaces::new(programs, hook, pins)?;
        let are_new = place.as_ref().is_none_or(|place| !place.adopts);
        if let Some(place) = place {
            place.settle(&records);
        }
        let about = Mutex::new(about);
        Ok((
            Self {
                flows4,
                flows6,
                records,
                stats,
                about,
                heartbeat,
                no_stamps,
                interfaces,
                mark,
                pins: None,
                are_new,
            },
            events,
        ))
    }

    /// Whether these maps are new. If they are, an earlier process cannot do anything for its
    /// streams any more, even if the streams were moved to these maps.
    pub fn are_new(&self) -> bool {
        self.are_new
    }

    /// Whether the streams can go on when the process ends.
    pub fn outlives(&self) -> bool {
        self.pins.is_some()
    }

    /// Whether the streams have to end when the process stops, since no later process could take
    /// them over.
    pub fn ends_with_process(&self) -> bool {
        self.pins.as_ref().is_none_or(Pins::is_private)
    }

    /// The lock of the instance, for the process that takes the instance over. `None`: there are no
    /// pins.
    pub fn give_away(&self) -> Option<File> {
        self.pins.as_ref().and_then(Pins::give_away)
    }

    /// Removes the pins, so that dropping this leaves nothing in the kernel.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn unpin(&self) -> Result<(), PinsError> {
        self.pins.as_ref().map_or(Ok(()), Pins::remove)
    }

    /// Sets when the kernel gives up streams while no process lives: a stream without a packet in
    /// either direction after `orphan_timeout` (`None` = never), and a stream that is over after
    /// `linger`. Until this is called, the limits of an earlier process apply, or the kernel gives
    /// up none.
    ///
    /// # Errors
    /// The kernel does not take it.
    pub fn set_limits(&self, orphan_timeout: Option<Duration>, linger: Duration) -> io::Result<()> {
        self.heartbeat.set_limits(orphan_timeout, linger)
    }

    /// Tells the kernel that this process lives. Call this every second.
    ///
    /// # Errors
    /// The kernel does not take it.
    pub fn send_heartbeat(&self) -> io::Result<()> {
        self.heartbeat.send()
    }

    /// Notes the ports that were added to the host's reserved ports, for the process or command
    /// that gives them back.
    ///
    /// # Errors
    /// The kernel does not take it.
    pub fn note_reserved(&self, ports: &[RangeInclusive<u16>]) -> Result<(), PinnedError> {
        // The handle holds a descriptor and nothing that a panic could leave half done.
        pinned::note_reserved(&mut self.about.lock().unwrap_or_else(PoisonError::into_inner), ports)
    }

    /// All ports that were noted in this way, by this process or by earlier ones.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn noted_reserved(&self) -> Result<Vec<RangeInclusive<u16>>, PinnedError> {
        pinned::noted_reserved(&self.about.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// All keys that are in the flow maps now.
    ///
    /// # Errors
    /// The kernel does not let them be read.
    pub fn keys(&self) -> io::Result<Vec<(FlowKey, FlowRef)>> {
        let mut keys = self.flows4.all(FlowKey::V4)?;
        keys.extend(self.flows6.all(FlowKey::V6)?);
        Ok(keys)
    }

    /// Attaches the programs to an interface of the caller's network namespace, in both directions.
    /// Does nothing if they are attached already.
    ///
    /// # Errors
    /// The interface is neither Ethernet nor loopback, is gone, or the kernel refuses.
    pub fn attach(&self, ifindex: u32) -> Result<(), AttachError> {
        self.attach_all(&[ifindex])
    }

    /// [`attach`](Self::attach) for several interfaces. Costs one system call if the programs are
    /// attached to all of them already. Threads that call this have to be in one network namespace.
    ///
    /// # Errors
    /// As for [`attach`](Self::attach), for the first interface that is refused.
    pub fn attach_all(&self, interfaces: &[u32]) -> Result<(), AttachError> {
        self.interfaces.attach(interfaces)
    }

    /// From now on, packets with this key belong to the flow. The state of the flow's record
    /// decides what becomes of the packets.
    ///
    /// # Errors
    /// The map is full, or the key is there already.
    pub fn insert(&self, key: &FlowKey, flow: FlowRef) -> Result<(), InsertError> {
        match key {
            FlowKey::V4(key) => self.flows4.insert(key, flow),
            FlowKey::V6(key) => self.flows6.insert(key, flow),
        }
    }

    /// Removes a key, if the key still belongs to this flow. The program removes the key itself
    /// when a new connection uses the tuple; and by now the new connection may have become a flow.
    pub fn remove(&self, key: &FlowKey, flow: FlowRef) {
        let removed = match key {
            FlowKey::V4(key) => self.flows4.remove(key, flow),
            FlowKey::V6(key) => self.flows6.remove(key, flow),
        };
        if let Err(error) = removed {
            tracing::warn!(%error, ?key, "cannot remove a flow from its BPF map");
        }
    }

    /// The records of streams.
    pub fn records(&self) -> &Records {
        &self.records
    }

    /// What the programs have counted since they were loaded, summed over CPUs.
    ///
    /// # Errors
    /// The kernel does not let the map be read.
    pub fn stats(&self) -> io::Result<Vec<(Stat, u64)>> {
        Stat::ALL.iter().map(|stat| Ok((*stat, self.stat(*stat)?))).collect()
    }

    /// One of the [`stats`](Self::stats).
    ///
    /// # Errors
    /// As for [`stats`](Self::stats).
    pub fn stat(&self, stat: Stat) -> io::Result<u64> {
        Ok(self.stats.get(&stat.number(), 0).map_err(into_io)?.iter().sum())
    }

    /// The mark that the sockets of a hand-over get.
    pub fn mark(&self) -> u32 {
        self.mark
    }

    /// The mark of a socket that is to connect without TCP timestamps. The programs must be
    /// [attached](Self::attach) to the interface by which the SYN leaves. The programs change
    /// nothing but the SYN, so every SYN of the socket is changed, also if it is repeated.
    pub fn syn_mark(&self) -> u32 {
        abi::syn_mark(self.mark)
    }

    /// For `time` from now on, clients that connect to `local` get connections without TCP
    /// timestamps. The programs must be [attached](Self::attach) to the interface on which the SYNs
    /// of the clients arrive.
    ///
    /// # Errors
    /// The map is full, or the kernel does not take it.
    pub fn take_timestamps(&self, local: SocketAddr, time: Duration) -> io::Result<()> {
        self.no_stamps.add(local, time)
    }
}

fn map_records(map: &Map, capacity: u32, are_used: bool) -> Result<Records, LoadError> {
    let name = abi::MAP_CONNS;
    let Map::Array(data) = map else { return Err(LoadError::Incomplete { name }) };
    let records =
        if are_used { pinned::used_records(data) } else { Records::map(data.fd().as_fd(), capacity) };
    records.map_err(|error| LoadError::refused(name, error))
}
