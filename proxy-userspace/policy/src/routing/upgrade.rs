//! Whether a request asks for another protocol.

use http::HeaderMap;
use http::header::{CONNECTION, HeaderName, UPGRADE};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Upgrade {
    None,
    WebSocket,
    Other,
}

/// An upgrade is asked for by an `upgrade` header and an `upgrade` token in `connection`; nothing
/// else is looked at. HTTP/2 over clear text (`h2c`) is not offered here: the request is served as
/// plain HTTP/1.1, which RFC 7540 (3.2) leaves to the server.
pub(super) fn requested(headers: &mut HeaderMap) -> Upgrade {
    let mut protocols = headers.get_all(UPGRADE).iter().map(|line| line.as_bytes());
    let (Some(protocol), another) = (protocols.next(), protocols.next()) else { return Upgrade::None };
    if !tokens(headers).any(|token| token.eq_ignore_ascii_case(b"upgrade")) {
        return Upgrade::None;
    }
    // Several values, on one line or on several, are a type that nobody configures.
    if another.is_some() {
        return Upgrade::Other;
    }
    if protocol.eq_ignore_ascii_case(b"websocket") {
        Upgrade::WebSocket
    } else if protocol.eq_ignore_ascii_case(b"h2c") {
        headers.remove(HeaderName::from_static("http2-settings"));
        Upgrade::None
    } else {
        Upgrade::Other
    }
}

/// The tokens of all `connection` lines.
pub(super) fn tokens(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    headers
        .get_all(CONNECTION)
        .iter()
        .flat_map(|line| line.as_bytes().split(|&byte| byte == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|token| !token.is_empty())
}

/// Whether a response's head belongs to another protocol: a 101, or an offer such as 426's.
pub(super) fn offered(headers: &HeaderMap) -> bool {
    headers.contains_key(UPGRADE)
        && headers.contains_key(CONNECTION)
        && tokens(headers).any(|token| token.eq_ignore_ascii_case(b"upgrade"))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn ask(lines: &[(&'static str, &'static str)]) -> Upgrade {
        let mut headers = HeaderMap::new();
        for &(name, value) in lines {
            headers.append(name, HeaderValue::from_static(value));
        }
        requested(&mut headers)
    }

    #[test]
    fn both_headers_are_needed() {
        let token = ("connection", "Upgrade");
        let type_ = ("upgrade", "websocket");
        assert_eq!(ask(&[token, type_]), Upgrade::WebSocket);
        assert_eq!(
            ask(&[("connection", "keep-alive, UPGRADE"), ("upgrade", "WebSocket")]),
            Upgrade::WebSocket
        );
        assert_eq!(ask(&[("connection", "keep-alive"), token, type_]), Upgrade::WebSocket);
        assert_eq!(ask(&[token]), Upgrade::None);
        assert_eq!(ask(&[type_]), Upgrade::None);
        assert_eq!(ask(&[("connection", "keep-alive"), type_]), Upgrade::None);
        assert_eq!(ask(&[("connection", "upgraded"), type_]), Upgrade::None);
    }

    #[test]
    fn other_types_and_lists() {
        let token = ("connection", "upgrade");
        assert_eq!(ask(&[token, ("upgrade", "foo")]), Upgrade::Other);
        assert_eq!(ask(&[token, ("upgrade", "websocket, foo")]), Upgrade::Other);
        assert_eq!(ask(&[token, ("upgrade", "foo"), ("upgrade", "websocket")]), Upgrade::Other);
        assert_eq!(ask(&[token, ("upgrade", "")]), Upgrade::Other);
        assert_eq!(ask(&[token, ("upgrade", "h2c")]), Upgrade::None);
    }
}
