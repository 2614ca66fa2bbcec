//! What an instance has pinned: the maps by their names, in a directory that carries the version of their layout, and
//! beside them the links (see [`super::interfaces`]).
//!
//! The directory gets its name when everything in it is in place, so there is no such thing as half of one.

use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use aya::maps::{Array, Map, MapData};
use bytemuck::Zeroable as _;
use proxy_common::abi;
use proxy_common::about::{About, LAYOUT};
use proxy_common::flow::Conn;

use super::super::host;
use super::super::maps::into_io;
use super::super::pins::{self, Pins};
use super::conns::Conns;
use super::interfaces;
use crate::config::Instance;

/// What is pinned cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PinnedError {
    #[error("`{found}` is of another version of Steer, this one has `{}`", version())]
    OtherVersion { found: String },
    #[error("its maps are laid out as this build of Steer cannot read them")]
    OtherLayout,
    #[error("it belongs to another network namespace")]
    OtherNamespace,
    #[error("{what} is damaged")]
    Damaged {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot use {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The name of the directory for the maps of this version.
fn version() -> String {
    format!("abi{}", abi::ABI_VERSION)
}

/// Names the process that owns an instance, for a message: `instance NAME (process 1234)`.
pub fn owner(instance: &Instance) -> String {
    let about = open_about(&pins::path_of(instance).join(version()));
    match about.and_then(|about| read(&about)) {
        Ok(About { pid, .. }) if pid != 0 => format!("instance `{instance}` (process {pid})"),
        _ => format!("instance `{instance}`"),
    }
}

/// What was found of an instance.
pub struct Pinned {
    pub(super) path: PathBuf,
    about: Array<MapData, About>,
    conns: Conns,
}

impl Pinned {
    /// What the instance's last process has left; `None` if that is nothing.
    ///
    /// # Errors
    /// It is not, or not only, what this version of Steer can read.
    pub fn find(pins: &Pins) -> Result<Option<Self>, PinnedError> {
        let versions = pins.versions().map_err(|source| PinnedError::io(pins.path(), source))?;
        if let Some(found) = versions.iter().find(|name| **name != version() && **name != unfinished()) {
            return Err(PinnedError::OtherVersion { found: found.clone() });
        }
        if versions.contains(&version()) {
            Self::open(pins.path().join(version())).map(Some)
        } else {
            Ok(None)
        }
    }

    fn open(path: PathBuf) -> Result<Self, PinnedError> {
        let about = open_about(&path)?;
        if read(&about)?.layout != LAYOUT {
            return Err(PinnedError::OtherLayout);
        }
        let damaged = PinnedError::damaged(abi::MAP_CONNS);
        let map = MapData::from_pin(path.join(abi::MAP_CONNS)).map_err(into_io).map_err(damaged)?;
        let damaged = PinnedError::damaged(abi::MAP_CONNS);
        let conns = used_conns(&map).map_err(damaged)?;
        Ok(Self { path, about, conns })
    }

    /// The ports that were added to those which the kernel gives nobody.
    pub fn reserved(&self) -> Result<Vec<RangeInclusive<u16>>, PinnedError> {
        noted_reserved(&self.about)
    }

    /// How many interfaces have the programs.
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
        let here = host::netns_cookie().map_err(PinnedError::damaged("the network namespace's cookie"))?;
        if self.about()?.netns == here { Ok(()) } else { Err(PinnedError::OtherNamespace) }
    }

    /// Whether its streams are over with the network namespace that they were in: no interface has the programs any more.
    ///
    /// # Errors
    /// The links cannot be looked at.
    pub fn is_abandoned(&self) -> Result<bool, PinnedError> {
        if self.ensure_is_here().is_ok() {
            return Ok(false);
        }
        let attached = interfaces::any_is_attached(&self.path);
        attached.map(|any| !any).map_err(|source| PinnedError::io(&self.path, source))
    }

    /// The records; those that are not OFF are in use.
    pub fn conns(&self) -> &Conns {
        &self.conns
    }

    fn about(&self) -> Result<About, PinnedError> {
        read(&self.about)
    }
}

impl PinnedError {
    fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    fn damaged(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Damaged { what, source }
    }
}

/// Where a process that starts pins what it has.
#[derive(Debug)]
pub(super) struct Place {
    /// Where maps are now, or shall be.
    pub(super) path: PathBuf,
    /// Whether they are there, with streams.
    pub(super) adopts: bool,
    /// What the instance's last process has left to be known, whether it has left streams or not.
    before: About,
}

impl Place {
    /// Finds the streams of the instance's last process, or makes room for those of this one.
    pub(super) fn find(pins: &Pins) -> Result<Self, PinnedError> {
        let found = Pinned::find(pins)?;
        let mut before = About::zeroed();
        if let Some(found) = found {
            let here = found.ensure_is_here();
            if here.is_ok() {
                before = found.about()?;
            }
            if found.is_abandoned()? {
                let streams = found.conns.used();
                tracing::info!(streams, "removed what was left of a network namespace that is gone");
            } else if found.conns.used() > 0 {
                return here.map(|()| Self { path: found.path, adopts: true, before });
            }
        }
        // Without a stream, they are made anew: this process may be configured for more.
        for name in [version(), unfinished()] {
            let path = pins.path().join(name);
            match fs::remove_dir_all(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(PinnedError::Io { path, source });
                }
                _ => {}
            }
        }
        let path = pins.path().join(unfinished());
        fs::create_dir(&path).map_err(|source| PinnedError::io(&path, source))?;
        Ok(Self { path, adopts: false, before })
    }

    /// Says in `about` whose the maps are, and gives them their name.
    pub(super) fn complete(&mut self, about: &mut Array<MapData, About>) -> Result<(), PinnedError> {
        let netns = host::netns_cookie().map_err(PinnedError::damaged("the network namespace's cookie"))?;
        write(about, About { layout: LAYOUT, netns, pid: std::process::id(), ..self.before })?;
        if !self.adopts {
            let path = self.path.with_file_name(version());
            fs::rename(&self.path, &path).map_err(|source| PinnedError::io(&path, source))?;
            self.path = path;
        }
        Ok(())
    }
}

fn unfinished() -> String {
    // The file system takes no dots.
    format!("{}-new", version())
}

fn open_about(path: &Path) -> Result<Array<MapData, About>, PinnedError> {
    let map = MapData::from_pin(path.join(abi::MAP_ABOUT)).and_then(Map::from_map_data);
    let about = map.and_then(Array::try_from).map_err(into_io);
    about.map_err(PinnedError::damaged(abi::MAP_ABOUT))
}

fn read(about: &Array<MapData, About>) -> Result<About, PinnedError> {
    about.get(&0, 0).map_err(into_io).map_err(PinnedError::damaged(abi::MAP_ABOUT))
}

fn write(about: &mut Array<MapData, About>, value: About) -> Result<(), PinnedError> {
    about.set(0, value, 0).map_err(into_io).map_err(PinnedError::damaged(abi::MAP_ABOUT))
}

pub(super) fn noted_reserved(about: &Array<MapData, About>) -> Result<Vec<RangeInclusive<u16>>, PinnedError> {
    let about = read(about)?;
    let ranges = about.reserved.iter().take(about.reserved_count as usize);
    Ok(ranges.map(|[first, last]| *first..=*last).collect())
}

/// Remembers ports that were added to the reserved ones.
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

/// Records of a map that a process has left, those that are not OFF being in use.
pub(super) fn used_conns(map: &MapData) -> io::Result<Conns> {
    let info = map.info().map_err(into_io)?;
    if info.value_size() as usize != size_of::<Conn>() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Conns::map_used(map.fd().as_fd(), info.max_entries())
}
