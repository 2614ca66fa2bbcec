//! The BPF file system, in which maps and links outlive the process that made them. Each instance
//! of Steer has a directory there, which belongs to one process at a time.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use proxy_common::instance::Instance;
use rustix::fs::{FlockOperation, flock, statfs};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

use crate::net::host;

/// Where systemd mounts the BPF file system, and everybody looks for it.
const BPFFS: &str = "/sys/fs/bpf";
/// BPF_FS_MAGIC (include/uapi/linux/magic.h).
const BPFFS_MAGIC: u32 = 0xcafe_4a11;
const DIRECTORY: &str = "/sys/fs/bpf/steer";
/// A directory that marks a file system in a mount namespace that may end with its processes.
const PRIVATE: &str = "/sys/fs/bpf/steer-private";

/// The directory of an instance cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PinsError {
    #[error("there is no BPF file system on {BPFFS}, and it cannot be mounted (`mount -t bpf bpf {BPFFS}`)")]
    NoFileSystem(#[source] io::Error),
    /// Before Linux 5.14, which is too old for the programs, too.
    #[error("the kernel does not tell network namespaces apart (SO_NETNS_COOKIE)")]
    NoCookie(#[source] io::Error),
    /// Another process holds the lock.
    #[error("another process runs instance `{0}`")]
    Owned(Instance),
    #[error("cannot use {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl PinsError {
    fn at(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}

/// The directory of an instance, locked against all other processes as long as the value lives. The
/// kernel releases the lock when the process ends, in whatever way.
#[derive(Debug)]
pub struct Pins {
    instance: Instance,
    path: PathBuf,
    /// `None` once it was [given away](Pins::give_away).
    lock: Mutex<Option<File>>,
    /// Whether another process has given this one the instance, and may want it back.
    is_given: bool,
}

impl Pins {
    /// Takes an instance. Makes its directory and mounts the BPF file system, if they are missing.
    ///
    /// # Errors
    /// Another process has the instance, or there is no BPF file system and none can be mounted.
    pub fn take(instance: &Instance) -> Result<Self, PinsError> {
        host::netns_cookie().map_err(PinsError::NoCookie)?;
        mount_once().map_err(PinsError::NoFileSystem)?;
        let path = path_of(instance);
        loop {
            match fs::create_dir_all(&path) {
                // Another process has removed the directory of all instances meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                made => made.map_err(PinsError::at(&path))?,
            }
            if let Some(pins) = Self::take_existing(instance)? {
                return Ok(pins);
            }
        }
    }

    /// The same, but only if the directory exists; otherwise `None`.
    ///
    /// # Errors
    /// Another process has it.
    pub fn take_existing(instance: &Instance) -> Result<Option<Self>, PinsError> {
        let path = path_of(instance);
        let lock = match File::open(&path) {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(PinsError::at(&path)(error)),
        };
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(PinsError::Owned(instance.clone())),
            Err(error) => return Err(PinsError::at(&path)(error.into())),
        }
        // The last owner may have removed the directory since it was opened.
        let is_there = is_of(&lock, &path).map_err(PinsError::at(&path))?;
        Ok(is_there.then(|| Self::of_lock(instance, path, lock)))
    }

    /// Takes an instance whose owner has [given away](Self::give_away) its lock to this process.
    ///
    /// # Errors
    /// The lock is that of another directory.
    pub fn take_over(instance: &Instance, lock: File) -> Result<Self, PinsError> {
        let path = path_of(instance);
        match is_of(&lock, &path) {
            Ok(true) => Ok(Self { is_given: true, ..Self::of_lock(instance, path, lock) }),
            Ok(false) => Err(PinsError::at(&path)(io::ErrorKind::NotFound.into())),
            Err(error) => Err(PinsError::at(&path)(error)),
        }
    }

    fn of_lock(instance: &Instance, path: PathBuf, lock: File) -> Self {
        Self { instance: instance.clone(), path, lock: Mutex::new(Some(lock)), is_given: false }
    }

    /// The lock, for the instance's next owner. The instance stays taken until every process that
    /// has the lock has closed it. `None` if the lock was given away before.
    pub fn give_away(&self) -> Option<File> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Whether the file system may be gone, and everything that is pinned with it, when this
    /// process has ended.
    pub fn is_private(&self) -> bool {
        Path::new(PRIVATE).exists()
    }

    pub fn instance(&self) -> &Instance {
        &self.instance
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The entries of the directory: one directory for each version of the maps.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn versions(&self) -> io::Result<Vec<String>> {
        names(&self.path)
    }

    /// Removes the empty directory, unless another process may want the instance back.
    ///
    /// # Errors
    /// It is not empty, or the file system refuses.
    pub(crate) fn leave(&self) -> io::Result<()> {
        if !self.is_given {
            fs::remove_dir(&self.path)?;
            remove_common_directory();
        }
        Ok(())
    }

    /// Removes all pins, and with them everything that nobody else holds. The instance stays taken.
    ///
    /// # Errors
    /// Something is in the way.
    pub fn remove(&self) -> Result<(), PinsError> {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(PinsError::at(&self.path)(error));
            }
            _ => {}
        }
        remove_common_directory();
        Ok(())
    }
}

/// Removes the directory of all instances, unless another instance has pins there.
fn remove_common_directory() {
    // The file system refuses to remove a directory that is not empty.
    fs::remove_dir(DIRECTORY).ok();
}

/// The instances that have a directory, taken or not, sorted.
///
/// # Errors
/// The directory cannot be read.
pub fn instances() -> Result<Vec<Instance>, PinsError> {
    let path = Path::new(DIRECTORY);
    let mut names = names(path).map_err(PinsError::at(path))?;
    names.sort();
    // Entries with other names are not Steer's.
    Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
}

/// The entries of a directory; none if it is not there.
pub(crate) fn names(path: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// The directory of an instance.
pub(crate) fn path_of(instance: &Instance) -> PathBuf {
    Path::new(DIRECTORY).join(instance.as_str())
}

/// Whether an open directory is the one that is at `path` now.
fn is_of(directory: &File, path: &Path) -> io::Result<bool> {
    let number = directory.metadata()?.ino();
    Ok(fs::metadata(path).is_ok_and(|there| there.ino() == number))
}

fn mount_once() -> io::Result<()> {
    let is_mounted = || statfs(BPFFS).map(|found| found.f_type as u32 == BPFFS_MAGIC);
    if is_mounted()? {
        return Ok(());
    }
    // One process at a time: a second file system would hide the first.
    let below = File::open(BPFFS)?;
    flock(&below, FlockOperation::LockExclusive)?;
    if is_mounted()? {
        return Ok(());
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("bpf", BPFFS, "bpf", flags, c"mode=0700")?;
    tracing::info!(at = BPFFS, "mounted the BPF file system");
    if mounts_are_private() {
        fs::create_dir(PRIVATE)?;
        tracing::warn!(
            at = BPFFS,
            "mounted in a namespace of mounts that may end with this process, so streams end with it: mount the BPF file \
             system on the host, and let it be seen here"
        );
    }
    Ok(())
}

/// Whether a parent or a further ancestor of this process is in another mount namespace, like a
/// shell that called `ip netns exec`. An ancestor that cannot be examined counts as being in the
/// same.
fn mounts_are_private() -> bool {
    let mounts = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    let parent = |process: &str| {
        let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().to_owned();
        (parent != "0").then_some(parent)
    };
    let own = mounts("self");
    std::iter::successors(parent("self"), |process| parent(process))
        .any(|process| mounts(&process).is_some_and(|others| Some(others) != own))
}
