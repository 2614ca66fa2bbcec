//! Headers that end here: those of the downstream connection, and those that only Envoy's own
//! side may set.

use http::HeaderMap;
use http::header::{CONNECTION, EXPECT, HeaderName, HeaderValue, TE, TRANSFER_ENCODING, UPGRADE};

use super::{Refusal, forwarded, upgrade};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Headers of a connection itself. Many heads have none of these headers, and comparing each name
/// of the head is cheaper than looking up each of these.
const OWN: [HeaderName; 5] = [CONNECTION, TRANSFER_ENCODING, UPGRADE, KEEP_ALIVE, PROXY_CONNECTION];

/// Envoy removes these headers from every client's requests, since they control Envoy itself or
/// claim to come from Envoy. (Envoy documentation, "HTTP header sanitizing".)
const SANITISED: [HeaderName; 16] = [
    HeaderName::from_static("x-envoy-expected-rq-timeout-ms"),
    HeaderName::from_static("x-envoy-force-trace"),
    HeaderName::from_static("x-envoy-hedge-on-per-try-timeout"),
    HeaderName::from_static("x-envoy-internal"),
    HeaderName::from_static("x-envoy-ip-tags"),
    HeaderName::from_static("x-envoy-max-retries"),
    HeaderName::from_static("x-envoy-original-url"),
    HeaderName::from_static("x-envoy-retriable-header-names"),
    HeaderName::from_static("x-envoy-retriable-status-codes"),
    HeaderName::from_static("x-envoy-retry-grpc-on"),
    HeaderName::from_static("x-envoy-retry-on"),
    HeaderName::from_static("x-envoy-upstream-alt-stat-name"),
    HeaderName::from_static("x-envoy-upstream-rq-per-try-timeout-ms"),
    HeaderName::from_static("x-envoy-upstream-rq-timeout-alt-response"),
    HeaderName::from_static("x-envoy-upstream-rq-timeout-ms"),
    HeaderName::from_static("x-forwarded-client-cert"),
];

/// These headers are removed at the edge (`use_remote_address`) too.
const SANITISED_AT_EDGE: [HeaderName; 3] = [
    HeaderName::from_static("x-envoy-decorator-operation"),
    HeaderName::from_static("x-envoy-downstream-service-cluster"),
    HeaderName::from_static("x-envoy-downstream-service-node"),
];

/// An upgrade keeps `connection`, in one line, with what it names, `upgrade` and `te`.
pub(super) fn strip_request(headers: &mut HeaderMap, upgrade: bool, edge: bool) -> Result<(), Refusal> {
    strip_sanitised(headers, edge);
    if !headers.keys().any(|name| OWN.contains(name) || [TE, EXPECT].contains(name)) {
        return Ok(());
    }
    if upgrade {
        forwarded::join_lines(headers, CONNECTION);
    } else {
        strip_nominated(headers)?;
        headers.remove(CONNECTION);
        headers.remove(UPGRADE);
        strip_te(headers);
    }
    headers.remove(KEEP_ALIVE);
    headers.remove(PROXY_CONNECTION);
    // The body is framed anew.
    headers.remove(TRANSFER_ENCODING);
    // The server answers this header itself: it sends the 100 when the body is read.
    if headers.get(EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue")) {
        headers.remove(EXPECT);
    }
    Ok(())
}

/// A response that does not itself belong to an upgrade.
pub(super) fn strip_response(headers: &mut HeaderMap) {
    if !headers.keys().any(|name| OWN.contains(name)) {
        return;
    }
    if !upgrade::offered(headers) {
        for name in nominated(headers) {
            headers.remove(name);
        }
        headers.remove(CONNECTION);
        headers.remove(UPGRADE);
    }
    headers.remove(KEEP_ALIVE);
    headers.remove(PROXY_CONNECTION);
    headers.remove(TRANSFER_ENCODING);
}

/// Removes the headers that `connection` names (RFC 9110, 7.6.1), but lets no client hide the ones
/// that say where it comes from.
fn strip_nominated(headers: &mut HeaderMap) -> Result<(), Refusal> {
    for name in nominated(headers) {
        match name.as_str() {
            "host" | "x-forwarded-for" | "x-forwarded-host" | "x-forwarded-proto" => {
                return Err(Refusal::BadConnection);
            }
            // The value decides how much of the header may stay.
            "te" => {}
            _ => {
                headers.remove(name);
            }
        }
    }
    Ok(())
}

/// What `connection` names, apart from its own tokens; usually nothing.
fn nominated(headers: &HeaderMap) -> Vec<HeaderName> {
    upgrade::tokens(headers)
        .filter(|token| {
            ![&b"close"[..], b"keep-alive", b"upgrade"].iter().any(|own| token.eq_ignore_ascii_case(own))
        })
        .filter_map(|token| HeaderName::from_bytes(token).ok())
        .collect()
}

/// Only `trailers` means anything beyond this hop.
fn strip_te(headers: &mut HeaderMap) {
    let trailers = headers
        .get_all(TE)
        .iter()
        .flat_map(|line| line.as_bytes().split(|&byte| byte == b','))
        .any(|coding| coding.trim_ascii().eq_ignore_ascii_case(b"trailers"));
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    } else {
        headers.remove(TE);
    }
}

fn strip_sanitised(headers: &mut HeaderMap, edge: bool) {
    // Most requests have none of these headers, and comparing each name of the head is cheaper than
    // looking up each of these.
    let suspect = |name: &HeaderName| {
        name.as_str().starts_with("x-envoy-") || name.as_str() == "x-forwarded-client-cert"
    };
    if !headers.keys().any(suspect) {
        return;
    }
    for name in SANITISED {
        headers.remove(name);
    }
    if edge {
        for name in SANITISED_AT_EDGE {
            headers.remove(name);
        }
    }
}
