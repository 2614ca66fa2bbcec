//! Why a request's bytes are refused.

use strum::{IntoStaticStr, VariantArray};
use thiserror::Error;

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
