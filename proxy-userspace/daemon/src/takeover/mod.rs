//! A hot restart: a new process takes over from an old one. No connection is refused and no request
//! is lost. The sockets and the lock are passed as file descriptors (SCM_RIGHTS). The modules in
//! reading order: `message` has the messages · `wire` carries the messages over a socket · `give`
//! is the part of the old process · `take` is the part of the new process.
//!
//! ```text
//! new                                      old
//!  ├─ TakeOver (version, namespace) ─────▶ refuses, or
//!  ◀───────────────────── Sockets (fds) ─┤
//!  │ builds its rings, binds new addresses │ serves
//!  ├─ Prepared ──────────────────────────▶ stops accepting, ends its hand-overs, gives up the maps
//!  ◀────────────────── Yours (the lock) ─┤ connections wait in the backlog
//!  │ loads programs, adopts the streams    │
//!  ├─ Ready (addresses) ─────────────────▶ closes the lock, and each connection with its next response
//!  │ accepts                               │ relays its streams until they end, or `drain_timeout`
//! ```
//!
//! If the new process ends or is late before `Ready`, the old process ends the new one, takes
//! everything back and goes on. If the old process ends meanwhile, the new process goes on as after
//! a crash.

mod give;
mod message;
mod take;
mod wire;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proxy_common::instance::Instance;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use steer_kernel::ready;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

pub use give::{ControlSocket, Request};
pub use take::{Confirmation, Takeover};

/// In this directory each instance has a directory for its control socket.
const DIRECTORY: &str = "/run/steer";

/// How long to wait for an answer for which the other process has no work to do.
const ANSWER: Duration = Duration::from_secs(5);
/// How long the new process may take to build its rings and bind its sockets, and again to take the
/// streams.
const WORK: Duration = Duration::from_secs(60);

/// How long the other process may take to end, by itself or after a SIGKILL.
const END: Duration = Duration::from_secs(3);

/// Why a takeover failed.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    #[error("cannot use {}", path.display())]
    Socket {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the other process (process {pid}) refuses: {why}")]
    Refused { pid: i32, why: String },
    #[error("the other process (process {pid}) does not answer")]
    Silent { pid: i32 },
    #[error("the other process (process {pid}) has ended")]
    Ended { pid: i32 },
    #[error("the other process (process {pid}) sent an unexpected message: {said}")]
    Unexpected { pid: i32, said: String },
    #[error("the connection to the other process (process {pid}) broke")]
    Broken {
        pid: i32,
        #[source]
        source: io::Error,
    },
}

/// The path of the control socket of an instance.
fn path_of(instance: &Instance) -> PathBuf {
    Path::new(DIRECTORY).join(instance.as_str()).join("takeover.sock")
}

/// Removes the control socket of a process that has died, and its directory. The caller must hold
/// the lock of the instance.
///
/// # Errors
/// A file cannot be removed.
pub fn remove_left(instance: &Instance) -> io::Result<()> {
    match fs::remove_dir_all(Path::new(DIRECTORY).join(instance.as_str())) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// A handle to the other process, to wait for its end.
#[derive(Debug)]
struct Process(AsyncFd<OwnedFd>);

impl Process {
    /// Must be called inside a tokio runtime.
    fn open(pid: i32) -> io::Result<Self> {
        let pid = Pid::from_raw(pid).ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, "the process is in another PID namespace")
        })?;
        let descriptor = pidfd_open(pid, PidfdFlags::NONBLOCK)?;
        ready::descriptor(descriptor, Interest::READABLE).map(Self)
    }

    /// Waits up to [`END`] for the process to end, and returns whether it did. A process that has
    /// ended has closed all its descriptors.
    async fn ends(&self) -> bool {
        // The descriptor becomes readable when the process ends.
        timeout(END, self.0.readable()).await.is_ok_and(|ready| ready.is_ok())
    }
}
