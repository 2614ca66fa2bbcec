//! Which route a request takes.

use crate::config::{PathMatch, Route, VirtualHost};
use crate::http1::name::Known;
use crate::http1::request::RequestHead;

/// The first route that matches in the virtual host that matches best.
pub(super) fn find_route<'c>(virtual_hosts: &'c [VirtualHost], head: &RequestHead<'_>) -> Option<&'c Route> {
    let host = head.fields.get(Known::Host)?;
    let path = head.path();
    best_match(virtual_hosts, host)?.routes.iter().find(|route| match &route.path {
        PathMatch::Prefix(prefix) => path.starts_with(prefix.as_bytes()),
        PathMatch::Exact(exact) => path == exact.as_bytes(),
    })
}

/// How closely a domain matched; greater is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Match {
    Any,
    /// `example.*`, with the length of the fixed part.
    Prefix(usize),
    /// `*.example.com` or `*-x.example.com`, with the length of the fixed part.
    Suffix(usize),
    Exact,
}

fn best_match<'c>(virtual_hosts: &'c [VirtualHost], host: &[u8]) -> Option<&'c VirtualHost> {
    let mut best = None;
    for virtual_host in virtual_hosts {
        for domain in &virtual_host.domains {
            let Some(found) = matches(domain.as_bytes(), host) else { continue };
            if found == Match::Exact {
                return Some(virtual_host);
            }
            if best.is_none_or(|(best, _)| found > best) {
                best = Some((found, virtual_host));
            }
        }
    }
    best.map(|(_, virtual_host)| virtual_host)
}

/// Ignores the case of ASCII letters; a port is compared like any other text. A wildcard stands for
/// one byte at least.
fn matches(domain: &[u8], host: &[u8]) -> Option<Match> {
    match domain {
        b"*" => Some(Match::Any),
        [b'*', suffix @ ..] => {
            let start = host.len().checked_sub(suffix.len()).filter(|&start| start > 0)?;
            host[start..].eq_ignore_ascii_case(suffix).then_some(Match::Suffix(suffix.len()))
        }
        [prefix @ .., b'*'] => {
            let start = host.get(..prefix.len()).filter(|start| start.len() < host.len())?;
            start.eq_ignore_ascii_case(prefix).then_some(Match::Prefix(prefix.len()))
        }
        _ => host.eq_ignore_ascii_case(domain).then_some(Match::Exact),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(domains: &[&[&str]]) -> Vec<VirtualHost> {
        domains
            .iter()
            .enumerate()
            .map(|(position, domains)| VirtualHost {
                name: position.to_string(),
                domains: domains.iter().map(|&domain| domain.to_owned()).collect(),
                routes: vec![],
            })
            .collect()
    }

    #[test]
    fn the_closest_domain_wins_wherever_it_stands() {
        let hosts = hosts(&[
            &["*"],
            &["foo.*"],
            &["foo.bar.*", "*.com"],
            &["*.example.com", "*-x.example.com"],
            &["foo.example.com", "foo.example.com:8080"],
        ]);
        for (host, expected) in [
            ("foo.example.com", "4"),
            ("FOO.Example.Com:8080", "4"),
            ("foo.example.com:81", "1"),
            ("a.example.com", "3"),
            ("a-x.example.com", "3"),
            (".example.com", "2"),
            ("foo.example.org", "1"),
            ("foo.bar.org", "2"),
            ("foo.bar.com", "2"),
            ("foo.", "0"),
            ("elsewhere", "0"),
            ("", "0"),
        ] {
            assert_eq!(best_match(&hosts, host.as_bytes()).unwrap().name, expected, "{host}");
        }
        assert!(best_match(&hosts[1..], b"elsewhere").is_none());
    }
}
