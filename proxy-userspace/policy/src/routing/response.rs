//! The head of an endpoint's response on its way to the client.

use http::HeaderMap;

use super::{forwarded, hop_by_hop};
use crate::config::HttpOptions;

/// Removes what concerns only the upstream connection and appends `via`. An answer that belongs to
/// an upgrade (a 101, or an offer such as 426's) keeps its `connection` and `upgrade`. `server` and
/// `date` are the server's, as its own answers have them too.
pub fn forward_response(options: &HttpOptions, headers: &mut HeaderMap) {
    hop_by_hop::strip_response(headers);
    if let Some(via) = &options.via {
        forwarded::append_via(headers, via);
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn forward(options: &HttpOptions, lines: &[(&'static str, &'static str)]) -> Vec<String> {
        let mut headers = HeaderMap::new();
        for &(name, value) in lines {
            headers.append(name, HeaderValue::from_static(value));
        }
        forward_response(options, &mut headers);
        let line = |(name, value): (_, &HeaderValue)| format!("{name}: {}", value.to_str().unwrap());
        let mut lines: Vec<_> = headers.iter().map(line).collect();
        lines.sort();
        lines
    }

    #[test]
    fn hop_by_hop_headers_end_here() {
        let lines = [
            ("connection", "close, x-hop"),
            ("x-hop", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "websocket"),
            ("content-length", "3"),
        ];
        assert_eq!(forward(&HttpOptions::default(), &lines), ["content-length: 3"]);
    }

    #[test]
    fn an_upgrade_keeps_its_headers() {
        let options = HttpOptions { via: Some("edge".into()), ..HttpOptions::default() };
        let lines = [("connection", "Upgrade"), ("upgrade", "websocket"), ("via", "1.0 prev")];
        let expected = ["connection: Upgrade", "upgrade: websocket", "via: 1.0 prev, edge"];
        assert_eq!(forward(&options, &lines), expected);
        assert_eq!(forward(&options, &[])[..], ["via: edge"]);
    }
}
