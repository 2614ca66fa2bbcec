//! An endpoint's response head. It is read as robustly as its one meaning allows; what could have two
//! is an error.

use std::mem::MaybeUninit;

use httparse::{ParserConfig, Status};

use super::fields::{Fields, Spelling};
use super::name::Known;
use super::request::BodyFraming;
use super::{Version, decimal};

/// Header lines of a response that are read.
const MAX_LINES: usize = 128;

/// A response head as parts of the bytes it came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResponseHead<'b> {
    /// 100 to 999.
    pub status: u16,
    pub reason: &'b str,
    pub version: Version,
    pub fields: Fields<'b>,
}

/// The bytes are not an HTTP/1 response with one meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotHttp;

impl<'b> ResponseHead<'b> {
    /// Reads the head at the front of `bytes`, and returns its length. `None`: the head is not
    /// complete.
    ///
    /// # Errors
    /// No further byte makes this a response.
    pub fn parse(bytes: &'b [u8]) -> Result<Option<(usize, Self)>, NotHttp> {
        let mut lines = [const { MaybeUninit::uninit() }; MAX_LINES];
        let mut parsed = httparse::Response::new(&mut []);
        let result =
            ParserConfig::default().parse_response_with_uninit_headers(&mut parsed, bytes, &mut lines);
        let Status::Complete(len) = result.map_err(|_error| NotHttp)? else { return Ok(None) };
        let status = parsed.code.filter(|code| (100..=999).contains(code)).ok_or(NotHttp)?;
        let version = if parsed.version == Some(1) { Version::Http11 } else { Version::Http10 };
        let mut fields = Fields::default();
        for line in parsed.headers.iter() {
            fields.push(line.name.as_bytes(), line.value);
        }
        Ok(Some((len, Self { status, reason: parsed.reason.unwrap_or_default(), version, fields })))
    }

    /// How the body is framed that follows the head (RFC 9112, 6.3). `to_head`: the request was a HEAD.
    ///
    /// # Errors
    /// The header lines contradict each other, or name a coding that is not understood here.
    pub fn body(&self, to_head: bool) -> Result<BodyFraming, NotHttp> {
        let mut lengths = self.fields.all(Known::ContentLength).map(decimal);
        let length = lengths.next().map(|length| length.ok_or(NotHttp)).transpose()?;
        if lengths.any(|other| other != length) {
            return Err(NotHttp);
        }
        let mut encodings = self.fields.all(Known::TransferEncoding);
        let chunked = match (encodings.next(), encodings.next()) {
            (None, _) => false,
            (Some(coding), None)
                if self.version == Version::Http11 && coding.eq_ignore_ascii_case(b"chunked") =>
            {
                true
            }
            _ => return Err(NotHttp),
        };
        Ok(match (chunked, length) {
            _ if to_head || matches!(self.status, 100..=199 | 204 | 304) => BodyFraming::None,
            (true, _) => BodyFraming::Chunked,
            (false, Some(0)) => BodyFraming::None,
            (false, Some(length)) => BodyFraming::Length(length),
            (false, None) => BodyFraming::UntilClose,
        })
    }

    /// Whether the connection can be used for another request after the body.
    pub fn keeps_alive(&self) -> bool {
        // A length beside an encoding is an attempt to be read in two ways (RFC 9112, 6.3).
        let doubtful =
            self.fields.contains(Known::ContentLength) && self.fields.contains(Known::TransferEncoding);
        !doubtful && self.version.keeps_alive(&self.fields)
    }

    /// Writes the head, as `version`, up to and including the empty line.
    pub fn write(&self, version: Version, spelling: Spelling, out: &mut Vec<u8>) {
        out.extend_from_slice(match version {
            Version::Http10 => b"HTTP/1.0 ",
            Version::Http11 => b"HTTP/1.1 ",
        });
        let digit = |value: u16| b'0' + (value % 10) as u8;
        out.extend([digit(self.status / 100), digit(self.status / 10), digit(self.status), b' ']);
        out.extend_from_slice(self.reason.as_bytes());
        out.extend_from_slice(b"\r\n");
        self.fields.write(spelling, out);
        out.extend_from_slice(b"\r\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(lines: &str) -> ResponseHead<'_> {
        ResponseHead::parse(lines.as_bytes()).unwrap().unwrap().1
    }

    #[test]
    fn a_head_is_found_and_written() {
        let bytes = b"HTTP/1.1 404 Not here\r\nA:  b\r\n\r\nbody";
        for end in 0..bytes.len() - 4 {
            assert_eq!(ResponseHead::parse(&bytes[..end]), Ok(None), "{end}");
        }
        let (len, head) = ResponseHead::parse(bytes).unwrap().unwrap();
        assert_eq!((len, head.status, head.reason), (bytes.len() - 4, 404, "Not here"));
        let mut out = Vec::new();
        head.write(Version::Http10, Spelling::LowerCase, &mut out);
        assert_eq!(out, b"HTTP/1.0 404 Not here\r\na: b\r\n\r\n");
    }

    #[test]
    fn what_is_not_a_response_is_refused_at_once() {
        for bytes in [
            &b"SSH-2.0-OpenSSH_9.2\r\n"[..],
            b"\x15\x03\x01\x00\x02\x02\x46",
            b"HTTP/2 200\r\n\r\n",
            b"HTTP/1.1 99 x\r\n\r\n",
            b"HTTP/1.1 099 x\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
            b"HTTP/1.1 200 OK\r\na : b\r\n\r\n",
            b"HTTP/1.1 200 OK\r\na: b\r\n folded\r\n\r\n",
        ] {
            assert_eq!(ResponseHead::parse(bytes), Err(NotHttp), "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn a_body_is_framed_in_one_way_or_refused() {
        let body = |lines: &str| head(&format!("HTTP/1.1 200 OK\r\n{lines}\r\n")).body(false);
        assert_eq!(body(""), Ok(BodyFraming::UntilClose));
        assert_eq!(body("content-length: 0\r\n"), Ok(BodyFraming::None));
        assert_eq!(body("content-length: 3\r\n"), Ok(BodyFraming::Length(3)));
        assert_eq!(body("content-length: 3\r\ncontent-length: 3\r\n"), Ok(BodyFraming::Length(3)));
        assert_eq!(body("transfer-encoding: Chunked\r\n"), Ok(BodyFraming::Chunked));
        assert_eq!(body("transfer-encoding: chunked\r\ncontent-length: 3\r\n"), Ok(BodyFraming::Chunked));
        for refused in [
            "content-length: 3, 3\r\n",
            "content-length: 3\r\ncontent-length: 4\r\n",
            "content-length: x\r\n",
            "content-length: -1\r\n",
            "content-length:\r\n",
            "transfer-encoding: gzip, chunked\r\n",
            "transfer-encoding: identity\r\n",
            "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
        ] {
            assert_eq!(body(refused), Err(NotHttp), "{refused}");
        }
        let old = head("HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n");
        assert_eq!(old.body(false), Err(NotHttp));
        assert_eq!(head("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n").body(true), Ok(BodyFraming::None));
        assert_eq!(head("HTTP/1.1 304 No\r\ncontent-length: 3\r\n\r\n").body(false), Ok(BodyFraming::None));
    }

    #[test]
    fn connections_that_are_used_again() {
        assert!(head("HTTP/1.1 200 OK\r\n\r\n").keeps_alive());
        assert!(head("HTTP/1.0 200 OK\r\nconnection: keep-alive\r\n\r\n").keeps_alive());
        for response in [
            "HTTP/1.0 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\nconnection: x, Close\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n",
        ] {
            assert!(!head(response).keeps_alive(), "{response}");
        }
    }
}
