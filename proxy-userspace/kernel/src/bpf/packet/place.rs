//! The place of a process that starts: the directory where it pins its maps and links, and the
//! streams of the instance's last process that it finds there or in other directories.

use std::fs;
use std::path::{Path, PathBuf};

use aya::maps::{Array, MapData};
use bytemuck::Zeroable as _;
use proxy_common::abi;
use proxy_common::about::About;
use proxy_common::instance::Instance;
use proxy_common::layout::{ENTRIES, Entry, LAYOUT};

use super::migrate::{Goal, Migration};
use super::pinned::{PinnedError, PinnedMaps, UNUSED, is_attached, netns, used_directories, version, write};
use super::records::Records;
use crate::bpf::pins::Pins;
use crate::bpf::sock::maps::into_io;
use crate::failpoint;

/// Where a process that starts pins its maps and links.
#[derive(Debug)]
pub(super) struct Place {
    /// The instance of the process.
    pub(super) instance: Instance,
    /// Where the maps are, or will be.
    pub(super) path: PathBuf,
    /// How many streams the maps have room for, or will have.
    pub(super) capacity: u32,
    /// Whether the maps exist, with streams.
    pub(super) adopts: bool,
    /// What the instance's last process has noted, whether it has left streams or not.
    before: About,
    /// The streams that are in other maps.
    migration: Option<Migration>,
}

impl Place {
    /// Finds the streams of the instance's last process, or makes room for the streams of this
    /// process: for `max_records` records, or for as many as the found streams need to keep their
    /// indices.
    pub(super) fn find(pins: &Pins, max_records: u32) -> Result<Self, PinnedError> {
        remove_unused(pins)?;
        let mut found = used_directories(pins.path())?
            .into_iter()
            .map(PinnedMaps::open)
            .collect::<Result<Vec<_>, _>>()?;
        let here = netns()?;
        remove_abandoned(&mut found, here)?;
        let before = found.iter().find(|maps| maps.about.netns == here);
        let before = before.map_or_else(About::zeroed, |maps| maps.about);
        let needed = found.iter().map(PinnedMaps::needed).max().unwrap_or(0);
        if needed > 0 && found.iter().any(|maps| maps.about.netns != here) {
            return Err(PinnedError::OtherNamespace);
        }
        if needed == 0 {
            // The maps are made anew.
            for maps in found.drain(..) {
                maps.remove().map_err(|source| PinnedError::io(maps.path(), source))?;
            }
        }
        let largest = found.iter().map(PinnedMaps::capacity).max().unwrap_or(0);
        let capacity = if needed <= max_records { max_records } else { largest };
        // The latest directory is the goal. If the last process has died while it was filling the
        // goal, the missing changes are noted in the goal later.
        let is_interrupted = found.len() > 1;
        let fits =
            |maps: &PinnedMaps| maps.capacity() == capacity || is_interrupted && maps.capacity() >= needed;
        let own = found.iter().rposition(|maps| maps.is_own() && fits(maps)).map(|index| found.remove(index));
        let migration = (!found.is_empty()).then(|| Migration::new(found));
        let adopts = own.is_some();
        let (path, capacity) = match own {
            Some(maps) => (maps.path().to_owned(), maps.capacity()),
            None => (fresh(pins)?, capacity),
        };
        Ok(Self { instance: pins.instance().clone(), path, capacity, adopts, before, migration })
    }

    /// Whether there is no stream, neither in these maps nor in other maps.
    pub(super) fn is_new(&self) -> bool {
        !self.adopts && self.migration.is_none()
    }

    /// Copies the streams that are in other maps.
    pub(super) fn fill(&mut self, goal: &Goal<'_>) -> Result<(), PinnedError> {
        match &mut self.migration {
            Some(migration) if !self.adopts => {
                migration.copy(goal)?;
                failpoint::reached("copied");
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Describes the maps in `about` and `layout`, and gives the directory its name. From then on
    /// the directory counts, together with the links. The links must get the new programs right
    /// after this.
    pub(super) fn complete(
        &mut self,
        about: &mut Array<MapData, About>,
        layout: &mut Array<MapData, Entry>,
        records: &Records,
    ) -> Result<(), PinnedError> {
        for (index, entry) in (0..).zip(ENTRIES) {
            layout.set(index, entry, 0).map_err(into_io).map_err(PinnedError::damaged(abi::MAP_LAYOUT))?;
        }
        write(about, About { layout: LAYOUT, netns: netns()?, pid: std::process::id(), ..self.before })?;
        if !self.adopts {
            let path = free_name(&self.path);
            fs::rename(&self.path, &path).map_err(|source| PinnedError::io(&path, source))?;
            self.path = path;
        }
        if let Some(migration) = &mut self.migration {
            failpoint::reached("named");
            migration.move_links(&self.path)?;
            migration.look_again(records);
        }
        Ok(())
    }

    /// To be called when all links have new programs: from then on only these maps are in use.
    pub(super) fn settle(self, records: &Records) {
        if let Some(mut migration) = self.migration {
            failpoint::reached("switched");
            migration.finish(records);
        }
    }
}

/// Removes directories of processes that died while they made or removed them.
fn remove_unused(pins: &Pins) -> Result<(), PinnedError> {
    let names = pins.versions().map_err(|source| PinnedError::io(pins.path(), source))?;
    for name in names.iter().filter(|name| name.ends_with(UNUSED)) {
        let path = pins.path().join(name);
        fs::remove_dir_all(&path).map_err(|source| PinnedError::io(&path, source))?;
    }
    Ok(())
}

/// Removes the pins of a start that the kernel has refused: all pins if the place `is_new`,
/// otherwise the pins in directories that do not count yet.
pub(super) fn remove_refused(pins: &Pins, is_new: bool) -> Result<(), PinnedError> {
    if !is_new {
        return remove_unused(pins);
    }
    let names = pins.versions().map_err(|source| PinnedError::io(pins.path(), source))?;
    for name in names {
        let path = pins.path().join(name);
        fs::remove_dir_all(&path).map_err(|source| PinnedError::io(&path, source))?;
    }
    pins.leave().map_err(|source| PinnedError::io(pins.path(), source))
}

/// Removes the maps about a network namespace that is gone, together with the interfaces that had
/// the programs.
fn remove_abandoned(found: &mut Vec<PinnedMaps>, here: u64) -> Result<(), PinnedError> {
    let mut kept = Vec::new();
    for maps in found.drain(..) {
        if maps.about.netns == here || is_attached(maps.path())? {
            kept.push(maps);
            continue;
        }
        maps.remove().map_err(|source| PinnedError::io(maps.path(), source))?;
        let streams = maps.used().count();
        tracing::info!(streams, "removed what was left of a network namespace that is gone");
    }
    *found = kept;
    Ok(())
}

/// Makes an empty directory that does not count yet.
fn fresh(pins: &Pins) -> Result<PathBuf, PinnedError> {
    let path = pins.path().join(version() + UNUSED);
    fs::create_dir(&path).map_err(|source| PinnedError::io(&path, source))?;
    Ok(path)
}

/// A free name beside `path`: the name of this version, or the name with the lowest free number
/// appended.
fn free_name(path: &Path) -> PathBuf {
    let mut names = std::iter::once(version()).chain((2..).map(|number| format!("{}-{number}", version())));
    let free = names.find_map(|name| Some(path.with_file_name(name)).filter(|path| !path.exists()));
    free.expect("numbers do not end")
}
