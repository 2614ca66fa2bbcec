//! From a request head to a cluster and a hash: forwarded headers, virtual hosts, routes, hash
//! policies. Pure: the server and `steer route` call the same [`route`].

use std::net::{IpAddr, SocketAddr};

use http::{HeaderValue, StatusCode, request};
use thiserror::Error;

use crate::config::{ClusterIndex, Listener, Route};

/// The downstream connection that a request came on.
#[derive(Debug, Clone, Copy)]
pub struct Connection {
    pub remote: SocketAddr,
    /// The address that the client connected to.
    pub local: SocketAddr,
    /// What stands in x-forwarded-for for a client on loopback: this host's first address that is
    /// not loopback, as Envoy does.
    pub node: IpAddr,
}

/// Where a request goes.
#[derive(Debug)]
pub struct Routed<'c> {
    pub route: &'c Route,
    pub cluster: ClusterIndex,
    /// `None`: no policy yielded a hash, the endpoint is chosen at random.
    pub hash: Option<u64>,
    /// To be added to the response that the endpoint gives.
    pub set_cookies: Vec<HeaderValue>,
    /// The request asks for `Upgrade: websocket` and may have it.
    pub upgrade: bool,
}

/// Why a request goes nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
pub enum Refusal {
    #[error("the request has no Host header")]
    MissingHost,
    #[error("the request target is not a path")]
    BadTarget,
    #[error("HTTP/1.0 is not accepted here")]
    Http10,
    #[error("no virtual host or route matches")]
    NoRoute,
    #[error("the route does not allow this upgrade")]
    UpgradeNotAllowed,
}

impl Refusal {
    pub fn status(self) -> StatusCode {
        match self {
            Self::MissingHost | Self::BadTarget => StatusCode::BAD_REQUEST,
            Self::Http10 => StatusCode::UPGRADE_REQUIRED,
            Self::NoRoute => StatusCode::NOT_FOUND,
            Self::UpgradeNotAllowed => StatusCode::FORBIDDEN,
        }
    }
}

/// Decides where a request goes, and turns its head into the one the endpoint receives (origin-form
/// target, `host`, forwarded headers, no hop-by-hop headers; an upgrade keeps `connection` and
/// `upgrade`).
pub fn route<'c>(
    listener: &'c Listener,
    connection: &Connection,
    head: &mut request::Parts,
) -> Result<Routed<'c>, Refusal> {
    let _ = (listener, connection, head);
    todo!("routing::route")
}
