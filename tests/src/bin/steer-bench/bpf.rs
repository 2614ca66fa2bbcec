//! The BPF programs and maps of a process, as the kernel lists them.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _};

use anyhow::{Context as _, Result};
use aya::maps::MapInfo;
use aya::programs::{ProgramInfo, loaded_programs};

/// A map that the process holds by a descriptor or through a program.
#[derive(Debug)]
pub(crate) struct Map {
    pub(crate) name: String,
    pub(crate) value_size: u32,
    /// Memory of the map in the kernel: all of an array, but only the present entries of a hash.
    pub(crate) bytes: u64,
}

/// The programs for which the process has a descriptor, either of the program or of its link.
pub(crate) fn programs_of(pid: u32) -> Result<Vec<ProgramInfo>> {
    let ids = ids(pid, "prog_id:")?;
    let is_its = |program: &Result<ProgramInfo, _>| program.as_ref().is_ok_and(|it| ids.contains(&it.id()));
    loaded_programs().filter(is_its).collect::<Result<_, _>>().context("cannot list BPF programs")
}

/// The maps for which the process has a descriptor, or that its programs use.
pub(crate) fn maps_of(pid: u32) -> Result<Vec<Map>> {
    let mut maps = ids(pid, "map_id:")?;
    for program in programs_of(pid)? {
        maps.extend(program.map_ids()?.into_iter().flatten());
    }
    maps.into_iter().map(map).collect()
}

fn map(id: u32) -> Result<Map> {
    let info = MapInfo::from_id(id)?;
    let descriptor = info.fd()?;
    let path = format!("/proc/self/fdinfo/{}", descriptor.as_fd().as_raw_fd());
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    Ok(Map {
        name: info.name_as_str().unwrap_or_default().to_owned(),
        value_size: info.value_size(),
        bytes: field(&text, "memlock:").context("a map without memlock")?,
    })
}

/// The different numbers after `name` in the descriptors of a process.
fn ids(pid: u32, name: &str) -> Result<BTreeSet<u32>> {
    let mut ids = BTreeSet::new();
    let path = format!("/proc/{pid}/fdinfo");
    for entry in fs::read_dir(&path).with_context(|| format!("cannot list {path}"))? {
        // The process may have closed the descriptor since.
        let Ok(info) = fs::read_to_string(entry?.path()) else { continue };
        if let Some(id) = field(&info, name) {
            ids.insert(u32::try_from(id)?);
        }
    }
    Ok(ids)
}

/// The number after `name`, where `name` begins a line.
pub(crate) fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::field;

    #[test]
    fn fields_are_found_at_the_start_of_lines() {
        assert_eq!(field("x\nTCP: inuse 12 orphan 3\n", "TCP: inuse"), Some(12));
        assert_eq!(field("map_id:\t7\n", "map_id:"), Some(7));
        assert_eq!(field("x", "y"), None);
    }
}
