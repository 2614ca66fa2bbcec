//! Which thread serves a connection.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::runtime::Handle;

use super::Shared;

/// A runtime that serves connections. Each stays with its worker for life, and finds what it shares with
/// others, such as connections to endpoints, on the same thread.
#[derive(Debug, Clone)]
pub struct Worker {
    pub(super) runtime: Handle,
    pub(super) shared: Arc<Shared>,
    connections: Arc<AtomicUsize>,
}

/// A connection, or the stream that it became, that keeps a worker busy.
#[derive(Debug)]
pub(super) struct Load {
    connections: Arc<AtomicUsize>,
}

impl Worker {
    pub fn new(runtime: Handle, shared: Arc<Shared>) -> Self {
        Self { runtime, shared, connections: Arc::default() }
    }

    fn load(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Counts one connection more.
    pub(super) fn take_on(&self) -> Load {
        self.connections.fetch_add(1, Ordering::Relaxed);
        Load { connections: Arc::clone(&self.connections) }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The position of the worker with the fewest connections; of several, the first at or after `turn`.
pub(super) fn least_loaded(workers: &[Worker], turn: usize) -> usize {
    least(workers.len(), turn, |position| workers[position].load())
}

fn least(count: usize, turn: usize, load: impl Fn(usize) -> usize) -> usize {
    let positions = (0..count).map(|step| (turn + step) % count);
    positions.min_by_key(|&position| load(position)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_dealt_evenly() {
        let mut loads = [3, 0, 1];
        let mut turn = 0;
        for _ in 0..8 {
            let chosen = least(loads.len(), turn, |position| loads[position]);
            loads[chosen] += 1;
            turn = chosen + 1;
        }
        assert_eq!(loads, [4, 4, 4]);
        assert_eq!(least(3, 2, |_| 7), 2, "in turn where all have the same");
        assert_eq!(least(3, 5, |_| 7), 2);
        assert_eq!(least(1, 9, |_| 7), 0);
    }
}
