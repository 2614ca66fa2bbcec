//! The head of an endpoint's response on its way to the client.

use super::{forwarded, hop_by_hop};
use crate::config::HttpOptions;
use crate::http1::fields::Fields;

/// Removes what concerns only the upstream connection and appends `via`. An answer that belongs to
/// an upgrade (a 101, or an offer such as 426's) keeps its `connection` and `upgrade`. `server` and
/// `date` are the server's, as its own answers have them too.
pub fn forward_response<'c: 'b, 'b>(options: &'c HttpOptions, fields: &mut Fields<'b>) {
    hop_by_hop::strip_response(fields);
    if let Some(via) = &options.via {
        forwarded::append_via(fields, via);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http1::fields::Spelling;

    fn forward(options: &HttpOptions, lines: &[(&'static str, &'static str)]) -> String {
        let mut fields = Fields::default();
        for (name, value) in lines {
            fields.push(name.as_bytes(), value.as_bytes());
        }
        forward_response(options, &mut fields);
        let mut out = Vec::new();
        fields.write(Spelling::LowerCase, &mut out);
        String::from_utf8(out).unwrap()
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
        assert_eq!(forward(&HttpOptions::default(), &lines), "content-length: 3\r\n");
    }

    #[test]
    fn an_upgrade_keeps_its_headers() {
        let options = HttpOptions { via: Some("edge".into()), ..HttpOptions::default() };
        let lines = [("connection", "Upgrade"), ("upgrade", "websocket"), ("via", "1.0 prev")];
        let expected = "connection: Upgrade\r\nupgrade: websocket\r\nvia: 1.0 prev, edge\r\n";
        assert_eq!(forward(&options, &lines), expected);
        assert_eq!(forward(&options, &[]), "via: edge\r\n");
    }
}
