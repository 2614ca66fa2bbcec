//! The head of an endpoint's response on its way to the client.

use http::header::{SERVER, SET_COOKIE};
use http::{HeaderValue, response};

use super::{forwarded, hop_by_hop};
use crate::config::HttpOptions;

/// Turns the head of the endpoint's response (also a 101) into the one the client receives; `date` is
/// added by the server. `set_cookies` are those of [`Routed`](super::Routed).
pub fn forward_response(options: &HttpOptions, set_cookies: &[HeaderValue], head: &mut response::Parts) {
    let headers = &mut head.headers;
    hop_by_hop::strip_response(headers);
    for cookie in set_cookies {
        headers.append(SET_COOKIE, cookie.clone());
    }
    // Config has checked it.
    if let Ok(name) = HeaderValue::from_str(&options.server_name) {
        headers.insert(SERVER, name);
    }
    if let Some(via) = &options.via {
        forwarded::append_via(headers, via);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forward(options: &HttpOptions, lines: &[(&'static str, &'static str)]) -> Vec<String> {
        let mut response = http::Response::new(());
        for &(name, value) in lines {
            response.headers_mut().append(name, HeaderValue::from_static(value));
        }
        let (mut head, ()) = response.into_parts();
        forward_response(options, &[HeaderValue::from_static("sid=\"1\"")], &mut head);
        let mut lines: Vec<_> =
            head.headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        lines.sort();
        lines
    }

    #[test]
    fn hop_by_hop_headers_end_here() {
        let options = HttpOptions::default();
        let lines = forward(
            &options,
            &[
                ("connection", "close, x-hop"),
                ("x-hop", "1"),
                ("keep-alive", "timeout=5"),
                ("transfer-encoding", "chunked"),
                ("upgrade", "websocket"),
                ("server", "origin/1"),
                ("set-cookie", "a=b"),
            ],
        );
        assert_eq!(lines, ["server: steer", "set-cookie: a=b", "set-cookie: sid=\"1\""]);
    }

    #[test]
    fn an_upgrade_keeps_its_headers() {
        let options =
            HttpOptions { via: Some("edge".into()), server_name: "srv".into(), ..HttpOptions::default() };
        let lines =
            forward(&options, &[("connection", "Upgrade"), ("upgrade", "websocket"), ("via", "1.0 prev")]);
        assert_eq!(
            lines,
            [
                "connection: Upgrade",
                "server: srv",
                "set-cookie: sid=\"1\"",
                "upgrade: websocket",
                "via: 1.0 prev, edge"
            ]
        );
    }
}
