//! The request target and `host`.

use http::header::HOST;
use http::uri::{PathAndQuery, Scheme};
use http::{HeaderValue, Uri, request};

use super::Refusal;

/// Brings the target into origin form. An absolute form's authority takes the place of `host`; the
/// forms of CONNECT and `OPTIONS *` are refused.
pub(super) fn normalise(head: &mut request::Parts) -> Result<(), Refusal> {
    if let Some(authority) = head.uri.authority() {
        // Only plain HTTP is spoken here. User information in a target is an attempt to look like
        // another host (RFC 9110, 4.2.4).
        if head.uri.scheme() != Some(&Scheme::HTTP) || authority.as_str().contains('@') {
            return Err(Refusal::BadTarget);
        }
        let host = HeaderValue::from_str(authority.as_str()).map_err(|_| Refusal::BadTarget)?;
        head.headers.insert(HOST, host);
        let path = head.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        head.uri = Uri::from(path);
    }
    if !head.uri.path().starts_with('/') {
        return Err(Refusal::BadTarget);
    }
    let mut hosts = head.headers.get_all(HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(_), None) => Ok(()),
        _ => Err(Refusal::MissingHost),
    }
}
