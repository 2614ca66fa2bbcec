//! A hot restart: one process takes over from another without a connection being refused or a request being lost. The
//! sockets and the lock go over as file descriptors (SCM_RIGHTS). In reading order:
//!
//! `message` is what they say to each other · `wire` carries the messages over a socket · `give` is
//! the part of the process that is taken over from · `take` is that of the other one.
//!
//! ```text
//! new                                      old
//!  ├─ TakeOver (version, namespace) ─────▶ refuses, or
//!  ◀───────────────────── Sockets (fds) ─┤
//!  │ reads its rings, binds what is new    │ serves
//!  ├─ Prepared ──────────────────────────▶ accepts nobody, ends its hand-overs, lets go of the maps
//!  ◀────────────────── Yours (the lock) ─┤ connections wait in the backlog
//!  │ loads programs, adopts the streams    │
//!  ├─ Ready (addresses) ─────────────────▶ closes the lock, and each connection with its next response
//!  │ accepts                               │ relays its streams until they end, or `drain_timeout`
//! ```
//!
//! If the new process ends, or is late, before it is ready, the old one ends it, takes everything back and goes on. If the old
//! one ends meanwhile, the new one goes on as after a crash.

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

/// Where each instance has a directory for the sockets by which it is controlled.
const DIRECTORY: &str = "/run/steer";

/// Until an answer that the other process has only to write.
const ANSWER: Duration = Duration::from_secs(5);
/// Until the new process has built its rings and bound its sockets, and again until it has the streams.
const WORK: Duration = Duration::from_secs(60);

/// How long a process that has given up may take to say why and end, and one that was killed to be gone.
const END: Duration = Duration::from_secs(3);

/// A takeover did not come about.
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

/// The socket at which an instance's process is asked to be taken over.
fn path_of(instance: &Instance) -> PathBuf {
    Path::new(DIRECTORY).join(instance.as_str()).join("takeover.sock")
}

/// Removes the socket that a process which died has left, with its directory. To be called by who has the instance's lock.
///
/// # Errors
/// Something is in the way.
pub fn remove_left(instance: &Instance) -> io::Result<()> {
    match fs::remove_dir_all(Path::new(DIRECTORY).join(instance.as_str())) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The other process, to see its end.
#[derive(Debug)]
struct Process(AsyncFd<OwnedFd>);

impl Process {
    /// Must be called inside a tokio runtime.
    fn open(pid: i32) -> io::Result<Self> {
        let pid = Pid::from_raw(pid).ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, "it is in another namespace of processes")
        })?;
        let descriptor = pidfd_open(pid, PidfdFlags::NONBLOCK)?;
        ready::descriptor(descriptor, Interest::READABLE).map(Self)
    }

    /// Whether it ends within a time in which one that dies is gone, with all that it had open.
    async fn ends(&self) -> bool {
        // It is readable when it has ended.
        timeout(END, self.0.readable()).await.is_ok_and(|ready| ready.is_ok())
    }
}
