//! The maps of the socket splice, typed. The only place that writes them.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _};
use std::sync::{Mutex, MutexGuard, PoisonError};

use aya::Ebpf;
use aya::maps::{HashMap, MapData, MapError, SockHash};
use proxy_common::abi;
use proxy_common::reason::Reason;
use proxy_common::sock::{SockCredit, SockFlow};

/// All maps of the socket splice.
pub(crate) const MAPS: [&str; 5] = [
    abi::MAP_SOCK_TARGET,
    abi::MAP_SOCK_SOURCE,
    abi::MAP_SOCK_FLOW,
    abi::MAP_SOCK_CREDIT,
    abi::MAP_SOCK_EVENTS,
];

/// Flags of BPF_MAP_UPDATE_ELEM (include/uapi/linux/bpf.h).
const BPF_ANY: u64 = 0;
pub(crate) const BPF_NOEXIST: u64 = 1;

/// A socket was not taken into a map.
#[derive(Debug, thiserror::Error)]
pub enum InsertError {
    #[error("the map is full")]
    Full,
    /// The kernel takes established sockets only; this one's peer has closed it.
    #[error("the socket is not established")]
    NotEstablished,
    #[error("the kernel refused the socket")]
    Refused(#[source] io::Error),
}

impl InsertError {
    pub fn reason(&self) -> Reason {
        match self {
            Self::Full => Reason::MapFull,
            Self::NotEstablished => Reason::NotEstablished,
            Self::Refused(_) => Reason::InsertFailed,
        }
    }

    fn from_map(error: MapError) -> Self {
        let error = into_io(error);
        match error.raw_os_error() {
            Some(libc::E2BIG | libc::ENOSPC) => Self::Full,
            Some(libc::EOPNOTSUPP) => Self::NotEstablished,
            _ => Self::Refused(error),
        }
    }
}

/// Two handles on one map, since aya's want `&mut` for writing.
pub(crate) struct Handles<M> {
    /// Locked for one system call at a time.
    writer: Mutex<M>,
    /// Never waits.
    pub(crate) reader: M,
}

impl<M> Handles<M> {
    pub(crate) fn new(writer: M, reader: M) -> Self {
        Self { writer: Mutex::new(writer), reader }
    }

    fn writer(&self) -> MutexGuard<'_, M> {
        // The handle holds a descriptor and nothing that a panic could leave half done.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) type Sockets = Handles<SockHash<MapData, u64>>;
pub(crate) type Values<V> = Handles<HashMap<MapData, u64, V>>;

/// See `proxy-ebpf/src/maps.rs` for what each map means. Keys are socket cookies.
pub struct SockMaps {
    pub(crate) target: Sockets,
    pub(crate) source: Sockets,
    pub(crate) flow: Values<SockFlow>,
    pub(crate) credit: Values<SockCredit>,
    /// Keeps the program attached.
    pub(crate) _programs: Ebpf,
}

impl fmt::Debug for SockMaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // aya's socket maps are not `Debug`.
        f.write_str("SockMaps")
    }
}

/// How many entries each map holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entries {
    pub target: usize,
    pub source: usize,
    pub flow: usize,
    pub credit: usize,
}

impl SockMaps {
    /// Makes `peer` the socket that the bytes of the socket `cookie` go to. Redirects nothing yet.
    /// The kernel takes the entry out when `peer` is closed.
    pub fn insert_target(&self, cookie: u64, peer: impl AsFd) -> Result<(), InsertError> {
        let peer = peer.as_fd().as_raw_fd();
        self.target.writer().insert(cookie, peer, BPF_NOEXIST).map_err(InsertError::from_map)
    }

    pub fn remove_target(&self, cookie: u64) {
        remove(self.target.writer().remove(&cookie), cookie, "target");
    }

    /// Switches the flow from this socket to the kernel, with `credit` to begin with; what has
    /// arrived already is not redirected until [`crate::tcp::hold::kick`]. The kernel takes the
    /// entry out when the socket is closed; [`Self::forget`] takes the rest.
    pub fn insert_source(
        &self,
        cookie: u64,
        socket: impl AsFd,
        credit: SockCredit,
    ) -> Result<(), InsertError> {
        self.flow.writer().insert(cookie, SockFlow::default(), BPF_NOEXIST).map_err(InsertError::from_map)?;
        let socket = socket.as_fd().as_raw_fd();
        let inserted = self
            .credit
            .writer()
            .insert(cookie, credit, BPF_NOEXIST)
            .and_then(|()| self.source.writer().insert(cookie, socket, BPF_NOEXIST))
            .map_err(InsertError::from_map);
        if inserted.is_err() {
            self.forget(cookie);
        }
        inserted
    }

    /// Switches the flow back to userspace. Safe only while nothing arrives at the socket: see
    /// [`crate::tcp::hold`].
    pub fn remove_source(&self, cookie: u64) {
        remove(self.source.writer().remove(&cookie), cookie, "source");
    }

    pub fn set_credit(&self, cookie: u64, credit: SockCredit) -> io::Result<()> {
        self.credit.writer().insert(cookie, credit, BPF_ANY).map_err(into_io)
    }

    /// # Errors
    /// The flow was never inserted, or is forgotten.
    pub fn flow(&self, cookie: u64) -> io::Result<SockFlow> {
        self.flow.reader.get(&cookie, 0).map_err(into_io)
    }

    /// Removes what the kernel does not remove when the socket is closed.
    pub fn forget(&self, cookie: u64) {
        remove(self.flow.writer().remove(&cookie), cookie, "flow");
        remove(self.credit.writer().remove(&cookie), cookie, "credit");
    }

    /// Counts by walking the maps: for tests and diagnosis.
    pub fn entries(&self) -> Entries {
        Entries {
            target: self.target.reader.keys().flatten().count(),
            source: self.source.reader.keys().flatten().count(),
            flow: self.flow.reader.keys().flatten().count(),
            credit: self.credit.reader.keys().flatten().count(),
        }
    }
}

/// An entry may be gone already, or never have been there.
fn remove(result: Result<(), MapError>, cookie: u64, map: &'static str) {
    if let Err(error) = result.map_err(into_io)
        && error.raw_os_error() != Some(libc::ENOENT)
        && error.raw_os_error() != Some(libc::EINVAL)
    {
        tracing::warn!(%error, cookie, map, "cannot remove an entry of a BPF map");
    }
}

pub(crate) fn into_io(error: MapError) -> io::Error {
    match error {
        MapError::SyscallError(error) => error.io_error,
        MapError::IoError(error) => error,
        MapError::KeyNotFound | MapError::ElementNotFound => io::Error::from_raw_os_error(libc::ENOENT),
        error => io::Error::other(error),
    }
}
