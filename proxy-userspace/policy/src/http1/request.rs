//! A request head: read as strictly as the strictest neighbour would read it, since every shape that
//! two parsers understand differently smuggles a request past one of them (RFC 9112, sections 5, 6.1,
//! 6.3 and 11.2). So everything doubtful is refused here.

use std::borrow::Cow;

use super::fields::{Fields, Spelling};
use super::malformed::Malformed;
use super::name::Known;
use super::{Version, decimal};

/// How the body of a message is framed (RFC 9112, 6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyFraming {
    None,
    /// Content-Length, 1 or more.
    Length(u64),
    Chunked,
    /// Responses only: until the connection is closed.
    UntilClose,
}

/// A request head as parts of the bytes it came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestHead<'b> {
    pub method: &'b str,
    /// As the client sent it; routing brings the target into origin form.
    pub target: Cow<'b, [u8]>,
    pub version: Version,
    pub fields: Fields<'b>,
    /// How the body is framed that follows the head.
    pub body: BodyFraming,
    /// Whether the connection can be used for another request, so far as the client says.
    pub keep_alive: bool,
}

/// Longer targets have no known use, and are longer than many servers can hold.
const MAX_TARGET: usize = u16::MAX as usize - 1;

/// A head with so many lines is read without further memory.
const USUAL_LINES: usize = 64;

impl<'b> RequestHead<'b> {
    /// Reads a whole head, as [`HeadScan`](super::scan::HeadScan) finds it.
    ///
    /// # Errors
    /// Why the head is refused.
    pub fn parse(head: &'b [u8]) -> Result<Self, Malformed> {
        let end = memchr::memchr(b'\r', head).unwrap_or(head.len());
        let (method, target, version) = request_line(&head[..end])?;
        let fields = parse_fields(head.get(end + 2..).unwrap_or_default())?;
        let body = body_framing(version, &fields)?;
        if fields.all(Known::Host).nth(1).is_some() {
            return Err(Malformed::RepeatedHost);
        }
        let keep_alive = version.keeps_alive(&fields);
        Ok(Self { method, target: Cow::Borrowed(target), version, fields, body, keep_alive })
    }

    /// The target without its query.
    pub fn path(&self) -> &[u8] {
        let end = memchr::memchr(b'?', &self.target).unwrap_or(self.target.len());
        &self.target[..end]
    }

    /// What follows the first `?` of the target.
    pub fn query(&self) -> Option<&[u8]> {
        memchr::memchr(b'?', &self.target).map(|at| &self.target[at + 1..])
    }

    /// Whether a request that was sent twice has the effect of one (RFC 9110, 9.2.2).
    pub fn is_idempotent(&self) -> bool {
        matches!(self.method, "GET" | "HEAD" | "OPTIONS" | "TRACE" | "PUT" | "DELETE")
    }

    /// Writes the head, as HTTP/1.1, up to and including the empty line.
    pub fn write(&self, spelling: Spelling, out: &mut Vec<u8>) {
        out.extend_from_slice(self.method.as_bytes());
        out.push(b' ');
        out.extend_from_slice(&self.target);
        out.extend_from_slice(b" HTTP/1.1\r\n");
        self.fields.write(spelling, out);
        out.extend_from_slice(b"\r\n");
    }
}

fn request_line(line: &[u8]) -> Result<(&str, &[u8], Version), Malformed> {
    let mut parts = line.split(|&b| b == b' ');
    let (Some(method), Some(target), Some(version), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(Malformed::RequestLine);
    };
    let version = match version {
        b"HTTP/1.1" => Version::Http11,
        b"HTTP/1.0" => Version::Http10,
        _ => return Err(Malformed::RequestLine),
    };
    let printable = |&b: &u8| b > b' ' && b != 0x7f;
    if method.is_empty() || !method.iter().all(is_token) || target.is_empty() || !target.iter().all(printable)
    {
        return Err(Malformed::RequestLine);
    }
    if target.contains(&b'#') {
        // Some parsers drop the fragment, and with it a part that another takes for the path.
        return Err(Malformed::Fragment);
    }
    if target.len() > MAX_TARGET {
        return Err(Malformed::TargetTooLong);
    }
    // Tokens are ASCII.
    let method = std::str::from_utf8(method).map_err(|_not_ascii| Malformed::RequestLine)?;
    Ok((method, target, version))
}

/// RFC 9110, 5.6.2.
fn is_token(b: &u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b)
}

/// Reads header lines, or trailer lines, up to and including the empty line.
///
/// # Errors
/// Why the lines are refused.
pub(super) fn parse_fields(block: &[u8]) -> Result<Fields<'_>, Malformed> {
    let mut usual = [httparse::EMPTY_HEADER; USUAL_LINES];
    let parsed = match httparse::parse_headers(block, &mut usual) {
        Err(httparse::Error::TooManyHeaders) => {
            let lines = memchr::memchr_iter(b'\n', block).count();
            return fields_of(block, &mut vec![httparse::EMPTY_HEADER; lines]);
        }
        parsed => parsed,
    };
    collect(parsed, block)
}

fn fields_of<'b>(block: &'b [u8], room: &mut [httparse::Header<'b>]) -> Result<Fields<'b>, Malformed> {
    collect(httparse::parse_headers(block, room), block)
}

type Parsed<'h, 'b> = httparse::Result<(usize, &'h [httparse::Header<'b>])>;

fn collect<'b>(parsed: Parsed<'_, 'b>, block: &'b [u8]) -> Result<Fields<'b>, Malformed> {
    match parsed {
        Ok(httparse::Status::Complete((len, headers))) if len == block.len() => {
            let mut fields = Fields::default();
            for header in headers {
                fields.push(header.name.as_bytes(), header.value);
            }
            Ok(fields)
        }
        Ok(_) | Err(_) => Err(what_is_wrong(block)),
    }
}

/// Why httparse refuses header lines.
fn what_is_wrong(block: &[u8]) -> Malformed {
    for line in block.split(|&byte| byte == b'\n') {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if matches!(line.first(), Some(b' ' | b'\t')) {
            return Malformed::Folded;
        }
        let name = line.split(|&byte| byte == b':').next().unwrap_or_default();
        if name.len() < line.len() && matches!(name.last(), Some(b' ' | b'\t')) {
            return Malformed::SpaceBeforeColon;
        }
        let value = line.get(name.len() + 1..);
        let allowed = |&b: &u8| b >= b' ' && b != 0x7f || b == b'\t';
        let sound =
            !name.is_empty() && name.iter().all(is_token) && value.is_some_and(|v| v.iter().all(allowed));
        if !line.is_empty() && !sound {
            return Malformed::HeaderLine;
        }
    }
    Malformed::HeaderLine
}

fn body_framing(version: Version, fields: &Fields<'_>) -> Result<BodyFraming, Malformed> {
    let mut lengths = fields.all(Known::ContentLength);
    let length = lengths.next().map(|value| decimal(value).ok_or(Malformed::ContentLength)).transpose()?;
    if lengths.next().is_some() {
        return Err(Malformed::ContentLength);
    }
    let mut encodings = fields.all(Known::TransferEncoding);
    let Some(encoding) = encodings.next() else {
        return Ok(match length {
            None | Some(0) => BodyFraming::None,
            Some(length) => BodyFraming::Length(length),
        });
    };
    if encodings.next().is_some() || version < Version::Http11 || !encoding.eq_ignore_ascii_case(b"chunked") {
        return Err(Malformed::TransferEncoding);
    }
    if length.is_some() { Err(Malformed::LengthAndEncoding) } else { Ok(BodyFraming::Chunked) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(headers: &str) -> Result<BodyFraming, Malformed> {
        let head = format!("GET / HTTP/1.1\r\nHost: t\r\n{headers}\r\n");
        RequestHead::parse(head.as_bytes()).map(|head| head.body)
    }

    #[test]
    fn body_framing() {
        assert_eq!(with(""), Ok(BodyFraming::None));
        assert_eq!(with("Content-Length: 0\r\n"), Ok(BodyFraming::None));
        assert_eq!(with("content-length:\t7 \r\n"), Ok(BodyFraming::Length(7)));
        assert_eq!(with("Content-Length: 007\r\n"), Ok(BodyFraming::Length(7)));
        assert_eq!(with("Transfer-Encoding: Chunked\r\n"), Ok(BodyFraming::Chunked));
    }

    #[test]
    fn the_parts_of_a_head_are_found_and_written() {
        let head = b"GET /a?b=1?2 HTTP/1.1\r\nHost:t\r\nX-\xc3\xa9: 1\r\n\r\n";
        assert_eq!(RequestHead::parse(head), Err(Malformed::HeaderLine));
        let head = b"GET /\xe9?b=1?2 HTTP/1.0\r\nHost:t\r\nX-A:  \xe9\t\r\nConnection: Keep-Alive\r\n\r\n";
        let head = RequestHead::parse(head).unwrap();
        assert_eq!((head.path(), head.query()), (&b"/\xe9"[..], Some(&b"b=1?2"[..])));
        assert_eq!((head.version, head.keep_alive, head.is_idempotent()), (Version::Http10, true, true));
        let mut out = Vec::new();
        head.write(Spelling::LowerCase, &mut out);
        let expected = b"GET /\xe9?b=1?2 HTTP/1.1\r\nhost: t\r\nx-a: \xe9\r\nconnection: Keep-Alive\r\n\r\n";
        assert_eq!(out, expected);
    }

    #[test]
    fn many_lines_are_read_whole() {
        let lines = "A: b\r\n".repeat(1000);
        let head = format!("GET / HTTP/1.1\r\nHost: t\r\n{lines}\r\n");
        assert_eq!(RequestHead::parse(head.as_bytes()).unwrap().fields.named("a").count(), 1000);
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
            assert_eq!(RequestHead::parse(head.as_bytes()).err(), Some(why), "{head:?}");
        }
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(MAX_TARGET));
        assert_eq!(RequestHead::parse(long.as_bytes()).err(), Some(Malformed::TargetTooLong));
    }
}
