//! HTTP/1.1 messages as bytes, without I/O and without a clock. In reading order:
//!
//! `scan` finds where a request head ends · `request` and `response` read heads into `fields`, whose
//! `name`s are compared as one byte, and write them · `body` follows the framing of a body and frames
//! it anew · `malformed` is why a request's bytes are refused.

pub mod body;
pub mod fields;
pub mod malformed;
pub mod name;
pub mod request;
pub mod response;
pub mod scan;

/// Whether the message is HTTP/1.1 or HTTP/1.0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    Http10,
    Http11,
}

impl Version {
    /// Whether the connection can be used again after a message with these header lines (RFC 9112,
    /// 9.3).
    fn keeps_alive(self, fields: &fields::Fields<'_>) -> bool {
        match self {
            _ if fields.has_token(name::Known::Connection, b"close") => false,
            Self::Http11 => true,
            Self::Http10 => fields.has_token(name::Known::Connection, b"keep-alive"),
        }
    }
}

/// A field value without the blanks around it (RFC 9112, 5.1).
pub fn trim_blanks(mut bytes: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = bytes {
        bytes = rest;
    }
    bytes
}

/// The elements of a comma-separated list, without the empty ones (RFC 9110, 5.6.1).
fn tokens(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|&byte| byte == b',').map(trim_blanks).filter(|token| !token.is_empty())
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
