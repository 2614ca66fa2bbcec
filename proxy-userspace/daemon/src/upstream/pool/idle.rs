//! The connections that wait for a request.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::Key;
use super::connection::PooledConn;

/// Shorter than the 5 s after which Node's HTTP server (socket.io's) closes an idle connection, so
/// that it is rarely closed just when a request is written to it.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);
/// Idle connections kept for each endpoint.
const MAX_IDLE: usize = 256;
/// How often those that have expired are closed.
const SWEEP: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct Idle {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The one that was used last is the last.
    parked: HashMap<Key, Vec<Parked>>,
    /// There is a task that closes the expired ones.
    swept: bool,
}

#[derive(Debug)]
struct Parked {
    connection: Box<PooledConn>,
    since: Instant,
}

impl Parked {
    fn has_expired(&self, now: Instant) -> bool {
        now.duration_since(self.since) >= IDLE_TIMEOUT
    }
}

impl Idle {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while the lock is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection that was used last. Its endpoint may have closed it.
    pub(super) fn take(&self, key: &Key) -> Option<Box<PooledConn>> {
        let mut state = self.lock();
        let parked = state.parked.get_mut(key)?;
        let last = parked.pop()?;
        if last.has_expired(Instant::now()) {
            // And so have all others.
            parked.clear();
            return None;
        }
        Some(last.connection)
    }

    /// Keeps a connection that is ready for a request.
    pub(super) fn put(self: &Arc<Self>, key: Key, connection: Box<PooledConn>) {
        connection.let_go();
        let mut state = self.lock();
        let parked = state.parked.entry(key).or_default();
        if parked.len() < MAX_IDLE {
            parked.push(Parked { connection, since: Instant::now() });
        }
        if !std::mem::replace(&mut state.swept, true) {
            tokio::spawn(sweep(Arc::downgrade(self)));
        }
    }

    /// Keeps a connection once its request and response are over.
    pub(super) async fn keep_when_ready(self: Arc<Self>, key: Key, mut connection: Box<PooledConn>) {
        if connection.ready().await {
            self.put(key, connection);
        }
    }

    /// Closes the expired connections; false: there are no others.
    fn sweep(&self) -> bool {
        let now = Instant::now();
        let mut state = self.lock();
        state.parked.retain(|_, parked| {
            // They are in the order of their time.
            let expired = parked.partition_point(|parked| parked.has_expired(now));
            parked.drain(..expired);
            !parked.is_empty()
        });
        state.swept = !state.parked.is_empty();
        state.swept
    }
}

/// Closes what has expired for as long as there is anything.
async fn sweep(idle: Weak<Idle>) {
    loop {
        tokio::time::sleep(SWEEP).await;
        if !idle.upgrade().is_some_and(|idle| idle.sweep()) {
            return;
        }
    }
}
