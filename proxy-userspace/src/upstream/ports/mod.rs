//! Source ports of streams. A stream that the kernel carries has no socket, so the kernel would give its
//! port to another connection and the two would meet at the endpoint. Hence streams get their ports
//! here, from ranges that the kernel gives nobody by itself, and keep them as long as anything of
//! them is left.
//!
//! One port serves any number of endpoints at once, since connections differ by all four of their
//! numbers: what is counted is (source address, endpoint) -> ports.

mod free;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use prometheus::{IntGauge, IntGaugeVec};
use thiserror::Error;

use self::free::FreePorts;
use crate::telemetry::Telemetry;

/// Hands out source ports. One for the whole process; clones share everything.
#[derive(Debug, Clone)]
pub struct SourcePorts {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// All that a pool may give out.
    ranges: Box<[RangeInclusive<u16>]>,
    /// Grows to configured clusters' sources x endpoints and stays: an empty pool still knows which of its
    /// ports rest, and takes 9 KiB.
    pools: Mutex<Pools>,
    gauges: IntGaugeVec,
}

#[derive(Debug, Default)]
struct Pools {
    by_pair: HashMap<(IpAddr, SocketAddr), Arc<Pool>>,
    budgets: HashMap<SocketAddr, Arc<Budget>>,
}

/// The ports of one source address towards one endpoint.
#[derive(Debug)]
struct Pool {
    source: IpAddr,
    free: Mutex<FreePorts>,
    budget: Arc<Budget>,
}

/// How much of an endpoint's ports, over all source addresses, is in use.
#[derive(Debug)]
struct Budget {
    endpoint: SocketAddr,
    used: IntGauge,
    limit: IntGauge,
    /// The warning has been given and the use has not gone down since.
    crowded: AtomicBool,
}

/// All source ports towards an endpoint are taken by living streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("all {limit} source ports towards {endpoint} are in use")]
pub struct PortsExhausted {
    pub endpoint: SocketAddr,
    pub limit: i64,
}

/// A source port towards one endpoint that nobody else is given while this lives.
#[derive(Debug)]
pub struct Lease {
    pool: Arc<Pool>,
    port: u16,
    foreign: bool,
}

impl SourcePorts {
    /// `ranges` must not overlap.
    pub fn new(ranges: &[RangeInclusive<u16>], telemetry: &Telemetry) -> Self {
        let gauges = telemetry.metrics.source_ports.clone();
        Self { inner: Arc::new(Inner { ranges: ranges.into(), pools: Mutex::default(), gauges }) }
    }

    /// A port of `source` for a connection to `endpoint`: of those that are free, the one that has rested
    /// longest, or almost.
    pub fn lease(&self, source: IpAddr, endpoint: SocketAddr) -> Result<Lease, PortsExhausted> {
        self.lease_any(&[source], endpoint)
    }

    /// [`lease`](Self::lease) from the source address that has most ports left.
    pub fn lease_any(&self, sources: &[IpAddr], endpoint: SocketAddr) -> Result<Lease, PortsExhausted> {
        let mut pools = self.pools_of(sources, endpoint);
        pools.sort_by_cached_key(|pool| std::cmp::Reverse(lock(&pool.free).left()));
        let lease = pools.iter().find_map(Pool::lease);
        lease.ok_or_else(|| {
            let limit = pools.first().map_or(0, |pool| pool.budget.limit.get());
            PortsExhausted { endpoint, limit }
        })
    }

    fn pools_of(&self, sources: &[IpAddr], endpoint: SocketAddr) -> Vec<Arc<Pool>> {
        let endpoint = SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port());
        let pools = &mut *lock(&self.inner.pools);
        let budget = pools.budgets.entry(endpoint).or_insert_with(|| self.budget(endpoint));
        let pool = |source: &IpAddr| {
            let source = source.to_canonical();
            let pool = pools.by_pair.entry((source, endpoint)).or_insert_with(|| {
                let free = FreePorts::new(&self.inner.ranges);
                budget.limit.add(i64::from(free.left()));
                Arc::new(Pool { source, free: Mutex::new(free), budget: Arc::clone(budget) })
            });
            Arc::clone(pool)
        };
        sources.iter().map(pool).collect()
    }

    fn budget(&self, endpoint: SocketAddr) -> Arc<Budget> {
        let text = endpoint.to_string();
        let gauge = |kind| self.inner.gauges.with_label_values(&[text.as_str(), kind]);
        Arc::new(Budget {
            endpoint,
            used: gauge("used"),
            limit: gauge("limit"),
            crowded: AtomicBool::new(false),
        })
    }
}

impl Pool {
    fn lease(self: &Arc<Self>) -> Option<Lease> {
        let port = lock(&self.free).take(Instant::now())?;
        self.budget.taken();
        Some(Lease { pool: Arc::clone(self), port, foreign: false })
    }
}

impl Budget {
    const WARN_PERCENT: i64 = 80;
    /// Below this, the next crossing is worth another warning.
    const CALM_PERCENT: i64 = 70;

    fn taken(&self) {
        self.used.inc();
        let (used, limit) = (self.used.get(), self.limit.get());
        if used * 100 >= limit * Self::WARN_PERCENT && !self.crowded.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                endpoint = %self.endpoint,
                used,
                limit,
                "source ports are running out, streams beyond the limit will be relayed: give the cluster more \
                 source_addresses"
            );
        }
    }

    fn given_back(&self) {
        self.used.dec();
        if self.used.get() * 100 < self.limit.get() * Self::CALM_PERCENT {
            self.crowded.store(false, Ordering::Relaxed);
        }
    }
}

impl Lease {
    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(self.pool.source, self.port)
    }

    /// Gives the port back as one that somebody else on this host uses: it is left alone for a minute.
    pub fn give_back_foreign(mut self) {
        self.foreign = true;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut free = lock(&self.pool.free);
        if self.foreign {
            free.set_aside(self.port, Instant::now());
        } else {
            free.give_back(self.port);
        }
        drop(free);
        self.pool.budget.given_back();
    }
}

/// Nothing panics while one of these locks is held, and what they guard is whole between any two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
