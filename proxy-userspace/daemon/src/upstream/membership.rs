//! The endpoints of a cluster and the state of each. Three inputs are joined here and nowhere else: the
//! endpoints that a source names, the results of health checks, and the endpoints that operators drain.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;

use steer_policy::config::{Endpoint, Health};

/// The endpoints of a cluster, each with the worst of its states.
#[derive(Debug, Default)]
pub(super) struct Membership {
    /// In the order on which a ring may depend, with the health that the source says.
    named: Vec<Endpoint>,
    /// What health checks found, where that is known.
    checked: HashMap<SocketAddr, Health>,
    /// Endpoints that get no new request. An address stays here after its endpoint has left the cluster,
    /// since the endpoint may come back.
    drained: HashSet<SocketAddr>,
}

impl Membership {
    /// Replaces the endpoints. As in Envoy, the present endpoints in another order are no change.
    pub(super) fn name(&mut self, endpoints: &[Endpoint]) {
        if holds_the_same(&self.named, endpoints) {
            return;
        }
        self.named = endpoints.to_vec();
        let addresses: HashSet<_> = endpoints.iter().map(|endpoint| endpoint.address).collect();
        self.checked.retain(|address, _| addresses.contains(address));
    }

    /// What a health check found; `None`: nothing is known any more.
    pub(super) fn check(&mut self, endpoint: SocketAddr, found: Option<Health>) {
        match found {
            Some(health) if self.named.iter().any(|named| named.address == endpoint) => {
                self.checked.insert(endpoint, health);
            }
            _ => {
                self.checked.remove(&endpoint);
            }
        }
    }

    /// Whether the endpoint gets anything new.
    pub(super) fn drain(&mut self, endpoint: SocketAddr, drained: bool) {
        if drained {
            self.drained.insert(endpoint);
        } else {
            self.drained.remove(&endpoint);
        }
    }

    /// All endpoints in their order, each as it is now.
    pub(super) fn endpoints(&self) -> Vec<Endpoint> {
        let now = |endpoint: &Endpoint| {
            let checked = self.checked.get(&endpoint.address).copied().unwrap_or_default();
            let drained =
                if self.drained.contains(&endpoint.address) { Health::Draining } else { Health::Healthy };
            Endpoint { health: worst([endpoint.health, checked, drained]), ..endpoint.clone() }
        };
        self.named.iter().map(now).collect()
    }
}

/// An endpoint that is to be drained is drained whether it is healthy or not.
fn worst(healths: [Health; 3]) -> Health {
    let order = [Health::Draining, Health::Unhealthy, Health::Degraded];
    order.into_iter().find(|health| healths.contains(health)).unwrap_or(Health::Healthy)
}

/// In any order.
fn holds_the_same(left: &[Endpoint], right: &[Endpoint]) -> bool {
    left.len() == right.len() && {
        let mut unmatched: Vec<_> = left.iter().collect();
        right.iter().all(|endpoint| {
            let found = unmatched.iter().position(|&other| other == endpoint);
            found.map(|position| unmatched.swap_remove(position)).is_some()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Health::{Degraded, Draining, Healthy, Unhealthy};
    use super::*;

    fn address(last: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, last], 3000))
    }

    fn endpoint(last: u8, health: Health) -> Endpoint {
        Endpoint { address: address(last), weight: 1, hash_key: last.to_string(), health }
    }

    fn healths(membership: &Membership) -> Vec<Health> {
        membership.endpoints().iter().map(|endpoint| endpoint.health).collect()
    }

    #[test]
    fn an_endpoint_has_the_worst_of_its_states() {
        // Named, checked, drained, and what comes of these.
        let rows = [
            (Healthy, None, false, Healthy),
            (Healthy, Some(Healthy), false, Healthy),
            (Healthy, Some(Unhealthy), false, Unhealthy),
            (Healthy, Some(Degraded), false, Degraded),
            (Healthy, None, true, Draining),
            (Unhealthy, Some(Healthy), false, Unhealthy),
            (Degraded, Some(Unhealthy), false, Unhealthy),
            (Unhealthy, Some(Unhealthy), true, Draining),
            (Draining, Some(Unhealthy), false, Draining),
        ];
        for (named, checked, drained, expected) in rows {
            let mut membership = Membership::default();
            membership.name(&[endpoint(1, named), endpoint(2, Healthy)]);
            membership.check(address(1), checked);
            membership.drain(address(1), drained);
            assert_eq!(healths(&membership), [expected, Healthy], "{named:?} {checked:?} {drained}");
        }
    }

    #[test]
    fn what_one_source_says_outlives_what_another_changes() {
        let mut membership = Membership::default();
        membership.name(&[endpoint(1, Healthy), endpoint(2, Healthy)]);
        membership.check(address(1), Some(Unhealthy));
        membership.drain(address(2), true);
        membership.name(&[endpoint(2, Healthy), endpoint(1, Healthy), endpoint(3, Healthy)]);
        assert_eq!(healths(&membership), [Draining, Unhealthy, Healthy]);
        membership.check(address(1), None);
        membership.drain(address(2), false);
        assert_eq!(healths(&membership), [Healthy; 3]);
    }

    #[test]
    fn an_endpoint_that_comes_back_is_drained_still_but_was_not_checked() {
        let mut membership = Membership::default();
        membership.name(&[endpoint(1, Healthy), endpoint(2, Healthy)]);
        membership.check(address(1), Some(Unhealthy));
        membership.drain(address(2), true);
        membership.name(&[]);
        membership.check(address(1), Some(Unhealthy));
        membership.name(&[endpoint(1, Healthy), endpoint(2, Healthy)]);
        assert_eq!(healths(&membership), [Healthy, Draining]);
    }

    #[test]
    fn another_order_is_no_change() {
        let mut membership = Membership::default();
        let endpoints = [endpoint(1, Healthy), endpoint(2, Healthy)];
        membership.name(&endpoints);
        membership.name(&[endpoints[1].clone(), endpoints[0].clone()]);
        assert_eq!(membership.endpoints(), endpoints);
        membership.name(&[endpoints[0].clone(), endpoints[0].clone()]);
        assert_eq!(membership.endpoints()[1], endpoints[0], "as many, but not the same");
    }
}
