//! One cluster: the only place where its endpoints, and so its ring, change.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use arc_swap::ArcSwap;
use prometheus::{IntCounter, IntCounterVec, IntGauge};
use steer_policy::affinity::Member;
use steer_policy::affinity::maglev::Maglev;
use steer_policy::affinity::ring::Ring;
use steer_policy::affinity::ring_members::ring_members;
use steer_policy::config::{self, Endpoint, Health, LbPolicy};
use strum::VariantArray as _;

use super::connect::Connector;
use super::membership::Membership;
use super::unhashed::{Advice, Unhashed};
use super::{By, NoHealthyEndpoint, Pick};
use crate::telemetry::Metrics;

#[derive(Debug)]
pub struct Cluster {
    pub name: Arc<str>,
    /// Opens connections to its endpoints.
    pub connector: Connector,
    lb_policy: LbPolicy,
    healthy_panic_threshold: f64,
    snapshot: ArcSwap<Snapshot>,
    /// What the snapshot is made of.
    members: Mutex<Membership>,
    picks: IntCounterVec,
    requests: Requests,
    unhashed: Unhashed,
    gauges: Gauges,
}

/// The counters of answered requests by status code, each looked up once.
#[derive(Debug)]
struct Requests {
    all: IntCounterVec,
    /// Of the codes from 100 to 999, which are all that there are.
    by_status: Box<[OnceLock<IntCounter>; 900]>,
}

#[derive(Debug)]
struct Gauges {
    ring_version: IntGauge,
    in_ring: IntGauge,
    not_in_ring: IntGauge,
}

/// The endpoints and the table over them at one moment. Immutable.
#[derive(Debug)]
pub struct Snapshot {
    /// 1 for the configured endpoints, one more with each change.
    pub version: u64,
    /// All of them, in their order.
    slots: Box<[Slot]>,
    table: Table,
}

/// An endpoint with its counters, so that a pick looks up no labels.
#[derive(Debug)]
struct Slot {
    endpoint: Arc<Endpoint>,
    by_hash: IntCounter,
    by_random: IntCounter,
}

/// What finds the endpoint of a hash.
#[derive(Debug)]
pub enum Table {
    Ring(Ring),
    Maglev(Maglev),
}

impl Table {
    /// Over the endpoints that are in use; it answers with positions in `endpoints`.
    fn new(lb_policy: LbPolicy, endpoints: &[Endpoint], in_ring: &[u32]) -> Self {
        let members: Vec<_> = in_ring
            .iter()
            .map(|&index| {
                let endpoint = &endpoints[index as usize];
                Member { index, key: endpoint.hash_key.as_bytes(), weight: endpoint.weight }
            })
            .collect();
        match lb_policy {
            LbPolicy::RingHash { hash_function, minimum_ring_size, maximum_ring_size } => {
                Self::Ring(Ring::new(&members, hash_function, minimum_ring_size, maximum_ring_size))
            }
            LbPolicy::Maglev { table_size } => Self::Maglev(Maglev::new(&members, table_size)),
        }
    }

    fn pick(&self, hash: u64) -> Option<u32> {
        match self {
            Self::Ring(ring) => ring.pick(hash),
            Self::Maglev(maglev) => maglev.pick(hash),
        }
    }
}

impl Snapshot {
    pub fn table(&self) -> &Table {
        &self.table
    }

    pub fn endpoints(&self) -> impl ExactSizeIterator<Item = &Arc<Endpoint>> + '_ {
        self.slots.iter().map(|slot| &slot.endpoint)
    }
}

impl Cluster {
    pub(super) fn new(config: &config::Cluster, advice: Advice, metrics: &Metrics) -> Self {
        let gauges = Gauges {
            ring_version: metrics.ring_version.with_label_values(&[&config.name]),
            in_ring: metrics.endpoints.with_label_values(&[config.name.as_str(), "true"]),
            not_in_ring: metrics.endpoints.with_label_values(&[config.name.as_str(), "false"]),
        };
        let nothing =
            Snapshot { version: 0, slots: Box::default(), table: Table::new(config.lb_policy, &[], &[]) };
        let mut members = Membership::default();
        members.name(&config.endpoints);
        let cluster = Self {
            name: config.name.as_str().into(),
            connector: Connector::new(config, metrics),
            lb_policy: config.lb_policy,
            healthy_panic_threshold: config.healthy_panic_threshold,
            snapshot: ArcSwap::from_pointee(nothing),
            members: Mutex::new(members),
            picks: metrics.picks.clone(),
            requests: Requests {
                all: metrics.requests.clone(),
                by_status: Box::new([const { OnceLock::new() }; 900]),
            },
            unhashed: Unhashed::new(advice),
            gauges,
        };
        cluster.publish(&config.endpoints);
        cluster
    }

    /// The endpoint for a hash, or a random one of the ring's where there is none. Counted.
    pub fn pick(&self, hash: Option<u64>) -> Result<Pick, NoHealthyEndpoint> {
        let snapshot = self.snapshot.load();
        // A random hash, not a random endpoint: shares are those of the ring, as in Envoy.
        let index = snapshot.table.pick(hash.unwrap_or_else(rand::random)).ok_or(NoHealthyEndpoint)?;
        let slot = &snapshot.slots[index as usize];
        let by = if hash.is_some() { By::Hash } else { By::Random };
        match by {
            By::Hash => slot.by_hash.inc(),
            By::Random => slot.by_random.inc(),
        }
        self.unhashed.note(&self.name, by);
        Ok(Pick { endpoint: Arc::clone(&slot.endpoint), by })
    }

    /// A request that was routed here has been answered.
    /// `status` is between 100 and 999.
    pub fn count_request(&self, status: u16) {
        let Requests { all, by_status } = &self.requests;
        let counter = || all.with_label_values(&[&*self.name, &status.to_string()]);
        by_status[usize::from(status) - 100].get_or_init(counter).inc();
    }

    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// Replaces the endpoints, and returns whether that was a change. As in Envoy, another order is none: the order, on
    /// which a ring may depend, stays.
    pub fn update(&self, endpoints: &[Endpoint]) -> bool {
        self.change(|members| members.name(endpoints))
    }

    /// Says what a health check found of an endpoint; `None`: nothing is known any more. Returns whether that was a change.
    pub fn set_health(&self, endpoint: SocketAddr, health: Option<Health>) -> bool {
        self.change(|members| members.check(endpoint, health))
    }

    /// Says whether an endpoint gets anything new. Returns whether that was a change.
    pub fn set_drained(&self, endpoint: SocketAddr, drained: bool) -> bool {
        self.change(|members| members.drain(endpoint, drained))
    }

    fn change(&self, change: impl FnOnce(&mut Membership)) -> bool {
        // What a panicking holder has left is whole: a change is one insertion or removal.
        let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        let before = members.endpoints();
        change(&mut members);
        let endpoints = members.endpoints();
        let is_change = endpoints != before;
        if is_change {
            self.publish(&endpoints);
        }
        is_change
    }

    /// To be called with `members` locked, so that versions are published in order.
    fn publish(&self, endpoints: &[Endpoint]) {
        let before = self.snapshot();
        let version = before.version + 1;
        let members = ring_members(endpoints, self.healthy_panic_threshold);
        let table = Table::new(self.lb_policy, endpoints, &members.in_ring);
        let slots: Box<[_]> = endpoints.iter().map(|endpoint| self.slot(endpoint)).collect();
        self.snapshot.store(Arc::new(Snapshot { version, slots, table }));

        let in_ring = members.in_ring.len();
        self.gauges.ring_version.set(count(version));
        self.gauges.in_ring.set(count(in_ring as u64));
        self.gauges.not_in_ring.set(count((endpoints.len() - in_ring) as u64));
        let left = before.endpoints().map(|endpoint| endpoint.address);
        for address in left.filter(|address| endpoints.iter().all(|endpoint| endpoint.address != *address)) {
            self.forget_picks(address);
        }
    }

    /// Removes the series of an endpoint that has left.
    fn forget_picks(&self, address: SocketAddr) {
        let address = address.to_string();
        for &by in By::VARIANTS {
            // An error says that there is none, as when the cluster had the endpoint twice.
            self.picks.remove_label_values(&[&*self.name, &address, by.into_str()]).ok();
        }
    }

    fn slot(&self, endpoint: &Endpoint) -> Slot {
        let address = endpoint.address.to_string();
        let counter = |by: By| self.picks.with_label_values(&[&*self.name, &address, by.into_str()]);
        Slot {
            endpoint: Arc::new(endpoint.clone()),
            by_hash: counter(By::Hash),
            by_random: counter(By::Random),
        }
    }
}

fn count(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use steer_policy::config::HashFunction;

    use super::*;

    fn endpoint(last: u8, health: Health) -> Endpoint {
        let address = SocketAddr::from(([192, 0, 2, last], 3000));
        Endpoint { address, weight: 1, hash_key: address.to_string(), health }
    }

    fn ring_hash() -> LbPolicy {
        LbPolicy::RingHash {
            hash_function: HashFunction::XxHash,
            minimum_ring_size: LbPolicy::DEFAULT_MINIMUM_RING_SIZE,
            maximum_ring_size: LbPolicy::DEFAULT_MAXIMUM_RING_SIZE,
        }
    }

    fn cluster(endpoints: Vec<Endpoint>, metrics: &Metrics) -> Cluster {
        let config = config::Cluster {
            name: "sio".to_owned(),
            lb_policy: ring_hash(),
            connect_timeout: Duration::from_secs(5),
            endpoints,
            healthy_panic_threshold: 50.0,
            source_addresses: Vec::new(),
        };
        Cluster::new(&config, Advice::default(), metrics)
    }

    fn picked(cluster: &Cluster, metrics: &Metrics, last: u8, by: By) -> u64 {
        let address = endpoint(last, Health::Healthy).address.to_string();
        metrics.picks.with_label_values(&[&*cluster.name, &address, by.into_str()]).get()
    }

    #[test]
    fn a_hash_always_picks_the_same_endpoint_and_is_counted() {
        let metrics = Metrics::new();
        let cluster = cluster((1..=3).map(|last| endpoint(last, Health::Healthy)).collect(), &metrics);
        let first = cluster.pick(Some(7)).unwrap();
        for _ in 0..9 {
            let pick = cluster.pick(Some(7)).unwrap();
            assert_eq!((pick.endpoint.address, pick.by), (first.endpoint.address, By::Hash));
        }
        let std::net::IpAddr::V4(ip) = first.endpoint.address.ip() else { unreachable!() };
        assert_eq!(picked(&cluster, &metrics, ip.octets()[3], By::Hash), 10);
    }

    #[test]
    fn without_a_hash_every_endpoint_has_its_turn() {
        let metrics = Metrics::new();
        let cluster = cluster((1..=3).map(|last| endpoint(last, Health::Healthy)).collect(), &metrics);
        let picks: Vec<_> = (0..300).map(|_| cluster.pick(None).unwrap()).collect();
        assert!(picks.iter().all(|pick| pick.by == By::Random));
        let distinct: BTreeSet<_> = picks.iter().map(|pick| pick.endpoint.address).collect();
        assert_eq!(distinct.len(), 3);
        let counted: u64 = (1..=3).map(|last| picked(&cluster, &metrics, last, By::Random)).sum();
        assert_eq!(counted, 300);
    }

    #[test]
    fn unhealthy_endpoints_are_not_picked_and_gauges_say_so() {
        let metrics = Metrics::new();
        let endpoints =
            vec![endpoint(1, Health::Unhealthy), endpoint(2, Health::Healthy), endpoint(3, Health::Healthy)];
        let cluster = cluster(endpoints, &metrics);
        assert!((0..200).all(|_| cluster.pick(None).unwrap().endpoint.health == Health::Healthy));
        let gauge = |in_ring| metrics.endpoints.with_label_values(&["sio", in_ring]).get();
        assert_eq!((gauge("true"), gauge("false")), (2, 1));
        assert_eq!(metrics.ring_version.with_label_values(&["sio"]).get(), 1);
    }

    #[test]
    fn a_cluster_without_usable_endpoints_picks_nothing() {
        let metrics = Metrics::new();
        assert_eq!(cluster(vec![], &metrics).pick(Some(1)).unwrap_err(), NoHealthyEndpoint);
        let degraded = vec![endpoint(1, Health::Degraded), endpoint(2, Health::Degraded)];
        assert_eq!(cluster(degraded, &metrics).pick(None).unwrap_err(), NoHealthyEndpoint);
    }

    #[test]
    fn updates_change_the_version_unless_they_only_permute() {
        let metrics = Metrics::new();
        let endpoints: Vec<_> = (1..=3).map(|last| endpoint(last, Health::Healthy)).collect();
        let cluster = cluster(endpoints.clone(), &metrics);
        let reversed: Vec<_> = endpoints.iter().rev().cloned().collect();
        assert!(!cluster.update(&reversed));
        assert_eq!(cluster.snapshot().version, 1);
        assert_eq!(cluster.snapshot().endpoints().next().unwrap().address, endpoints[0].address);

        let twice = [endpoints[0].clone(), endpoints[0].clone(), endpoints[1].clone()];
        assert!(cluster.update(&twice), "the same number, but not the same endpoints");
        assert!(cluster.update(&endpoints[..1]));
        assert_eq!(cluster.snapshot().version, 3);
        assert_eq!(metrics.ring_version.with_label_values(&["sio"]).get(), 3);
        assert_eq!(cluster.pick(None).unwrap().endpoint.address, endpoints[0].address);
    }
    #[test]
    fn health_and_drain_change_the_ring_and_do_not_undo_each_other() {
        let metrics = Metrics::new();
        let endpoints: Vec<_> = (1..=3).map(|last| endpoint(last, Health::Healthy)).collect();
        let cluster = cluster(endpoints.clone(), &metrics);
        let address = |last: u8| endpoint(last, Health::Healthy).address;
        let picked = || {
            let picks = (0..200).map(|_| cluster.pick(None).unwrap().endpoint.address);
            picks.collect::<BTreeSet<_>>()
        };
        assert!(cluster.set_drained(address(1), true));
        assert!(!cluster.set_drained(address(1), true), "it is already");
        assert!(cluster.set_health(address(2), Some(Health::Unhealthy)));
        assert_eq!(picked(), BTreeSet::from([address(3)]));
        assert!(!cluster.set_health(address(1), Some(Health::Unhealthy)), "it gets nothing anyway");
        assert!(cluster.set_drained(address(1), false), "but now it is seen");
        assert!(cluster.set_health(address(1), Some(Health::Healthy)));
        assert_eq!(picked(), BTreeSet::from([address(1), address(3)]));
        assert_eq!(cluster.snapshot().version, 5);
    }

    #[test]
    fn the_series_of_an_endpoint_that_has_left_are_removed() {
        let metrics = Metrics::new();
        let endpoints: Vec<_> = (1..=2).map(|last| endpoint(last, Health::Healthy)).collect();
        let cluster = cluster(endpoints.clone(), &metrics);
        let series = |last: u8| {
            let label = format!("endpoint=\"{}\"", endpoint(last, Health::Healthy).address);
            metrics.render().lines().filter(|line| line.contains(&label)).count()
        };
        assert_eq!((series(1), series(2)), (2, 2));
        assert!(cluster.update(&endpoints[..1]));
        assert_eq!((series(1), series(2)), (2, 0));
    }
}
