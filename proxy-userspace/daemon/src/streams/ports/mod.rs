//! Source ports of streams. A stream that the kernel carries has no socket, so the kernel would give its
//! port to another connection and the two would meet at the endpoint. Hence streams get their ports
//! here, from ranges that the kernel gives nobody by itself, and keep them as long as anything of
//! them is left.
//!
//! One port serves any number of endpoints at once, since connections differ by all four of their
//! numbers: what is counted is (source address, endpoint) -> ports.

mod free;
mod ranges;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus::{IntGauge, IntGaugeVec};
use steer_kernel::net::route::Sources;
use steer_kernel::net::{canonical, host};
use thiserror::Error;

use self::free::FreePorts;
use crate::telemetry::Metrics;

/// Of the gauge `steer_source_ports`.
const BUDGET_KINDS: [&str; 2] = ["used", "limit"];

/// Longer than any port rests or is left alone, so that nothing is lost with a pool.
const FORGET_AFTER: Duration = Duration::from_secs(600);

/// Hands out source ports. One for the whole process; clones share everything.
#[derive(Debug, Clone)]
pub struct SourcePorts {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// All that a pool may give out.
    ranges: Box<[RangeInclusive<u16>]>,
    /// Those of them that were reserved for it.
    reserved: Box<[RangeInclusive<u16>]>,
    pools: Mutex<Pools>,
    gauges: IntGaugeVec,
    sources: Sources,
}

#[derive(Debug, Default)]
struct Pools {
    /// A pool takes 9 KiB, also while it is empty, since it knows which of its ports rest.
    by_pair: HashMap<(IpAddr, SocketAddr), Kept>,
    budgets: HashMap<SocketAddr, Arc<Budget>>,
}

#[derive(Debug)]
struct Kept {
    pool: Arc<Pool>,
    /// When the pool was asked for a port last.
    asked: Instant,
}

/// The ports of one source address towards one endpoint.
#[derive(Debug)]
struct Pool {
    source: IpAddr,
    free: Mutex<FreePorts>,
    budget: Arc<Budget>,
}

/// What is known of an endpoint: how much of its ports, over all source addresses, is in use, and its MSS.
#[derive(Debug)]
struct Budget {
    endpoint: SocketAddr,
    used: IntGauge,
    limit: IntGauge,
    /// The largest segment that the endpoint is known to accept; 0: nothing is known.
    mss: AtomicU16,
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

/// There are no source ports for streams.
#[derive(Debug, Error)]
pub enum PortsError {
    #[error("cannot read the kernel's settings of local ports")]
    Unreadable(#[source] io::Error),
    #[error(
        "the kernel gives out all ports ({}) by itself, which leaves none for streams: name some of them as \
         packet_splice.source_ports, or make net.ipv4.ip_local_port_range smaller",
        ranges::text(std::slice::from_ref(local))
    )]
    NoneLeft { local: RangeInclusive<u16> },
    #[error(
        "the kernel gives out ports of packet_splice.source_ports by itself, and they cannot be reserved from \
         here: run `sysctl -w net.ipv4.ip_local_reserved_ports={list}`"
    )]
    CannotReserve {
        /// All that has to be reserved, with what is now.
        list: String,
        #[source]
        source: io::Error,
    },
}

/// A source port towards one endpoint that nobody else is given while this lives.
#[derive(Debug)]
pub struct Lease {
    pool: Arc<Pool>,
    port: u16,
    foreign: bool,
}

impl SourcePorts {
    /// With the configured ports, which are reserved if the kernel would give them out, or else with those that
    /// it does not.
    pub fn start(configured: Option<&[RangeInclusive<u16>]>, metrics: &Metrics) -> Result<Self, PortsError> {
        let local = host::ip_local_port_range().map_err(PortsError::Unreadable)?;
        let reserved = host::reserved_ports().map_err(PortsError::Unreadable)?;
        let (ranges, added) = match configured {
            Some(ranges) => {
                let added = ranges::given_out(ranges, local.clone(), &reserved);
                reserve(&added, &reserved)?;
                (ranges.to_vec(), added)
            }
            None => (ranges::by_default(local.clone(), &reserved), Vec::new()),
        };
        if ranges.is_empty() {
            return Err(PortsError::NoneLeft { local });
        }
        tracing::info!(ports = ranges::text(&ranges), "source ports for streams");
        Ok(Self::with_reserved(&ranges, &added, metrics))
    }

    /// `ranges` must not overlap.
    pub fn new(ranges: &[RangeInclusive<u16>], metrics: &Metrics) -> Self {
        Self::with_reserved(ranges, &[], metrics)
    }

    fn with_reserved(
        ranges: &[RangeInclusive<u16>],
        reserved: &[RangeInclusive<u16>],
        metrics: &Metrics,
    ) -> Self {
        let (ranges, reserved) = (ranges.into(), reserved.into());
        let gauges = metrics.source_ports.clone();
        let (pools, sources) = (Mutex::default(), Sources::new());
        Self { inner: Arc::new(Inner { ranges, reserved, pools, gauges, sources }) }
    }

    /// The ports that were reserved at the start, and were not before; to be given back by [`unreserve`] when no stream is
    /// left that uses them.
    pub fn reserved(&self) -> &[RangeInclusive<u16>] {
        &self.inner.reserved
    }

    /// Whether another Steer here may give out ports of these ranges too, which has `reserved` such ports, or none: then its
    /// ranges are taken to be what the kernel gives nobody.
    pub fn may_meet(&self, reserved: &[RangeInclusive<u16>]) -> bool {
        let ours = &self.inner.ranges;
        let meets = |theirs: &[RangeInclusive<u16>]| ranges::overlap(ours, theirs);
        if !reserved.is_empty() {
            return meets(reserved);
        }
        let (local, none) = (host::ip_local_port_range(), host::reserved_ports());
        match (local, none) {
            (Ok(local), Ok(reserved)) => meets(&ranges::by_default(local, &reserved)),
            _ => true,
        }
    }

    /// The address that the kernel would connect to the endpoint from.
    ///
    /// # Errors
    /// There is no route.
    pub fn source_towards(&self, endpoint: SocketAddr) -> io::Result<IpAddr> {
        self.inner.sources.towards(endpoint.ip())
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

    /// The port of a connection that is there already, of an earlier process; `None` if it is none of those that are given
    /// out.
    pub fn lease_this(&self, source: SocketAddr, endpoint: SocketAddr) -> Option<Lease> {
        let pool = self.pools_of(&[source.ip()], endpoint).pop()?;
        let is_taken = lock(&pool.free).take_this(source.port());
        is_taken.then(|| {
            pool.budget.taken();
            Lease { pool, port: source.port(), foreign: false }
        })
    }

    fn pools_of(&self, sources: &[IpAddr], endpoint: SocketAddr) -> Vec<Arc<Pool>> {
        let (endpoint, now) = (canonical(endpoint), Instant::now());
        let pools = &mut *lock(&self.inner.pools);
        let before = pools.by_pair.len();
        let found =
            sources.iter().map(|source| self.pool(pools, source.to_canonical(), endpoint, now)).collect();
        if pools.by_pair.len() > before {
            self.forget_unused(pools, now);
        }
        found
    }

    fn pool(&self, pools: &mut Pools, source: IpAddr, endpoint: SocketAddr, now: Instant) -> Arc<Pool> {
        let budget = pools.budgets.entry(endpoint).or_insert_with(|| self.budget(endpoint));
        let kept = pools.by_pair.entry((source, endpoint)).or_insert_with(|| {
            budget.limit.add(self.count());
            let free = Mutex::new(FreePorts::new(&self.inner.ranges));
            let pool = Arc::new(Pool { source, free, budget: Arc::clone(budget) });
            Kept { pool, asked: now }
        });
        kept.asked = now;
        Arc::clone(&kept.pool)
    }

    /// Drops the pools that have lent nothing and were not asked for long, as those of endpoints that have left their
    /// cluster. Streams that go on keep their pool.
    fn forget_unused(&self, pools: &mut Pools, now: Instant) {
        pools.by_pair.retain(|_, kept| {
            let stays =
                Arc::strong_count(&kept.pool) > 1 || now.saturating_duration_since(kept.asked) < FORGET_AFTER;
            if !stays {
                kept.pool.budget.limit.sub(self.count());
            }
            stays
        });
        pools.budgets.retain(|endpoint, budget| {
            let stays = Arc::strong_count(budget) > 1;
            if !stays {
                for kind in BUDGET_KINDS {
                    // An error says that the series is not there.
                    self.inner.gauges.remove_label_values(&[&endpoint.to_string(), kind]).ok();
                }
            }
            stays
        });
    }

    /// How many ports a source address has towards an endpoint.
    fn count(&self) -> i64 {
        self.inner.ranges.iter().map(|range| range.len() as i64).sum()
    }

    fn budget(&self, endpoint: SocketAddr) -> Arc<Budget> {
        let text = endpoint.to_string();
        let gauge = |kind| self.inner.gauges.with_label_values(&[text.as_str(), kind]);
        Arc::new(Budget {
            endpoint,
            used: gauge(BUDGET_KINDS[0]),
            limit: gauge(BUDGET_KINDS[1]),
            mss: AtomicU16::new(0),
            crowded: AtomicBool::new(false),
        })
    }
}

/// Lets the kernel give these ports out again.
///
/// # Errors
/// `/proc/sys` cannot be written.
pub fn unreserve(ports: &[RangeInclusive<u16>]) -> io::Result<()> {
    if ports.is_empty() {
        return Ok(());
    }
    host::set_reserved_ports(&ranges::without(&host::reserved_ports()?, ports))?;
    tracing::info!(ports = ranges::text(ports), "removed from net.ipv4.ip_local_reserved_ports");
    Ok(())
}

/// Keeps the kernel from giving these ports out, for as long as it runs.
fn reserve(ports: &[RangeInclusive<u16>], reserved: &[RangeInclusive<u16>]) -> Result<(), PortsError> {
    if ports.is_empty() {
        return Ok(());
    }
    host::reserve_ports(ports).map_err(|source| {
        let list = ranges::text(&[reserved, ports].concat());
        PortsError::CannotReserve { list, source }
    })?;
    tracing::info!(ports = ranges::text(ports), "added to net.ipv4.ip_local_reserved_ports");
    Ok(())
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

    /// The largest segment that the endpoint is known to accept, in bytes of payload and TCP options. Perhaps it
    /// accepts more.
    pub fn endpoint_mss(&self) -> Option<u16> {
        Some(self.pool.budget.mss.load(Ordering::Relaxed)).filter(|mss| *mss > 0)
    }

    /// Notes that on a connection on which we announced `announced`, the endpoint accepts segments of `accepted`,
    /// and that this is all if it is less.
    pub fn note_endpoint_mss(&self, accepted: u16, announced: u16) {
        let mss = &self.pool.budget.mss;
        if accepted < announced {
            mss.store(accepted, Ordering::Relaxed);
        } else {
            mss.fetch_max(accepted, Ordering::Relaxed);
        }
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

#[cfg(test)]
mod tests;
