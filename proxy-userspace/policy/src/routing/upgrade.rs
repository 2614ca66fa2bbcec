//! Whether a request asks for another protocol.

use crate::http1::fields::Fields;
use crate::http1::name::Known;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Upgrade {
    None,
    WebSocket,
}

/// A WebSocket is asked for by the one `upgrade` line `websocket` and an `upgrade` token in
/// `connection`; nothing else is looked at. Any other offer (`h2c`, `TLS/1.2`, a list) is one that a
/// server may ignore (RFC 9110, 7.8), and is removed: the request is served as plain HTTP/1.1.
pub(super) fn requested(fields: &mut Fields<'_>) -> Upgrade {
    if !fields.contains(Known::Upgrade) {
        return Upgrade::None;
    }
    let websocket = {
        let mut offers = fields.all(Known::Upgrade);
        let first = offers.next().is_some_and(|offer| offer.eq_ignore_ascii_case(b"websocket"));
        first && offers.next().is_none()
    };
    if websocket && fields.has_token(Known::Connection, b"upgrade") {
        return Upgrade::WebSocket;
    }
    fields.remove_any(&[Known::Upgrade, Known::Http2Settings]);
    Upgrade::None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(lines: &[(&'static str, &'static str)]) -> (Upgrade, usize) {
        let mut fields = Fields::default();
        for (name, value) in lines {
            fields.push(name.as_bytes(), value.as_bytes());
        }
        (requested(&mut fields), fields.iter().count())
    }

    const TOKEN: (&str, &str) = ("connection", "Upgrade");

    #[test]
    fn both_headers_are_needed() {
        let offer = ("upgrade", "websocket");
        for lines in [
            &[TOKEN, offer][..],
            &[("connection", "keep-alive, UPGRADE"), ("upgrade", "WebSocket")],
            &[("connection", "keep-alive"), TOKEN, offer],
        ] {
            assert_eq!(ask(lines), (Upgrade::WebSocket, lines.len()), "{lines:?}");
        }
        assert_eq!(ask(&[TOKEN]), (Upgrade::None, 1));
        assert_eq!(ask(&[offer]), (Upgrade::None, 0));
        assert_eq!(ask(&[("connection", "keep-alive"), offer]), (Upgrade::None, 1));
        assert_eq!(ask(&[("connection", "upgraded"), offer]), (Upgrade::None, 1));
    }

    #[test]
    fn other_offers_and_lists_are_removed() {
        for offer in ["foo", "TLS/1.2", "websocket, foo", "h2c, websocket", "", "h2c"] {
            assert_eq!(
                ask(&[TOKEN, ("upgrade", offer), ("http2-settings", "x")]),
                (Upgrade::None, 1),
                "{offer}"
            );
        }
        assert_eq!(ask(&[TOKEN, ("upgrade", "foo"), ("upgrade", "websocket")]), (Upgrade::None, 1));
    }
}
