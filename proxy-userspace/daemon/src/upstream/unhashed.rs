//! The warning that a cluster keeps no client at its endpoint: requests come, but none of them has
//! what its route hashes by. Each cluster gives this warning once.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use http::header::HeaderName;
use steer_policy::config::{Config, HashSource, HeaderSource};

use super::By;

/// The warning comes with this request, if none before it had a hash. One client whose session is
/// spread over endpoints tries again and again, and so makes this many requests within a minute.
/// The first probes of a load balancer or monitor, which often have no header of a client, are
/// fewer.
const WARNED_AT: u32 = 20;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Counts the requests of a cluster until it is known whether they have hashes.
#[derive(Debug)]
pub(super) struct Unhashed {
    /// Requests without a hash, as long as no request had one. [`WARNED_AT`]: this is settled.
    requests: AtomicU32,
    advice: Advice,
}

/// What the warning says about the routes of a cluster.
#[derive(Debug, Default)]
pub(super) struct Advice {
    /// The listeners that have the routes.
    listeners: String,
    /// What the routes hash by, such as `header x-forwarded-for`.
    hash_policy: String,
    remedy: String,
}

impl Unhashed {
    pub(super) fn new(advice: Advice) -> Self {
        // A route without a hash policy has its warning when the configuration is read.
        let requests = if advice.hash_policy.is_empty() { WARNED_AT } else { 0 };
        Self { requests: AtomicU32::new(requests), advice }
    }

    /// Takes note of a request of the cluster that is called `cluster`.
    pub(super) fn note(&self, cluster: &str, by: By) {
        if self.is_time_to_warn(by) {
            let Advice { listeners, hash_policy, remedy } = &self.advice;
            tracing::warn!(
                cluster,
                listener = listeners,
                hash_policy,
                "nothing is sticky: none of the first {WARNED_AT} requests of this cluster had what \
                 its hash_policy names, so each request went to a random endpoint; {remedy}",
            );
        }
    }

    /// Whether this request settles that no request has a hash.
    fn is_time_to_warn(&self, by: By) -> bool {
        if self.requests.load(Relaxed) == WARNED_AT {
            return false;
        }
        match by {
            By::Hash => {
                self.requests.store(WARNED_AT, Relaxed);
                false
            }
            By::Random => {
                let one_more = |requests| (requests < WARNED_AT).then_some(requests + 1);
                self.requests.fetch_update(Relaxed, Relaxed, one_more) == Ok(WARNED_AT - 1)
            }
        }
    }
}

impl Advice {
    /// For the cluster of this name.
    pub(super) fn new(config: &Config, cluster: &str) -> Self {
        let (mut listeners, mut sources) = (BTreeSet::new(), Vec::new());
        for listener in &config.listeners {
            let routes = listener.virtual_hosts.iter().flat_map(|host| &host.routes);
            for route in routes.filter(|route| route.cluster == cluster && !route.hash_policy.is_empty()) {
                listeners.insert(listener.name.as_str());
                sources.extend(route.hash_policy.iter().map(|policy| &policy.source));
            }
        }
        let names: BTreeSet<_> = sources.iter().map(|source| name_of(source)).collect();
        Self {
            listeners: listeners.into_iter().collect::<Vec<_>>().join(", "),
            hash_policy: names.into_iter().collect::<Vec<_>>().join(", "),
            remedy: sources.first().map(|source| remedy(source).to_owned()).unwrap_or_default(),
        }
    }
}

fn name_of(source: &HashSource) -> String {
    match source {
        HashSource::Header { name: HeaderSource::Name(name), .. } => format!("header {name}"),
        HashSource::Header { name: HeaderSource::Path, .. } => "header :path".to_owned(),
        HashSource::Header { name: HeaderSource::Authority, .. } => "header :authority".to_owned(),
        HashSource::Header { name: HeaderSource::Method, .. } => "header :method".to_owned(),
        HashSource::Header { name: HeaderSource::Scheme, .. } => "header :scheme".to_owned(),
        HashSource::Cookie(cookie) => format!("cookie {}", cookie.name),
        HashSource::QueryParameter { name } => format!("query_parameter {name}"),
        HashSource::SourceIp => "source_ip".to_owned(),
    }
}

/// What makes requests have what `source` names.
fn remedy(source: &HashSource) -> &'static str {
    match source {
        HashSource::Header { name: HeaderSource::Name(name), .. } if *name == X_FORWARDED_FOR => {
            "if clients connect to Steer directly, set `use_remote_address: true` on the listener, or hash by \
             `source_ip: true` (without a file: --hash source-ip); if a proxy stands in front of Steer, let the \
             proxy send x-forwarded-for"
        }
        HashSource::Cookie(_) => {
            "let the endpoints set the cookie, or give the cookie a `ttl`, so that Steer sets it; if clients \
             connect to Steer directly, hashing by `source_ip: true` (without a file: --hash source-ip) \
             works, too"
        }
        HashSource::Header { .. } | HashSource::QueryParameter { .. } | HashSource::SourceIp => {
            "let clients, or the proxy in front of Steer, send it; if clients connect to Steer directly, \
             hashing by `source_ip: true` (without a file: --hash source-ip) works, too"
        }
    }
}

#[cfg(test)]
mod tests {
    use steer_policy::config::from_flags;

    use super::*;

    fn advice(hash: &str) -> Advice {
        let listen = "127.0.0.1:8080".parse().unwrap();
        let backends = ["10.0.0.1:3000".parse().unwrap()];
        Advice::new(&from_flags(listen, &backends, hash.parse().unwrap()), "backends")
    }

    fn warned_at(unhashed: &Unhashed, requests: u32) -> Vec<u32> {
        (1..=requests).filter(|_| unhashed.is_time_to_warn(By::Random)).collect()
    }

    #[test]
    fn a_cluster_whose_requests_have_no_hash_warns_once() {
        let unhashed = Unhashed::new(advice("header:x-user"));
        assert_eq!(warned_at(&unhashed, 100), [WARNED_AT]);
    }

    #[test]
    fn one_request_with_a_hash_is_enough_for_no_warning() {
        let unhashed = Unhashed::new(advice("header:x-user"));
        assert!(warned_at(&unhashed, WARNED_AT - 1).is_empty());
        assert!(!unhashed.is_time_to_warn(By::Hash));
        assert!(warned_at(&unhashed, 100).is_empty());
    }

    #[test]
    fn a_cluster_of_routes_without_a_hash_policy_does_not_warn_again() {
        let unhashed = Unhashed::new(Advice::default());
        assert!(warned_at(&unhashed, 100).is_empty());
    }

    #[test]
    fn the_advice_names_what_the_routes_hash_by_and_what_to_set() {
        for (hash, name, remedy) in [
            ("header:x-forwarded-for", "header x-forwarded-for", "`use_remote_address: true`"),
            ("header:x-user", "header x-user", "send it"),
            ("cookie:sid", "cookie sid", "`ttl`"),
            ("query:room", "query_parameter room", "send it"),
        ] {
            let Advice { listeners, hash_policy, remedy: found } = advice(hash);
            assert_eq!((listeners.as_str(), hash_policy.as_str()), ("listener_0", name));
            assert!(found.contains(remedy) && found.contains("--hash source-ip"), "{hash}: {found}");
        }
    }
}
