//! Connections to endpoints that are kept for the next request.
//!
//! A connection has no task of its own: the request that uses it reads and writes it, and while it is
//! idle nobody does. So a request and its answer cost no wake-up and no lock that anybody else holds;
//! what an idle connection has to say (that it was closed) is read when it is taken.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::io::Io;

/// Shorter than the 5 s after which Node's HTTP server (socket.io's) closes an idle connection, so
/// that it is rarely closed just when a request is written to it.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);
/// Idle connections kept for each endpoint.
const MAX_IDLE: usize = 256;
/// How often those that have expired are closed.
const SWEEP: Duration = Duration::from_secs(1);

/// Which connections are as good as each other: those of a cluster to an endpoint. By name, since the
/// cluster may be of another generation by the time the connection is idle.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key {
    pub cluster: Arc<str>,
    pub endpoint: SocketAddr,
}

/// The idle connections of one worker, to the endpoints of all clusters.
#[derive(Debug, Default)]
pub struct Pool {
    idle: Arc<Mutex<Idle>>,
}

#[derive(Debug, Default)]
struct Idle {
    /// The one that was used last is the last.
    parked: HashMap<Key, Vec<Parked>>,
    /// There is a task that closes the expired ones.
    swept: bool,
}

#[derive(Debug)]
struct Parked {
    connection: Io,
    since: Instant,
}

impl Parked {
    fn has_expired(&self, now: Instant) -> bool {
        now.duration_since(self.since) >= IDLE_TIMEOUT
    }
}

fn lock(idle: &Mutex<Idle>) -> MutexGuard<'_, Idle> {
    // Nothing panics while the lock is held.
    idle.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// The connection that was used last and that the endpoint has not closed, so far as is known.
    pub fn take(&self, key: &Key) -> Option<Io> {
        let mut idle = lock(&self.idle);
        let parked = idle.parked.get_mut(key)?;
        let now = Instant::now();
        while let Some(last) = parked.pop() {
            if last.has_expired(now) {
                // And so have all others.
                parked.clear();
            } else if last.connection.is_quiet() {
                return Some(last.connection);
            }
        }
        None
    }

    /// Keeps a connection on which a request and its response are over.
    pub fn put(&self, key: Key, mut connection: Io) {
        connection.release_buffer();
        let mut idle = lock(&self.idle);
        let parked = idle.parked.entry(key).or_default();
        if parked.len() < MAX_IDLE {
            parked.push(Parked { connection, since: Instant::now() });
        }
        if !std::mem::replace(&mut idle.swept, true) {
            tokio::spawn(sweep(Arc::downgrade(&self.idle)));
        }
    }
}

impl Idle {
    /// Closes the expired connections; false: there are no others.
    fn sweep(&mut self) -> bool {
        let now = Instant::now();
        self.parked.retain(|_, parked| {
            // They are in the order of their time.
            let expired = parked.partition_point(|parked| parked.has_expired(now));
            parked.drain(..expired);
            !parked.is_empty()
        });
        self.swept = !self.parked.is_empty();
        self.swept
    }
}

/// Closes what has expired for as long as there is anything.
async fn sweep(idle: Weak<Mutex<Idle>>) {
    loop {
        tokio::time::sleep(SWEEP).await;
        if !idle.upgrade().is_some_and(|idle| lock(&idle).sweep()) {
            return;
        }
    }
}
