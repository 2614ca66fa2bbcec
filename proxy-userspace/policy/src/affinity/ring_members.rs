//! Which endpoints of a cluster are in its ring or table: the healthy ones, or all of them if so
//! few are healthy that the load would overrun them (panic).

use crate::config::{Endpoint, Health};

/// In cluster order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RingMembers {
    /// Positions in the cluster's list of endpoints.
    pub in_ring: Vec<u32>,
    /// All endpoints are members, whatever their health.
    pub panic: bool,
}

/// `panic_threshold` in percent. The cluster has at most `u32::MAX` endpoints, as each has a
/// weight.
pub fn ring_members(endpoints: &[Endpoint], panic_threshold: f64) -> RingMembers {
    let healths = || endpoints.iter().map(|endpoint| endpoint.health);
    let panic = in_panic(healths(), panic_threshold);
    let in_ring = healths()
        .zip(0..)
        .filter(|&(health, _)| panic || health == Health::Healthy)
        .map(|(_, index)| index)
        .collect();
    RingMembers { in_ring, panic }
}

/// Envoy's rule for a single priority. Draining endpoints do not count at all; each healthy or
/// degraded one counts for 1.4 (the overprovisioning factor), and there is no panic while that adds
/// up to the whole.
fn in_panic(healths: impl Iterator<Item = Health>, threshold: f64) -> bool {
    let (mut healthy, mut degraded, mut counted) = (0_u32, 0_u32, 0_u32);
    for health in healths {
        match health {
            Health::Healthy => healthy += 1,
            Health::Degraded => degraded += 1,
            Health::Unhealthy => {}
            Health::Draining => continue,
        }
        counted += 1;
    }
    if counted == 0 {
        // No endpoint that counts is 0 % healthy.
        return threshold.min(100.0) > 0.0;
    }
    let available = |count: u32| (140 * u64::from(count) / u64::from(counted)).min(100);
    if available(healthy) + available(degraded) >= 100 {
        return false;
    }
    let percent = |count: u32| 100.0 * f64::from(count) / f64::from(counted);
    percent(healthy) + percent(degraded) < threshold.min(100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panics(healths: &[(Health, usize)], threshold: f64) -> bool {
        in_panic(healths.iter().flat_map(|&(health, count)| std::iter::repeat_n(health, count)), threshold)
    }

    use Health::{Degraded, Draining, Healthy, Unhealthy};

    #[test]
    fn panic_below_the_threshold_only() {
        assert!(!panics(&[(Healthy, 5), (Unhealthy, 5)], 50.0));
        assert!(panics(&[(Healthy, 4), (Unhealthy, 6)], 50.0));
        assert!(!panics(&[(Healthy, 4), (Unhealthy, 6)], 0.0), "0 = never");
        assert!(panics(&[(Healthy, 7), (Unhealthy, 3)], 100.0), "7 of 10 is 98 % with factor 1.4");
        assert!(!panics(&[(Healthy, 5), (Unhealthy, 2)], 100.0), "5 of 7 is exactly 100 %");
    }

    #[test]
    fn draining_endpoints_do_not_count() {
        assert!(!panics(&[(Healthy, 1), (Draining, 4)], 50.0));
        assert!(panics(&[(Draining, 4)], 50.0));
        assert!(!panics(&[(Draining, 4)], 0.0));
        assert!(panics(&[(Healthy, 1), (Unhealthy, 2), (Draining, 4)], 50.0));
    }

    #[test]
    fn degraded_endpoints_count_but_are_not_used() {
        assert!(!panics(&[(Healthy, 1), (Degraded, 4)], 50.0));
        assert!(panics(&[(Healthy, 2), (Degraded, 2), (Unhealthy, 6)], 50.0));
        let endpoints: Vec<_> = [Degraded, Healthy, Degraded]
            .map(|health| Endpoint {
                address: "192.0.2.1:80".parse().unwrap(),
                weight: 1,
                hash_key: String::new(),
                health,
            })
            .into();
        assert_eq!(ring_members(&endpoints, 50.0), RingMembers { in_ring: vec![1], panic: false });
    }
}
