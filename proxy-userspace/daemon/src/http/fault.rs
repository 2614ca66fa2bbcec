//! Everything that can go wrong with a request, and what the client is told: one table.

use std::time::SystemTime;

use http::{HeaderValue, StatusCode};
use steer_policy::http1::Version;
use steer_policy::http1::fields::{Fields, Spelling};
use steer_policy::http1::malformed::Malformed;
use steer_policy::http1::name::Known;
use steer_policy::http1::response::ResponseHead;
use steer_policy::routing::Refusal;
use strum::IntoStaticStr;
use thiserror::Error;

use super::reply::Asked;
use crate::upstream::connect::ConnectError;

/// Why Steer answers a request itself, or breaks off a response. The text is the answer's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error, IntoStaticStr)]
#[cfg_attr(test, derive(strum::EnumCount))]
#[strum(serialize_all = "snake_case")]
pub enum Fault {
    // The client's doing.
    #[error("bad request: {0}")]
    #[strum(transparent)]
    Malformed(Malformed),
    #[error("{0}")]
    #[strum(transparent)]
    Refused(Refusal),
    #[error("the request head did not arrive in time")]
    HeadTimeout,
    #[error("the request body did not arrive in time")]
    BodyTimeout,
    #[error("stream timeout: nothing moved for too long")]
    StreamIdle,
    /// Not answered: the client has gone.
    #[error("the client broke off")]
    ClientGone,

    // The cluster's.
    #[error("no healthy upstream")]
    NoHealthyEndpoint,
    #[error("the endpoint refused the connection")]
    ConnectRefused,
    #[error("connecting to the endpoint failed")]
    ConnectFailed,
    #[error("connecting to the endpoint took too long")]
    ConnectTimeout,
    #[error("upstream request timeout")]
    ResponseTimeout,
    #[error("the endpoint closed the connection before its response head")]
    EndpointClosed,
    #[error("the endpoint did not answer in HTTP/1")]
    EndpointProtocol,
    #[error("the endpoint switched protocols without being asked")]
    UnaskedSwitch,
    /// Not answered: the response had begun.
    #[error("the endpoint broke off its response")]
    ResponseBroken,
}

impl Fault {
    /// What the client gets.
    pub fn status(self) -> StatusCode {
        match self {
            Self::Malformed(Malformed::TooLong | Malformed::TooManyHeaders) => {
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE
            }
            Self::Malformed(Malformed::TargetTooLong) => StatusCode::URI_TOO_LONG,
            Self::Malformed(_) | Self::ClientGone => StatusCode::BAD_REQUEST,
            Self::Refused(refusal) => refusal.status(),
            Self::HeadTimeout | Self::BodyTimeout | Self::StreamIdle => StatusCode::REQUEST_TIMEOUT,
            Self::NoHealthyEndpoint => StatusCode::SERVICE_UNAVAILABLE,
            Self::ConnectRefused
            | Self::ConnectFailed
            | Self::EndpointClosed
            | Self::EndpointProtocol
            | Self::UnaskedSwitch
            | Self::ResponseBroken => StatusCode::BAD_GATEWAY,
            Self::ConnectTimeout | Self::ResponseTimeout => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// Label of `steer_faults_total`.
    pub fn kind(self) -> &'static str {
        self.into()
    }

    /// Whether the connection cannot be used for another request.
    pub(super) fn closes(self) -> bool {
        match self {
            Self::Refused(refusal) => refusal != Refusal::NoRoute,
            Self::Malformed(_)
            | Self::HeadTimeout
            | Self::BodyTimeout
            | Self::StreamIdle
            | Self::ClientGone
            | Self::ResponseBroken => true,
            Self::NoHealthyEndpoint
            | Self::ConnectRefused
            | Self::ConnectFailed
            | Self::ConnectTimeout
            | Self::ResponseTimeout
            | Self::EndpointClosed
            | Self::EndpointProtocol
            | Self::UnaskedSwitch => false,
        }
    }

    /// Writes the answer. `last`: the connection ends with it.
    pub(super) fn write(self, asked: &Asked, server: &HeaderValue, last: bool, out: &mut Vec<u8>) {
        let status = self.status();
        let body = format!("{self}\n");
        let mut head = ResponseHead {
            status: status.as_u16(),
            reason: status.canonical_reason().unwrap_or_default(),
            version: Version::Http11,
            fields: Fields::default(),
        };
        head.fields.append(Known::Server, server.as_bytes());
        head.fields.append(Known::ContentType, &b"text/plain; charset=utf-8"[..]);
        head.fields.append(Known::ContentLength, body.len().to_string().into_bytes());
        head.fields.append(Known::Date, httpdate::fmt_http_date(SystemTime::now()).into_bytes());
        if last {
            head.fields.append(Known::Connection, &b"close"[..]);
        } else if asked.version == Version::Http10 {
            head.fields.append(Known::Connection, &b"keep-alive"[..]);
        }
        head.write(asked.version, Spelling::LowerCase, out);
        if !asked.is_head() {
            out.extend_from_slice(body.as_bytes());
        }
    }
}

impl From<&ConnectError> for Fault {
    fn from(error: &ConnectError) -> Self {
        match error {
            ConnectError::Refused { .. } => Self::ConnectRefused,
            ConnectError::Timeout { .. } => Self::ConnectTimeout,
            ConnectError::Failed { .. } => Self::ConnectFailed,
        }
    }
}

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<Malformed> for Fault {
    fn from(why: Malformed) -> Self {
        Self::Malformed(why)
    }
}

#[cfg(test)]
mod tests {
    use strum::{EnumCount as _, VariantArray as _};

    use super::*;

    #[test]
    fn the_documentation_lists_every_fault() {
        let others = [
            Fault::HeadTimeout,
            Fault::BodyTimeout,
            Fault::StreamIdle,
            Fault::ClientGone,
            Fault::NoHealthyEndpoint,
            Fault::ConnectRefused,
            Fault::ConnectFailed,
            Fault::ConnectTimeout,
            Fault::ResponseTimeout,
            Fault::EndpointClosed,
            Fault::EndpointProtocol,
            Fault::UnaskedSwitch,
            Fault::ResponseBroken,
        ];
        // The two that carry a cause are not among the others.
        assert_eq!(others.len(), Fault::COUNT - 2, "each fault is here");
        let malformed = Malformed::VARIANTS.iter().copied().map(Fault::Malformed);
        let refusals = Refusal::VARIANTS.iter().copied().map(Fault::Refused);
        let all = malformed.chain(refusals).chain(others);
        let rows: Vec<String> = all
            .map(|fault| {
                let answer = match fault {
                    Fault::ResponseBroken | Fault::ClientGone => "-".to_owned(),
                    fault => fault.status().as_u16().to_string(),
                };
                let end = if fault.closes() { "closed" } else { "kept" };
                format!("| `{}` | {answer} | {end} | {fault} |", fault.kind())
            })
            .collect();
        let documented = include_str!("../../../../docs/faults.md");
        let found: Vec<&str> = documented.lines().filter(|line| line.starts_with("| `")).collect();
        assert_eq!(found, rows, "docs/faults.md should have these rows:\n{}", rows.join("\n"));
    }
}
