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

/// The position of the worker that gets a connection which the worker at `own` has accepted: that worker, as long as no
/// other has clearly fewer connections. A connection that changes threads costs a system call and a switch of threads.
pub(super) fn choose(workers: &[Worker], own: usize) -> usize {
    choose_by(workers.len(), own, |position| workers[position].load())
}

fn choose_by(count: usize, own: usize, load: impl Fn(usize) -> usize) -> usize {
    let others = (1..count).map(|step| (own + step) % count);
    let Some(least) = others.min_by_key(|&position| load(position)) else { return own };
    let enough = load(least) + load(least) / 8 + 1;
    if load(own) <= enough { own } else { least }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_stay_until_another_worker_has_clearly_fewer() {
        let choose = |own, loads: &[usize]| choose_by(loads.len(), own, |position| loads[position]);
        assert_eq!(choose(0, &[9]), 0, "alone");
        assert_eq!(choose(1, &[0, 1, 0]), 1, "one more");
        assert_eq!(choose(1, &[0, 2, 0]), 2, "the next of those with the fewest");
        assert_eq!(choose(0, &[91, 80]), 0, "an eighth more");
        assert_eq!(choose(0, &[92, 80]), 1);
    }

    #[test]
    fn what_one_worker_accepts_is_dealt_to_all() {
        let mut loads = [0; 64];
        for _ in 0..6400 {
            loads[choose_by(loads.len(), 3, |position| loads[position])] += 1;
        }
        let (fewest, most) = (loads.iter().min(), loads.iter().max());
        assert!(fewest >= Some(&98) && most <= Some(&115), "{loads:?}");
    }
}
