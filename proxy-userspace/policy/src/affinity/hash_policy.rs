//! Envoy's route `hash_policy`: from a request head, as it leaves for the endpoint, to a hash.

use std::borrow::Cow;
use std::net::SocketAddr;

use http::HeaderValue;
use http::header::HeaderName;
use xxhash_rust::xxh64::{Xxh64, xxh64 as seeded_xxh64};

use super::address::{AddressText, HostAddress};
use super::{cookie, rewrite, xxh64};
use crate::config::{CookiePolicy, HashPolicy, HashSource, HeaderSource, RegexRewrite};
use crate::http1::fields::{joined, with_commas};
use crate::http1::name::Known;
use crate::http1::request::RequestHead;

/// What the policies look at.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a, 'b> {
    /// The head, with forwarded headers and without hop-by-hop headers; the target is in origin
    /// form.
    pub head: &'a RequestHead<'b>,
    /// `:scheme`
    pub scheme: &'a str,
    /// The trusted client address.
    pub client: HostAddress,
    /// The peer of the downstream connection.
    pub remote: SocketAddr,
    pub local: SocketAddr,
}

#[derive(Debug, Default)]
pub struct Outcome {
    /// `None`: no policy yielded anything.
    pub hash: Option<u64>,
    /// One for each cookie that was made.
    pub set_cookies: Vec<HeaderValue>,
}

/// Evaluates the policies in order. Each hash is combined with the result of the policies before,
/// so the same policies in another order give another result.
pub fn evaluate(policies: &[HashPolicy], request: &Request<'_, '_>) -> Outcome {
    let mut outcome = Outcome::default();
    for policy in policies {
        if let Some(new) = hash_of(&policy.source, request, &mut outcome.set_cookies) {
            outcome.hash = Some(outcome.hash.map_or(0, |old| old.rotate_left(1)) ^ new);
        }
        // Stops also if only an earlier policy yielded a hash.
        if policy.terminal && outcome.hash.is_some() {
            break;
        }
    }
    outcome
}

fn hash_of(source: &HashSource, request: &Request<'_, '_>, made: &mut Vec<HeaderValue>) -> Option<u64> {
    match source {
        HashSource::Header { name, rewrite } => hash_of_header(name, rewrite.as_ref(), request),
        HashSource::Cookie(policy) => hash_of_cookie(policy, request, made),
        HashSource::SourceIp => Some(xxh64(AddressText::of_host(request.client).as_bytes())),
        HashSource::QueryParameter { name } => {
            query_parameter(request.head.query()?, name.as_bytes()).map(xxh64)
        }
    }
}

fn hash_of_header(
    name: &HeaderSource,
    rewrite: Option<&RegexRewrite>,
    request: &Request<'_, '_>,
) -> Option<u64> {
    let head = request.head;
    let value = match name {
        HeaderSource::Path => &head.target,
        HeaderSource::Method => head.method.as_bytes(),
        HeaderSource::Scheme => request.scheme.as_bytes(),
        HeaderSource::Authority => head.fields.get(Known::Host)?,
        HeaderSource::Name(name) => {
            let mut lines = head.fields.named(name.as_str());
            let first = lines.next()?;
            match lines.next() {
                None => first,
                Some(second) => {
                    return Some(hash_of_lines(name, rewrite, [first, second].into_iter().chain(lines)));
                }
            }
        }
    };
    Some(xxh64(&rewritten(rewrite, value)))
}

/// A header that came on several lines. Envoy keeps one value of the headers that it knows, and
/// chains the sorted values of all others through the seed.
fn hash_of_lines<'a>(
    name: &HeaderName,
    rewrite: Option<&RegexRewrite>,
    lines: impl Iterator<Item = &'a [u8]>,
) -> u64 {
    if is_joined(name) {
        return match rewrite {
            Some(_) => xxh64(&rewritten(rewrite, &joined(lines))),
            None => {
                let mut hash = Xxh64::new(0);
                for part in with_commas(lines) {
                    hash.update(part);
                }
                hash.digest()
            }
        };
    }
    let mut values: Vec<_> = lines.map(|line| rewritten(rewrite, line)).collect();
    values.sort_unstable();
    values.iter().fold(0, |seed, value| seeded_xxh64(value, seed))
}

fn rewritten<'a>(rewrite: Option<&RegexRewrite>, value: &'a [u8]) -> Cow<'a, [u8]> {
    rewrite.map_or(Cow::Borrowed(value), |rule| rewrite::replace_all(rule, value))
}

/// Headers of which Envoy 1.39 keeps one value; found by observing Envoy.
fn is_joined(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "accept"
            | "accept-encoding"
            | "access-control-request-headers"
            | "access-control-request-method"
            | "authorization"
            | "cache-control"
            | "content-encoding"
            | "content-type"
            | "expect"
            | "grpc-timeout"
            | "if-match"
            | "if-modified-since"
            | "if-none-match"
            | "if-range"
            | "if-unmodified-since"
            | "origin"
            | "pragma"
            | "referer"
            | "user-agent"
            | "via"
            | "x-client-trace-id"
            | "x-envoy-attempt-count"
            | "x-envoy-external-address"
            | "x-envoy-original-path"
            | "x-forwarded-for"
            | "x-forwarded-host"
            | "x-forwarded-port"
            | "x-forwarded-proto"
            | "x-request-id"
    )
}

fn hash_of_cookie(
    policy: &CookiePolicy,
    request: &Request<'_, '_>,
    made: &mut Vec<HeaderValue>,
) -> Option<u64> {
    let present = cookie::value(&request.head.fields, &policy.name).filter(|value| !value.is_empty());
    if let Some(value) = present {
        return Some(xxh64(value));
    }
    policy.ttl?;
    let value = cookie::made_value(request.remote, request.local);
    made.extend(cookie::set_cookie(policy, &value));
    Some(xxh64(value.as_bytes()))
}

/// The raw value of the first parameter with exactly that name; `k` alone has the value "".
fn query_parameter<'q>(query: &'q [u8], name: &[u8]) -> Option<&'q [u8]> {
    query.split(|&byte| byte == b'&').find_map(|parameter| {
        let equals = memchr::memchr(b'=', parameter);
        let (key, value) =
            equals.map_or((parameter, &b""[..]), |at| (&parameter[..at], &parameter[at + 1..]));
        (key == name).then_some(value)
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A head that lives as long as the test process.
    fn head<'a>(target: &str, lines: &[(&str, &str)]) -> RequestHead<'a> {
        let lines: String = lines.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let head = format!("GET {target} HTTP/1.1\r\n{lines}\r\n");
        RequestHead::parse(head.leak().as_bytes()).unwrap()
    }

    fn run(policies: &[HashPolicy], head: &RequestHead<'_>) -> Outcome {
        let request = Request {
            head,
            scheme: "http",
            client: HostAddress::from("203.0.113.7".parse::<std::net::IpAddr>().unwrap()),
            remote: "127.0.0.1:43934".parse().unwrap(),
            local: "127.0.0.1:21900".parse().unwrap(),
        };
        evaluate(policies, &request)
    }

    fn header(name: &'static str) -> HashPolicy {
        let name = HeaderSource::Name(HeaderName::from_static(name));
        HashPolicy { source: HashSource::Header { name, rewrite: None }, terminal: false }
    }

    fn terminal(mut policy: HashPolicy) -> HashPolicy {
        policy.terminal = true;
        policy
    }

    fn hash(policies: &[HashPolicy], lines: &[(&str, &str)]) -> Option<u64> {
        run(policies, &head("/", lines)).hash
    }

    #[test]
    fn policies_combine_in_order() {
        let both = [("x-a", "a"), ("x-b", "b")];
        assert_eq!(hash(&[header("x-a"), header("x-b")], &both), Some(0xdcd8_a342_49eb_432c));
        assert_eq!(hash(&[header("x-b"), header("x-a")], &both), Some(0x22c4_91b3_9c6b_516d));
        let twice = xxh64(b"a").rotate_left(1) ^ xxh64(b"a");
        assert_eq!(hash(&[header("x-a"), header("x-a")], &both), Some(twice));
        assert_eq!(hash(&[header("x-no"), header("x-b")], &both), Some(xxh64(b"b")));
        assert_eq!(hash(&[header("x-no")], &both), None);
        assert_eq!(hash(&[], &both), None);
    }

    #[test]
    fn terminal_stops_when_there_is_a_hash() {
        let lines = [("x-a", "a"), ("x-b", "b")];
        assert_eq!(hash(&[terminal(header("x-a")), header("x-b")], &lines), Some(xxh64(b"a")));
        assert_eq!(hash(&[terminal(header("x-no")), header("x-b")], &lines), Some(xxh64(b"b")));
        let earlier = [header("x-a"), terminal(header("x-no")), header("x-b")];
        assert_eq!(hash(&earlier, &lines), Some(xxh64(b"a")));
    }

    #[test]
    fn lines_of_an_unknown_header_are_sorted_and_chained() {
        let expected = Some(0x76d9_a191_6ddc_a8e6);
        assert_eq!(hash(&[header("x-a")], &[("x-a", "a"), ("x-a", "b")]), expected);
        assert_eq!(hash(&[header("x-a")], &[("x-a", "b"), ("x-a", "a")]), expected);
        assert_ne!(hash(&[header("x-a")], &[("x-a", "a,b")]), expected);
        assert_eq!(hash(&[header("x-a")], &[("x-a", "")]), Some(xxh64(b"")), "present but empty counts");
    }

    #[test]
    fn lines_of_a_known_header_are_joined() {
        for (lines, value) in [
            (&["a", "b"][..], "a,b"),
            (&["b", "a"], "b,a"),
            (&["", "a"], "a"),
            (&["a", "", "b"], "a,b"),
            (&["", ""], ""),
            (&["a, b", "c"], "a, b,c"),
        ] {
            let lines: Vec<_> = lines.iter().map(|line| ("x-forwarded-for", *line)).collect();
            assert_eq!(hash(&[header("x-forwarded-for")], &lines), Some(xxh64(value.as_bytes())), "{value}");
        }
    }

    #[test]
    fn rewrites_come_before_sorting_and_after_joining() {
        let mut policies = [header("x-a"), header("user-agent")];
        let pattern = regex::bytes::Regex::new("^([^,]+).*$").unwrap();
        let rule = RegexRewrite { pattern, substitution: "\\1".into() };
        for policy in &mut policies {
            let HashSource::Header { rewrite, .. } = &mut policy.source else { unreachable!() };
            *rewrite = Some(rule.clone());
        }
        let chained = seeded_xxh64(b"b", seeded_xxh64(b"a", 0));
        assert_eq!(hash(&policies[..1], &[("x-a", "b,1"), ("x-a", "a,2")]), Some(chained));
        assert_eq!(hash(&policies[1..], &[("user-agent", "b"), ("user-agent", "a")]), Some(xxh64(b"b")));
    }

    #[test]
    fn pseudo_headers() {
        let mut head = head("//x?y=1", &[("host", "Foo:81")]);
        head.method = "DELETE";
        for (name, value) in [
            (HeaderSource::Path, "//x?y=1"),
            (HeaderSource::Authority, "Foo:81"),
            (HeaderSource::Method, "DELETE"),
            (HeaderSource::Scheme, "http"),
        ] {
            let policy = HashPolicy { source: HashSource::Header { name, rewrite: None }, terminal: false };
            assert_eq!(run(&[policy], &head).hash, Some(xxh64(value.as_bytes())), "{value}");
        }
    }

    #[test]
    fn source_ip_is_the_trusted_address() {
        let policy = HashPolicy { source: HashSource::SourceIp, terminal: false };
        assert_eq!(hash(&[policy], &[]), Some(xxh64(b"203.0.113.7")));
    }

    #[test]
    fn query_parameters_are_raw() {
        for (target, value) in [
            ("/?k=v", Some("v")),
            ("/?a=1&k=v&k=w", Some("v")),
            ("/?k", Some("")),
            ("/?k=", Some("")),
            ("/?k=%41+b", Some("%41+b")),
            ("/?k=a=b", Some("a=b")),
            ("/?a?k=v", None),
            ("/??k=v", None),
            ("/?K=v&xk=v", None),
            ("/?", None),
            ("/", None),
        ] {
            let source = HashSource::QueryParameter { name: "k".into() };
            let outcome = run(&[HashPolicy { source, terminal: false }], &head(target, &[]));
            assert_eq!(outcome.hash, value.map(|value| xxh64(value.as_bytes())), "{target}");
        }
    }

    #[test]
    fn cookies_are_made_only_with_a_ttl() {
        let policy = |ttl| {
            let name = "sid".to_owned();
            let cookie = CookiePolicy { name, ttl, path: None, attributes: vec![] };
            [HashPolicy { source: HashSource::Cookie(cookie), terminal: false }]
        };
        for lines in [&[][..], &[("cookie", "sid=")], &[("cookie", "sid=\"\"")]] {
            assert_eq!(hash(&policy(None), lines), None);
            let outcome = run(&policy(Some(Duration::ZERO)), &head("/", lines));
            let value = format!("{:016x}", xxh64(b"127.0.0.1:43934127.0.0.1:21900"));
            assert_eq!(outcome.hash, Some(xxh64(value.as_bytes())));
            assert_eq!(outcome.set_cookies, [format!("sid=\"{value}\"; HttpOnly").as_str()]);
        }
        let outcome = run(&policy(Some(Duration::ZERO)), &head("/", &[("cookie", "sid=x")]));
        assert_eq!((outcome.hash, outcome.set_cookies.len()), (Some(xxh64(b"x")), 0));
    }
}
