//! Headers that end here: those of the downstream connection, and those that only Envoy's own
//! side may set.

use strum::VariantArray as _;

use super::Refusal;
use crate::http1::fields::Fields;
use crate::http1::name::Known;

/// Headers of a connection itself.
const OWN: [Known; 5] =
    [Known::Connection, Known::TransferEncoding, Known::Upgrade, Known::KeepAlive, Known::ProxyConnection];

/// Envoy removes these headers from every client's requests, since they control Envoy itself or
/// claim to come from Envoy. (Envoy documentation, "HTTP header sanitizing".)
const SANITISED: [&str; 16] = [
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-force-trace",
    "x-envoy-hedge-on-per-try-timeout",
    "x-envoy-internal",
    "x-envoy-ip-tags",
    "x-envoy-max-retries",
    "x-envoy-original-url",
    "x-envoy-retriable-header-names",
    "x-envoy-retriable-status-codes",
    "x-envoy-retry-grpc-on",
    "x-envoy-retry-on",
    "x-envoy-upstream-alt-stat-name",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-upstream-rq-timeout-alt-response",
    "x-envoy-upstream-rq-timeout-ms",
    "x-forwarded-client-cert",
];

/// These headers are removed at the edge (`use_remote_address`) too.
const SANITISED_AT_EDGE: [&str; 3] =
    ["x-envoy-decorator-operation", "x-envoy-downstream-service-cluster", "x-envoy-downstream-service-node"];

/// An upgrade keeps `connection`, in one line, with what it names, `upgrade` and `te`.
pub(super) fn strip_request(fields: &mut Fields<'_>, upgrade: bool, edge: bool) -> Result<(), Refusal> {
    strip_sanitised(fields, edge);
    if upgrade {
        fields.join_lines(Known::Connection);
    } else {
        strip_nominated(fields)?;
        fields.remove_any(&[Known::Connection, Known::Upgrade]);
        strip_te(fields);
    }
    // Transfer-Encoding: the body is framed anew.
    fields.remove_any(&[Known::KeepAlive, Known::ProxyConnection, Known::TransferEncoding]);
    // Steer answers this header itself, when the body is read.
    if fields.get(Known::Expect).is_some_and(|value| value.eq_ignore_ascii_case(b"100-continue")) {
        fields.remove(Known::Expect);
    }
    Ok(())
}

/// A response that does not itself belong to an upgrade.
pub(super) fn strip_response(fields: &mut Fields<'_>) {
    if !fields.contains_any(&OWN) {
        return;
    }
    if !upgrade_offered(fields) {
        let nominated = nominated(fields);
        fields.retain_names(|name| !nominated.iter().any(|gone| gone.eq_ignore_ascii_case(name)));
        fields.remove_any(&[Known::Connection, Known::Upgrade]);
    }
    fields.remove_any(&[Known::KeepAlive, Known::ProxyConnection, Known::TransferEncoding]);
}

/// Removes the trailer lines with a name that decisions depend on: all of these names belong into a
/// head, and a recipient may merge trailer lines into the head (RFC 9110, 6.5.1).
pub fn strip_trailers(fields: &mut Fields<'_>) {
    fields.remove_any(Known::VARIANTS);
    strip_sanitised(fields, true);
}

/// Whether a response's head belongs to another protocol: a 101, or an offer such as 426's.
fn upgrade_offered(fields: &Fields<'_>) -> bool {
    fields.contains(Known::Upgrade) && fields.has_token(Known::Connection, b"upgrade")
}

/// Removes the headers that `connection` names (RFC 9110, 7.6.1), but lets no client hide the ones
/// that say where it comes from.
fn strip_nominated(fields: &mut Fields<'_>) -> Result<(), Refusal> {
    const HIDDEN: [Known; 4] =
        [Known::Host, Known::XForwardedFor, Known::XForwardedHost, Known::XForwardedProto];
    let nominated = nominated(fields);
    if nominated.is_empty() {
        return Ok(());
    }
    if nominated.iter().any(|name| Known::of(name).is_some_and(|known| HIDDEN.contains(&known))) {
        return Err(Refusal::BadConnection);
    }
    // The value of `te` decides how much of the header may stay.
    let stays =
        |name: &[u8]| Known::Te.is(name) || !nominated.iter().any(|gone| gone.eq_ignore_ascii_case(name));
    fields.retain_names(stays);
    Ok(())
}

/// What `connection` names, apart from its own tokens; usually nothing.
fn nominated(fields: &Fields<'_>) -> Vec<Vec<u8>> {
    let own = |token: &&[u8]| {
        ![&b"close"[..], b"keep-alive", b"upgrade"].iter().any(|own| token.eq_ignore_ascii_case(own))
    };
    fields.tokens(Known::Connection).filter(own).map(<[u8]>::to_vec).collect()
}

/// Only `trailers` means anything beyond this hop.
fn strip_te(fields: &mut Fields<'_>) {
    if fields.has_token(Known::Te, b"trailers") {
        fields.set(Known::Te, &b"trailers"[..]);
    } else {
        fields.remove(Known::Te);
    }
}

fn strip_sanitised(fields: &mut Fields<'_>, edge: bool) {
    let suspect =
        |name: &[u8]| name.len() >= 16 && matches!(name, [b'x' | b'X', b'-', b'e' | b'E' | b'f' | b'F', ..]);
    let names =
        |list: &[&str], name: &[u8]| list.iter().any(|gone| gone.as_bytes().eq_ignore_ascii_case(name));
    fields.retain_names(|name| {
        !suspect(name) || !(names(&SANITISED, name) || edge && names(&SANITISED_AT_EDGE, name))
    });
}
