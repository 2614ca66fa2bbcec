//! Names for instances of `steer`. All network namespaces of a machine see the same pins, so names
//! have to be unique.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result};

/// The directory of Steer's pins.
pub const DIRECTORY: &str = "/sys/fs/bpf/steer";
/// The directory of Steer's control sockets.
pub const SOCKETS: &str = "/run/steer";
const PREFIX: &str = "steer-t";

/// A unique name: `PREFIX-PID-NUMBER`, where PID is the id of this process. When the guard is
/// dropped, the pins under the name are removed, unless a process still uses them.
#[derive(Debug)]
pub struct Instance(String);

impl Instance {
    /// # Errors
    /// When pins that a crashed run left under this name cannot be removed.
    pub fn new() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}-{}-{number}", std::process::id());
        remove(&name)?;
        Ok(Self(name))
    }

    pub fn name(&self) -> &str {
        &self.0
    }

    /// The directory of the instance's pins.
    pub fn pins(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.0)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.0) {
            eprintln!("cannot remove the pins of {}: {error:#}", self.0);
        }
    }
}

/// Removes the pins of test processes that do not exist any more.
///
/// # Errors
/// When the BPF file system cannot be read or written.
pub fn remove_leftovers() -> Result<()> {
    let entries = match fs::read_dir(DIRECTORY) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("cannot list {DIRECTORY}")),
    };
    for entry in entries {
        let name = entry.with_context(|| format!("cannot list {DIRECTORY}"))?.file_name();
        let Some(name) = name.to_str() else { continue };
        if maker_of(name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            remove(name)?;
        }
    }
    Ok(())
}

/// The PID in a name that [`Instance::new`] made.
fn maker_of(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.strip_prefix('-')?.split('-').next()?.parse().ok()
}

fn remove(name: &str) -> Result<()> {
    let path = Path::new(DIRECTORY).join(name);
    let directory = match File::open(&path) {
        Ok(directory) => directory,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("cannot open {}", path.display())),
    };
    // SAFETY: the descriptor is open for as long as `directory` lives.
    let is_free = unsafe { libc::flock(directory.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0;
    if !is_free {
        return Ok(());
    }
    for path in [Path::new(SOCKETS).join(name), path] {
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_maker_is_read_from_the_name() {
        let instance = Instance::new().unwrap();
        assert_eq!(maker_of(instance.name()), Some(std::process::id()));
        assert_eq!(maker_of("default"), None);
    }
}
