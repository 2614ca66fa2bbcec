//! The pins of an instance. The maps are pinned by their names, in a directory named after the
//! version of their layout. Beside the maps are the links, or the notes of interfaces that have
//! filters (see `interfaces`).
//!
//! The directory gets its name only when everything in it is in place, so a directory with its name
//! is complete. There are several directories only while streams move from one set of maps to
//! another (`migrate`). If these are of one version, the later ones have a number appended.

use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use aya::Pod;
use aya::maps::{Array, HashMap, Map, MapData};
use proxy_common::abi;
use proxy_common::about::About;
use proxy_common::flow::{FlowRef, Record, state};
use proxy_common::instance::Instance;
use proxy_common::layout::{Entry, LAYOUT, fingerprint};

use super::convert::{Conversion, Unreadable};
use super::interfaces;
use super::mapped::MappedRecords;
use super::records::Records;
use crate::bpf::pins::{self, Pins, PinsError};
use crate::bpf::sock::maps::into_io;
use crate::net::host;

/// Why pins cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PinnedError {
    #[error("`{found}` is of another version of Steer, this one has `{}`", version())]
    OtherVersion { found: String },
    #[error("its maps are laid out as this build of Steer cannot read them")]
    OtherLayout(#[source] Option<Unreadable>),
    #[error("another build of Steer has left it; `steer run` of this one takes its streams over")]
    OtherBuild,
    #[error("the process that was taking its streams over has died; `steer run` completes the takeover")]
    Interrupted,
    #[error("it belongs to another network namespace")]
    OtherNamespace,
    #[error("{what} is damaged")]
    Damaged {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot remove its filters from interfaces; run as root (CAP_NET_ADMIN)")]
    Filters(#[source] io::Error),
    #[error(transparent)]
    Pins(#[from] PinsError),
    #[error("cannot use {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The name of the directory for the maps of this version.
pub(super) fn version() -> String {
    format!("abi{}", abi::ABI_VERSION)
}

/// The end of the name of a directory whose maps no program uses yet, or any more. (The file system
/// allows no dots.)
pub(super) const UNUSED: &str = "-unused";

/// The directories of an instance whose maps are used, sorted.
pub(super) fn used_directories(path: &Path) -> Result<Vec<PathBuf>, PinnedError> {
    let mut names = pins::names(path).map_err(|source| PinnedError::io(path, source))?;
    names.retain(|name| !name.ends_with(UNUSED));
    names.sort();
    Ok(names.iter().map(|name| path.join(name)).collect())
}

/// Names the process that owns an instance, for a message: `instance NAME (process 1234)`.
pub fn owner(instance: &Instance) -> String {
    let directories = used_directories(&pins::path_of(instance)).unwrap_or_default();
    let about = directories.iter().filter_map(|path| read(&open_about(path).ok()?).ok());
    match about.map(|about| about.pid).find(|pid| *pid != 0) {
        Some(pid) => format!("instance `{instance}` (process {pid})"),
        None => format!("instance `{instance}`"),
    }
}

/// Another instance whose programs see the packets of this network namespace.
pub struct Neighbour {
    /// As [`owner`] names it.
    pub name: String,
    /// The ports that the instance has added to the host's reserved ports; empty if it needed none.
    pub reserved: Vec<RangeInclusive<u16>>,
}

/// All instances except `own` that have pins for this network namespace, whether a process runs
/// them or has left streams.
///
/// # Errors
/// The pins cannot be listed.
pub fn neighbours(own: &Instance) -> Result<Vec<Neighbour>, PinsError> {
    let Ok(here) = netns() else { return Ok(Vec::new()) };
    let mut instances = pins::instances()?;
    instances.retain(|instance| instance != own);
    let neighbour = |instance: &Instance| {
        // A directory that cannot be read is gone, or the build that made it is too different.
        let directories = used_directories(&pins::path_of(instance)).unwrap_or_default();
        let mut about = directories.iter().rev().filter_map(|path| open_about(path).ok());
        let about = about.find(|about| read(about).is_ok_and(|about| about.netns == here))?;
        Some(Neighbour { name: owner(instance), reserved: noted_reserved(&about).unwrap_or_default() })
    };
    Ok(instances.iter().filter_map(neighbour).collect())
}

/// The maps that a process of an instance has left.
pub struct Pinned {
    path: PathBuf,
    about: Array<MapData, About>,
    records: Records,
}

impl Pinned {
    /// Finds the maps that the last process of the instance has left. `None`: it has left none.
    ///
    /// # Errors
    /// Some or all maps have another form than this build of Steer uses.
    pub fn find(pins: &Pins) -> Result<Option<Self>, PinnedError> {
        let mut found = used_directories(pins.path())?
            .into_iter()
            .map(PinnedMaps::open)
            .collect::<Result<Vec<_>, _>>()?;
        let Some(only) = found.pop() else { return Ok(None) };
        if !found.is_empty() {
            return Err(PinnedError::Interrupted);
        }
        if !only.is_own() {
            return Err(PinnedError::OtherBuild);
        }
        let records = used_records(&only.map).map_err(PinnedError::damaged(abi::MAP_CONNS))?;
        Ok(Some(Self { about: open_about(&only.path)?, path: only.path, records }))
    }

    /// The ports that were added to the host's reserved ports.
    pub fn reserved(&self) -> Result<Vec<RangeInclusive<u16>>, PinnedError> {
        noted_reserved(&self.about)
    }

    /// The number of interfaces that have the programs.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn interfaces(&self) -> Result<usize, PinnedError> {
        let names = pins::names(&self.path).map_err(|source| PinnedError::io(&self.path, source))?;
        Ok(interfaces::pinned(&names).len())
    }

    /// # Errors
    /// The maps are about the packets of another network namespace than the caller's.
    pub fn ensure_is_here(&self) -> Result<(), PinnedError> {
        if read(&self.about)?.netns == netns()? { Ok(()) } else { Err(PinnedError::OtherNamespace) }
    }

    /// Whether the streams have ended together with their network namespace: no interface has the
    /// programs any more.
    ///
    /// # Errors
    /// The links cannot be looked at.
    pub fn is_abandoned(&self) -> Result<bool, PinnedError> {
        if self.ensure_is_here().is_ok() {
            return Ok(false);
        }
        is_attached(&self.path).map(|attached| !attached)
    }

    /// The records; those that are not OFF are in use.
    pub fn records(&self) -> &Records {
        &self.records
    }
}

/// The maps in one directory, of any build that describes them.
#[derive(Debug)]
pub(super) struct PinnedMaps {
    path: PathBuf,
    pub(super) about: About,
    map: MapData,
    memory: MappedRecords,
    conversion: Conversion,
}

impl PinnedMaps {
    pub(super) fn open(path: PathBuf) -> Result<Self, PinnedError> {
        Self::open_described(&path).map_err(|error| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            match error {
                // The maps are of a build that did not have this map.
                PinnedError::Damaged { .. } if name != version() => {
                    PinnedError::OtherVersion { found: name.into_owned() }
                }
                error => error,
            }
        })
    }

    fn open_described(path: &Path) -> Result<Self, PinnedError> {
        let about = read(&open_about(path)?)?;
        let entries = read_layout(path).map_err(PinnedError::damaged(abi::MAP_LAYOUT))?;
        if fingerprint(&entries) != about.layout {
            return Err(PinnedError::OtherLayout(None));
        }
        let conversion = Conversion::new(&entries).map_err(|why| PinnedError::OtherLayout(Some(why)))?;
        let damaged = || PinnedError::damaged(abi::MAP_CONNS);
        let map = MapData::from_pin(path.join(abi::MAP_CONNS)).map_err(into_io).map_err(damaged())?;
        let info = map.info().map_err(into_io).map_err(damaged())?;
        let (len, count) = (conversion.record_len(), info.max_entries());
        if info.value_size() != len {
            return Err(damaged()(io::ErrorKind::InvalidData.into()));
        }
        let memory = MappedRecords::map_read_only(map.fd().as_fd(), len, count).map_err(damaged())?;
        Ok(Self { path: path.to_owned(), about, map, memory, conversion })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn is_own(&self) -> bool {
        self.about.layout == LAYOUT
    }

    /// The number of streams for which there is room.
    pub(super) fn capacity(&self) -> u32 {
        self.memory.count()
    }

    /// A record, converted to the layout of this build.
    pub(super) fn record(&self, index: u32) -> Record {
        let mut words = vec![0_u64; (self.conversion.record_len() as usize).div_ceil(size_of::<u64>())];
        self.memory.read(index, &mut words);
        self.conversion.convert(bytemuck::cast_slice(&words))
    }

    /// The records that are in use.
    pub(super) fn used(&self) -> impl DoubleEndedIterator<Item = (u32, Record)> {
        let records = (0..self.capacity()).map(|index| (index, self.record(index)));
        records.filter(|(_, record)| record.state != state::OFF)
    }

    /// One more than the highest index of a record in use.
    pub(super) fn needed(&self) -> u32 {
        self.used().next_back().map_or(0, |(index, _)| index + 1)
    }

    /// All entries of a flow map.
    pub(super) fn keys<K: Pod>(&self, name: &'static str) -> Result<Vec<(K, FlowRef)>, PinnedError> {
        let read = || {
            let map = MapData::from_pin(self.path.join(name)).and_then(Map::from_map_data)?;
            HashMap::<_, K, FlowRef>::try_from(map)?.iter().collect::<Result<_, _>>()
        };
        read().map_err(into_io).map_err(PinnedError::damaged(name))
    }

    /// Removes all pins, except pins of links that have been moved.
    pub(super) fn remove(&self) -> io::Result<()> {
        // No process may find an incomplete directory under its name.
        let mut unused = self.path.clone().into_os_string();
        unused.push(UNUSED);
        fs::rename(&self.path, &unused)?;
        fs::remove_dir_all(unused)
    }
}

impl PinnedError {
    pub(super) fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    pub(super) fn damaged(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Damaged { what, source }
    }
}

/// Whether an interface still has the programs, by the links that are pinned in a directory.
pub(super) fn is_attached(path: &Path) -> Result<bool, PinnedError> {
    interfaces::any_is_attached(path).map_err(|source| PinnedError::io(path, source))
}

pub(super) fn netns() -> Result<u64, PinnedError> {
    host::netns_cookie().map_err(PinnedError::damaged("the network namespace's cookie"))
}

fn read_layout(path: &Path) -> io::Result<Vec<Entry>> {
    let map = MapData::from_pin(path.join(abi::MAP_LAYOUT)).and_then(Map::from_map_data);
    let map: Array<_, Entry> = map.and_then(Array::try_from).map_err(into_io)?;
    map.iter().collect::<Result<_, _>>().map_err(into_io)
}

pub(super) fn open_about(path: &Path) -> Result<Array<MapData, About>, PinnedError> {
    let map = MapData::from_pin(path.join(abi::MAP_ABOUT)).and_then(Map::from_map_data);
    let about = map.and_then(Array::try_from).map_err(into_io);
    about.map_err(PinnedError::damaged(abi::MAP_ABOUT))
}

pub(super) fn read(about: &Array<MapData, About>) -> Result<About, PinnedError> {
    about.get(&0, 0).map_err(into_io).map_err(PinnedError::damaged(abi::MAP_ABOUT))
}

pub(super) fn write(about: &mut Array<MapData, About>, value: About) -> Result<(), PinnedError> {
    about.set(0, value, 0).map_err(into_io).map_err(PinnedError::damaged(abi::MAP_ABOUT))
}

pub(super) fn noted_reserved(about: &Array<MapData, About>) -> Result<Vec<RangeInclusive<u16>>, PinnedError> {
    let about = read(about)?;
    let ranges = about.reserved.iter().take(about.reserved_count as usize);
    Ok(ranges.map(|[first, last]| *first..=*last).collect())
}

/// Notes ports that were added to the reserved ports.
pub(super) fn note_reserved(
    about: &mut Array<MapData, About>,
    ports: &[RangeInclusive<u16>],
) -> Result<(), PinnedError> {
    let mut value = read(about)?;
    let room = value.reserved.iter_mut().skip(value.reserved_count as usize);
    let noted = room.zip(ports).map(|(place, range)| *place = [*range.start(), *range.end()]).count();
    // At most the length of the array.
    value.reserved_count += noted as u32;
    write(about, value)
}

/// The records of a map that a process has left. Records that are not OFF are in use.
pub(super) fn used_records(map: &MapData) -> io::Result<Records> {
    let info = map.info().map_err(into_io)?;
    if info.value_size() as usize != size_of::<Record>() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Records::map_used(map.fd().as_fd(), info.max_entries())
}
