//! What a complete request head must look like before hyper sees it. Pure.
//!
//! hyper reads heads as robustly as RFC 9112 allows; a proxy must read them as strictly as its
//! strictest neighbour, since every shape that two parsers understand differently smuggles a
//! request past one of them (RFC 9112, sections 5, 6.1, 6.3 and 11.2). So everything doubtful is
//! refused here.

use strum::{IntoStaticStr, VariantArray};
use thiserror::Error;

/// What follows a request head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyFraming {
    None,
    /// Content-Length, 1 or more.
    Length(u64),
    Chunked,
}

/// What the guard must know of a request head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    pub body: BodyFraming,
    /// Asks for `Upgrade: websocket`, as Envoy understands it: HTTP/1.1, `Connection` has the token
    /// `upgrade`, and the one `Upgrade` line is the word `websocket` alone, in any case.
    pub upgrade: bool,
}

/// Why a request's bytes are refused. `into_str` gives the label of `steer_faults_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum Malformed {
    #[error("a line ends with LF alone")]
    BareLf,
    #[error("a CR is not followed by LF")]
    BareCr,
    #[error("a NUL byte in the request head")]
    Nul,
    #[error("the request line is not `METHOD target HTTP/1.1`")]
    RequestLine,
    #[error("the request target has a fragment")]
    #[strum(serialize = "fragment_in_target")]
    Fragment,
    #[error("a header line is continued on the next (obsolete folding)")]
    #[strum(serialize = "obs_fold")]
    Folded,
    #[error("a header line is not `name: value`")]
    HeaderLine,
    #[error("whitespace before the colon of a header")]
    SpaceBeforeColon,
    #[error("more than one Host header")]
    RepeatedHost,
    #[error("Content-Length is not one decimal number, given once")]
    ContentLength,
    #[error("Content-Length together with Transfer-Encoding")]
    LengthAndEncoding,
    #[error("Transfer-Encoding is not `chunked` alone, in HTTP/1.1")]
    TransferEncoding,
    #[error("bad chunk in the request body")]
    Chunk,
    #[error("the request head is too long")]
    #[strum(serialize = "head_too_long")]
    TooLong,
    #[error("too many request headers")]
    TooManyHeaders,
    #[error("the request target is too long")]
    TargetTooLong,
}

/// The longest request target that `http::Uri` can hold.
const MAX_TARGET: usize = u16::MAX as usize - 1;

/// Longer than any real one; `http::HeaderName` holds twice that.
const MAX_NAME: usize = 32 * 1024;

/// Checks a complete head: CRLF line ends throughout (the caller has seen to that), up to and
/// including the empty line.
pub fn check(head: &[u8]) -> Result<Head, Malformed> {
    let mut lines = lines(head);
    let http_11 = request_line(lines.next().unwrap_or_default())?;

    let mut length: Option<u64> = None;
    let mut chunked = false;
    let mut hosts = 0;
    let mut upgrades = 0;
    let mut websocket = false;
    let mut connection_upgrade = false;
    for line in lines {
        let (name, value) = header_line(line)?;
        if name.eq_ignore_ascii_case(b"content-length") {
            let parsed = decimal(value).ok_or(Malformed::ContentLength)?;
            if length.replace(parsed).is_some() {
                return Err(Malformed::ContentLength);
            }
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if chunked || !http_11 || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(Malformed::TransferEncoding);
            }
            chunked = true;
        } else if name.eq_ignore_ascii_case(b"host") {
            hosts += 1;
            if hosts > 1 {
                return Err(Malformed::RepeatedHost);
            }
        } else if name.eq_ignore_ascii_case(b"upgrade") {
            upgrades += 1;
            websocket = value.eq_ignore_ascii_case(b"websocket");
        } else if name.eq_ignore_ascii_case(b"connection") {
            connection_upgrade |=
                value.split(|&b| b == b',').any(|token| trim(token).eq_ignore_ascii_case(b"upgrade"));
        }
    }

    let body = match (length, chunked) {
        (Some(_), true) => return Err(Malformed::LengthAndEncoding),
        (None, true) => BodyFraming::Chunked,
        (Some(0) | None, false) => BodyFraming::None,
        (Some(length), false) => BodyFraming::Length(length),
    };
    let upgrade = http_11 && upgrades == 1 && websocket && connection_upgrade;
    Ok(Head { body, upgrade })
}

/// The head without the headers that announce a body.
pub fn without_body_headers(head: &[u8]) -> Vec<u8> {
    let mut kept = Vec::with_capacity(head.len());
    for line in lines(head) {
        let name = line.split(|&b| b == b':').next().unwrap_or_default();
        if !name.eq_ignore_ascii_case(b"content-length") && !name.eq_ignore_ascii_case(b"transfer-encoding") {
            kept.extend_from_slice(line);
            kept.extend_from_slice(b"\r\n");
        }
    }
    kept.extend_from_slice(b"\r\n");
    kept
}

/// The lines of a head, without line ends and without the last, empty one.
fn lines(head: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = head;
    std::iter::from_fn(move || {
        let end = memchr::memchr(b'\r', rest)?;
        let line = &rest[..end];
        rest = rest.get(end + 2..).unwrap_or_default();
        (!line.is_empty()).then_some(line)
    })
}

/// Whether the request is HTTP/1.1; otherwise it is HTTP/1.0.
fn request_line(line: &[u8]) -> Result<bool, Malformed> {
    let mut parts = line.split(|&b| b == b' ');
    let (Some(method), Some(target), Some(version), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(Malformed::RequestLine);
    };
    let http_11 = match version {
        b"HTTP/1.1" => true,
        b"HTTP/1.0" => false,
        _ => return Err(Malformed::RequestLine),
    };
    let printable = |&b: &u8| b > b' ' && b != 0x7f;
    if method.is_empty() || !method.iter().all(is_token) || target.is_empty() || !target.iter().all(printable)
    {
        return Err(Malformed::RequestLine);
    }
    if target.contains(&b'#') {
        // http::Uri would silently drop the fragment, and with it a part that another parser takes
        // for the path.
        return Err(Malformed::Fragment);
    }
    if target.len() > MAX_TARGET {
        return Err(Malformed::TargetTooLong);
    }
    Ok(http_11)
}

fn header_line(line: &[u8]) -> Result<(&[u8], &[u8]), Malformed> {
    if matches!(line.first(), Some(b' ' | b'\t')) {
        return Err(Malformed::Folded);
    }
    let colon = memchr::memchr(b':', line).ok_or(Malformed::HeaderLine)?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    if matches!(name.last(), Some(b' ' | b'\t')) {
        return Err(Malformed::SpaceBeforeColon);
    }
    let allowed = |&b: &u8| b >= b' ' && b != 0x7f || b == b'\t';
    if name.is_empty() || name.len() > MAX_NAME || !name.iter().all(is_token) || !value.iter().all(allowed) {
        return Err(Malformed::HeaderLine);
    }
    Ok((name, trim(value)))
}

/// Digits only: no sign, no list, no spaces inside. At most `i64::MAX`, which every other parser
/// can hold, too.
fn decimal(value: &[u8]) -> Option<u64> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number: u64 = std::str::from_utf8(value).ok()?.parse().ok()?;
    (number <= i64::MAX.unsigned_abs()).then_some(number)
}

/// Without optional whitespace (SP, HTAB) at either end.
fn trim(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

/// RFC 9110, 5.6.2.
fn is_token(b: &u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head_of(headers: &str) -> Result<Head, Malformed> {
        check(format!("GET / HTTP/1.1\r\nHost: t\r\n{headers}\r\n").as_bytes())
    }

    #[test]
    fn body_framing() {
        assert_eq!(head_of("").unwrap().body, BodyFraming::None);
        assert_eq!(head_of("Content-Length: 0\r\n").unwrap().body, BodyFraming::None);
        assert_eq!(head_of("content-length:\t7 \r\n").unwrap().body, BodyFraming::Length(7));
        assert_eq!(head_of("Content-Length: 007\r\n").unwrap().body, BodyFraming::Length(7));
        assert_eq!(head_of("Transfer-Encoding: Chunked\r\n").unwrap().body, BodyFraming::Chunked);
    }

    #[test]
    fn upgrades_are_what_envoy_takes_for_one() {
        let upgrade = |headers| head_of(headers).unwrap().upgrade;
        assert!(upgrade("Connection: Upgrade\r\nUpgrade: websocket\r\n"));
        assert!(upgrade("connection: keep-alive, UPGRADE\r\nupgrade: WebSocket\r\n"));
        assert!(upgrade("Connection: keep-alive\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"));
        assert!(!upgrade("Connection: keep-alive\r\nUpgrade: websocket\r\n"));
        assert!(!upgrade("Connection: Upgrade\r\n"));
        assert!(!upgrade("Connection: Upgrade\r\nUpgrade: h2c\r\n"));
        assert!(!upgrade("Connection: Upgrade\r\nUpgrade: websocket, foo\r\n"));
        assert!(!upgrade("Connection: Upgrade\r\nUpgrade: websocket\r\nUpgrade: websocket\r\n"));
        let http_10 = check(b"GET / HTTP/1.0\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n");
        assert!(!http_10.unwrap().upgrade);
    }

    #[test]
    fn refused_heads() {
        for (head, why) in [
            ("GET  / HTTP/1.1\r\n\r\n", Malformed::RequestLine),
            ("GET / HTTP/1.1 \r\n\r\n", Malformed::RequestLine),
            ("GET /\r\n\r\n", Malformed::RequestLine),
            ("GET / HTTP/1.2\r\n\r\n", Malformed::RequestLine),
            ("PRI * HTTP/2.0\r\n\r\n", Malformed::RequestLine),
            ("G@T / HTTP/1.1\r\n\r\n", Malformed::RequestLine),
            (" GET / HTTP/1.1\r\n\r\n", Malformed::RequestLine),
            ("GET /\tx HTTP/1.1\r\n\r\n", Malformed::RequestLine),
            ("GET /a#b HTTP/1.1\r\n\r\n", Malformed::Fragment),
            ("GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n", Malformed::Folded),
            ("GET / HTTP/1.1\r\n Host: t\r\n\r\n", Malformed::Folded),
            ("GET / HTTP/1.1\r\nHost : t\r\n\r\n", Malformed::SpaceBeforeColon),
            ("GET / HTTP/1.1\r\nHost\r\n\r\n", Malformed::HeaderLine),
            ("GET / HTTP/1.1\r\n: t\r\n\r\n", Malformed::HeaderLine),
            ("GET / HTTP/1.1\r\nA: b\x01\r\n\r\n", Malformed::HeaderLine),
            ("GET / HTTP/1.1\r\nA(: b\r\n\r\n", Malformed::HeaderLine),
            ("GET / HTTP/1.1\r\nHost: a\r\nhost: a\r\n\r\n", Malformed::RepeatedHost),
            ("GET / HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\n", Malformed::ContentLength),
            ("GET / HTTP/1.1\r\nContent-Length: +1\r\n\r\n", Malformed::ContentLength),
            ("GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", Malformed::ContentLength),
            ("GET / HTTP/1.1\r\nContent-Length: 0x1\r\n\r\n", Malformed::ContentLength),
            ("GET / HTTP/1.1\r\nContent-Length:\r\n\r\n", Malformed::ContentLength),
            ("GET / HTTP/1.1\r\nContent-Length: 9223372036854775808\r\n\r\n", Malformed::ContentLength),
            ("GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", Malformed::ContentLength),
            (
                "GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
                Malformed::LengthAndEncoding,
            ),
            (
                "GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n",
                Malformed::LengthAndEncoding,
            ),
            ("GET / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", Malformed::TransferEncoding),
            ("GET / HTTP/1.1\r\nTransfer-Encoding: identity\r\n\r\n", Malformed::TransferEncoding),
            ("GET / HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n", Malformed::TransferEncoding),
            ("GET / HTTP/1.1\r\nTransfer-Encoding:\r\n\r\n", Malformed::TransferEncoding),
            (
                "GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
                Malformed::TransferEncoding,
            ),
            ("GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", Malformed::TransferEncoding),
        ] {
            assert_eq!(check(head.as_bytes()), Err(why), "{head:?}");
        }
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(MAX_TARGET));
        assert_eq!(check(long.as_bytes()), Err(Malformed::TargetTooLong));
    }

    #[test]
    fn body_headers_are_cut_out() {
        let head =
            b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\nA: b\r\n\r\n";
        assert_eq!(without_body_headers(head), b"POST / HTTP/1.1\r\nHost: t\r\nA: b\r\n\r\n");
    }
}
