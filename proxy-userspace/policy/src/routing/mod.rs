//! From a request head to a cluster and a hash: forwarded headers, virtual hosts, routes, hash
//! policies. Pure: the server and `steer route` call the same [`route`].

mod forwarded;
mod hop_by_hop;
mod response;
mod target;
mod upgrade;
mod virtual_host;

use std::net::{IpAddr, SocketAddr};

use http::{HeaderValue, StatusCode};
use strum::{IntoStaticStr, VariantArray};
use thiserror::Error;

pub use hop_by_hop::strip_trailers;
pub use response::forward_response;

use crate::affinity::hash_policy::{self, Outcome};
use crate::config::{Listener, Route};
use crate::http1::Version;
use crate::http1::request::RequestHead;
use upgrade::Upgrade;

/// The downstream connection that a request came on.
#[derive(Debug, Clone, Copy)]
pub struct Connection {
    pub remote: SocketAddr,
    /// The address that the client connected to.
    pub local: SocketAddr,
    /// The address that x-forwarded-for gets for a client on loopback: this host's first address
    /// that is not loopback, as in Envoy.
    pub node: IpAddr,
    /// The index of an interface of this host, by its name: x-forwarded-for may have it as the
    /// scope of an address.
    pub interface_index: fn(&str) -> Option<u32>,
}

/// Where a request goes.
#[derive(Debug)]
pub struct Routed<'c> {
    pub route: &'c Route,
    /// `None`: no policy yielded a hash, the endpoint is chosen at random.
    pub hash: Option<u64>,
    /// Cookies to add to the endpoint's response.
    pub set_cookies: Vec<HeaderValue>,
    /// The request asks for `Upgrade: websocket` and may have it.
    pub upgrade: bool,
}

/// Why a request goes nowhere. `into_str` gives the label of `steer_faults_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum Refusal {
    /// RFC 9112, 3.2: exactly one is needed.
    #[error("the request does not have exactly one Host header")]
    MissingHost,
    /// RFC 9112, 3.2.
    #[error("the Host header is not a host and an optional port")]
    BadHost,
    #[error("the request target is not a path")]
    BadTarget,
    /// Otherwise a client could hide where it comes from, or what it asks for.
    #[error("the Connection header names a header that must reach the endpoint")]
    BadConnection,
    #[error(
        "HTTP/1.0 is not accepted here: send HTTP/1.1 (nginx: proxy_http_version 1.1), or set accept_http_10"
    )]
    #[strum(serialize = "http_10")]
    Http10,
    #[error("no virtual host or route matches")]
    NoRoute,
    #[error("the route does not allow this upgrade")]
    UpgradeNotAllowed,
}

impl Refusal {
    pub fn status(self) -> StatusCode {
        match self {
            Self::MissingHost | Self::BadHost | Self::BadTarget | Self::BadConnection => {
                StatusCode::BAD_REQUEST
            }
            Self::Http10 => StatusCode::UPGRADE_REQUIRED,
            Self::NoRoute => StatusCode::NOT_FOUND,
            Self::UpgradeNotAllowed => StatusCode::FORBIDDEN,
        }
    }
}

/// Decides where a request goes, and turns its head into the one the endpoint receives (origin-form
/// target, `host`, forwarded headers, no hop-by-hop headers; an upgrade keeps `connection` and
/// `upgrade`). After a refusal the head is of no further use.
///
/// The order is Envoy's: hash policies see the head as the endpoint will.
pub fn route<'c: 'b, 'b>(
    listener: &'c Listener,
    connection: &Connection,
    head: &mut RequestHead<'b>,
) -> Result<Routed<'c>, Refusal> {
    let options = &listener.options;
    if head.version < Version::Http11 && !options.accept_http_10 {
        return Err(Refusal::Http10);
    }
    target::normalise(head)?;
    let upgrade = upgrade::requested(&mut head.fields);
    hop_by_hop::strip_request(&mut head.fields, upgrade == Upgrade::WebSocket, options.use_remote_address)?;
    let client = forwarded::apply(options, connection, &mut head.fields);

    let route = virtual_host::find_route(&listener.virtual_hosts, head);
    // Envoy asks this first: a refused upgrade is 403 even where no route matches.
    let websocket = route.and_then(|route| route.upgrade_websocket).unwrap_or(options.upgrade_websocket);
    if upgrade == Upgrade::WebSocket && !websocket {
        return Err(Refusal::UpgradeNotAllowed);
    }
    let route = route.ok_or(Refusal::NoRoute)?;

    let Outcome { hash, set_cookies } = hash_policy::evaluate(
        &route.hash_policy,
        &hash_policy::Request {
            head,
            scheme: forwarded::scheme(&head.fields),
            client,
            remote: connection.remote,
            local: connection.local,
        },
    );
    Ok(Routed { route, hash, set_cookies, upgrade: upgrade == Upgrade::WebSocket })
}

#[cfg(test)]
mod tests;
