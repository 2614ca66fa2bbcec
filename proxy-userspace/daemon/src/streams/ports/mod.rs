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
mod tests {
    use super::*;

    const A: &str = "192.0.2.9:3000";
    const B: &str = "192.0.2.10:3000";

    fn address<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
        text.parse().unwrap()
    }

    fn gauge(metrics: &Metrics, endpoint: &str, kind: &str) -> i64 {
        metrics.source_ports.with_label_values(&[endpoint, kind]).get()
    }

    #[test]
    fn each_endpoint_and_each_source_has_all_ports() {
        let metrics = Metrics::new();
        let ports = SourcePorts::new(&[2000..=2003], &metrics);
        let (one, two): (IpAddr, IpAddr) = (address("10.0.0.1"), address("10.0.0.2"));
        let mut leases = Vec::new();
        for (source, endpoint) in [(one, A), (one, B), (two, A)] {
            leases.extend((0..4).map(|_| ports.lease(source, address(endpoint)).unwrap()));
            let exhausted = ports.lease(source, address(endpoint)).unwrap_err();
            assert_eq!(exhausted.endpoint, address(endpoint));
        }
        assert_eq!((gauge(&metrics, A, "used"), gauge(&metrics, A, "limit")), (8, 8));
        assert_eq!((gauge(&metrics, B, "used"), gauge(&metrics, B, "limit")), (4, 4));
        assert_eq!(leases[0].address(), address("10.0.0.1:2000"));

        let freed = leases.swap_remove(0).address();
        assert_eq!(ports.lease(one, address(A)).unwrap().address(), freed);
        drop(leases);
        assert_eq!((gauge(&metrics, A, "used"), gauge(&metrics, B, "used")), (0, 0));
        assert_eq!(gauge(&metrics, A, "limit"), 8);
    }

    #[test]
    fn sources_share_the_load_and_stand_in_for_each_other() {
        let metrics = Metrics::new();
        let ports = SourcePorts::new(&[2000..=2009], &metrics);
        let sources: [IpAddr; 2] = [address("10.0.0.1"), address("10.0.0.2")];
        let lease = || ports.lease_any(&sources, address(A));
        let leases: Vec<_> = (0..10).map(|_| lease().unwrap()).collect();
        let of_one = leases.iter().filter(|lease| lease.address().ip() == sources[0]).count();
        assert_eq!(of_one, 5);
        assert_eq!(gauge(&metrics, A, "limit"), 20);
        let more: Vec<_> = (0..10).map(|_| lease().unwrap()).collect();
        assert_eq!(lease().unwrap_err(), PortsExhausted { endpoint: address(A), limit: 20 });
        drop(more);
        assert!(lease().is_ok());
        assert!(ports.lease_any(&[], address(A)).is_err());
    }

    #[test]
    fn an_address_is_the_same_in_either_form() {
        let metrics = Metrics::new();
        let ports = SourcePorts::new(&[2000..=2000], &metrics);
        let lease = ports.lease(address("::ffff:10.0.0.1"), address("[::ffff:192.0.2.9]:3000")).unwrap();
        assert_eq!(lease.address(), address("10.0.0.1:2000"));
        assert!(ports.lease(address("10.0.0.1"), address(A)).is_err());
    }

    #[test]
    fn a_foreign_port_is_not_given_again_at_once() {
        let metrics = Metrics::new();
        let ports = SourcePorts::new(&[2000..=2001], &metrics);
        let lease = || ports.lease(address("10.0.0.1"), address(A));
        lease().unwrap().give_back_foreign();
        let other = lease().unwrap();
        assert_eq!(other.address().port(), 2001);
        assert!(lease().is_err());
        assert_eq!(gauge(&metrics, A, "used"), 1);
    }

    #[test]
    fn a_port_of_an_earlier_process_is_leased_until_its_stream_ends() {
        let metrics = Metrics::new();
        let ports = SourcePorts::new(&[2000..=2001], &metrics);
        let lease = ports.lease_this(address("10.0.0.1:2000"), address(A)).unwrap();
        assert!(ports.lease_this(address("10.0.0.1:2000"), address(A)).is_none());
        assert!(ports.lease_this(address("10.0.0.1:3000"), address(A)).is_none());
        assert_eq!((gauge(&metrics, A, "used"), gauge(&metrics, A, "limit")), (1, 2));
        let other = ports.lease(address("10.0.0.1"), address(A)).unwrap();
        assert_eq!(other.address(), address("10.0.0.1:2001"));
        drop(lease);
        assert_eq!(gauge(&metrics, A, "used"), 1);
        assert_eq!(ports.lease(address("10.0.0.1"), address(A)).unwrap().address(), address("10.0.0.1:2000"));
    }

    #[test]
    fn a_crowded_endpoint_is_warned_about_once_for_each_crossing() {
        let metrics = Metrics::new();
        let ports = SourcePorts::new(&[2000..=2009], &metrics);
        let lease = || ports.lease(address("10.0.0.1"), address(A)).unwrap();
        let crowded = || lock(&ports.inner.pools).budgets[&address(A)].crowded.load(Ordering::Relaxed);
        let mut leases: Vec<_> = (0..7).map(|_| lease()).collect();
        assert!(!crowded());
        leases.push(lease());
        assert!(crowded());
        leases.truncate(7);
        assert!(crowded(), "not calm yet");
        leases.truncate(6);
        assert!(!crowded());
    }

    #[test]
    fn what_an_endpoint_accepts_is_remembered_for_all_its_streams() {
        let ports = SourcePorts::new(&[2000..=2009], &Metrics::new());
        let lease = |source| ports.lease(address(source), address(A)).unwrap();
        let one = lease("10.0.0.1");
        assert_eq!(one.endpoint_mss(), None);
        one.note_endpoint_mss(1360, 1360);
        one.note_endpoint_mss(1000, 1000);
        assert_eq!(lease("10.0.0.2").endpoint_mss(), Some(1360), "at least");
        one.note_endpoint_mss(1460, 1460);
        assert_eq!(one.endpoint_mss(), Some(1460));
        one.note_endpoint_mss(1400, 1460);
        assert_eq!(one.endpoint_mss(), Some(1400), "it has become less");
        assert_eq!(ports.lease(address("10.0.0.1"), address(B)).unwrap().endpoint_mss(), None);
    }

    #[test]
    fn the_kernels_settings_leave_some_ports() {
        let metrics = Metrics::new();
        let local = host::ip_local_port_range().unwrap();
        if *local.start() <= 10240 && *local.end() == u16::MAX {
            return;
        }
        let ports = SourcePorts::start(None, &metrics).unwrap();
        assert!(!local.contains(&ports.lease(address("10.0.0.1"), address(A)).unwrap().address().port()));
    }

    #[test]
    fn what_is_known_of_an_endpoint_is_forgotten_when_nothing_uses_it_for_long() {
        let metrics = Metrics::new();
        let ports = SourcePorts::new(&[2000..=2009], &metrics);
        let lease = |endpoint| ports.lease(address("10.0.0.1"), address(endpoint)).unwrap();
        let series =
            || metrics.render().lines().filter(|line| line.starts_with("steer_source_ports{")).count();
        let living = lease(A);
        drop(lease(B));
        assert_eq!(series(), 4);
        let forget = |after| ports.forget_unused(&mut lock(&ports.inner.pools), Instant::now() + after);
        forget(FORGET_AFTER / 2);
        assert_eq!((series(), lock(&ports.inner.pools).by_pair.len()), (4, 2));
        forget(FORGET_AFTER * 2);
        assert_eq!((series(), lock(&ports.inner.pools).by_pair.len()), (2, 1), "a stream keeps its pool");
        drop(living);
        forget(FORGET_AFTER * 2);
        assert_eq!((series(), lock(&ports.inner.pools).by_pair.len()), (0, 0));
        drop(lease(A));
        assert_eq!(gauge(&metrics, A, "limit"), 10);
    }
}
