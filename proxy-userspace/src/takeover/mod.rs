//! One process takes over from another without a connection being refused or a request being lost. In reading order:
//!
//! `wire` is what they say to each other, over a socket · `give` is the part of the process that is taken over from ·
//! `take` is that of the other one.
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
mod take;
mod wire;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::config::Instance;

pub use give::{Door, Request};
pub use take::{Taken, Taking};

/// Where each instance has a directory for the sockets by which it is controlled.
const DIRECTORY: &str = "/run/steer";

/// Until an answer that the other process has only to write.
const ANSWER: Duration = Duration::from_secs(5);
/// Until the new process has built its rings and bound its sockets, and again until it has the streams.
const WORK: Duration = Duration::from_secs(60);

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
    #[error("the other process (process {pid}) says something else than is its turn to say: {said}")]
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
