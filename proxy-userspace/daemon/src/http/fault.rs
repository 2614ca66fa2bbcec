//! Everything that can go wrong with a request, and what the client is told: one table.

use std::error::Error as StdError;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, SERVER};
use http::{HeaderValue, Response, StatusCode};
use http_body_util::Full;
use steer_policy::http1::head::Malformed;
use steer_policy::routing::Refusal;
use strum::IntoStaticStr;
use thiserror::Error;

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
    fn closes(self) -> bool {
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

    pub(super) fn response(self, server: HeaderValue) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::new(Bytes::from(format!("{self}\n"))));
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        headers.insert(SERVER, server);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        if self.closes() {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    /// What an error of the pool or of hyper's client stands for.
    pub(super) fn of_upstream(error: &(dyn StdError + 'static)) -> Self {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if let Some(error) = error.downcast_ref::<ConnectError>() {
                return error.into();
            }
            if let Some(error) = error.downcast_ref::<hyper::Error>() {
                return if error.is_parse() {
                    Self::EndpointProtocol
                } else if error.is_user() {
                    // The request's body ended with an error.
                    Self::ClientGone
                } else {
                    Self::EndpointClosed
                };
            }
            cause = error.source();
        }
        Self::EndpointClosed
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
