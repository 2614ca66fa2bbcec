//! Endpoints that are known to have no TCP timestamps.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::{PoisonError, RwLock};

/// At most this many endpoints are known. Streams to further ones are relayed.
const MOST: usize = 4096;

/// The addresses of the endpoints. The kernel has one setting for all ports of a network namespace.
#[derive(Debug, Default)]
pub(super) struct PlainEndpoints(RwLock<HashSet<IpAddr>>);

impl PlainEndpoints {
    /// Notes an endpoint. Returns whether it is known now.
    pub(super) fn note(&self, endpoint: IpAddr) -> bool {
        // Nothing panics while the lock is held.
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if known.len() < MOST {
            known.insert(endpoint);
        }
        known.contains(&endpoint)
    }

    pub(super) fn has(&self, endpoint: IpAddr) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).contains(&endpoint)
    }

    pub(super) fn forget(&self, endpoint: IpAddr) {
        // Most processes know none, and this is called for each stream.
        if self.has(endpoint) {
            self.0.write().unwrap_or_else(PoisonError::into_inner).remove(&endpoint);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn an_endpoint_is_known_until_it_is_forgotten() {
        let endpoints = PlainEndpoints::default();
        let [one, other] = [1, 2].map(|last| IpAddr::from([192, 0, 2, last]));
        assert!(endpoints.note(one));
        assert!(endpoints.has(one) && !endpoints.has(other));
        endpoints.forget(other);
        assert!(endpoints.has(one));
        endpoints.forget(one);
        assert!(!endpoints.has(one));
    }

    #[test]
    fn there_is_room_for_a_limited_number() {
        let endpoints = PlainEndpoints::default();
        let endpoint = |number: usize| IpAddr::from(Ipv4Addr::from(number as u32));
        assert!((0..MOST).all(|number| endpoints.note(endpoint(number))));
        assert!(!endpoints.note(endpoint(MOST)));
        assert!(endpoints.note(endpoint(0)));
        endpoints.forget(endpoint(0));
        assert!(endpoints.note(endpoint(MOST)));
    }
}
