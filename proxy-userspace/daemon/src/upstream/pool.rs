//! Connections to endpoints that are kept for the next request.
//!
//! A connection has no task of its own: the request that uses it polls it, and while it is idle nobody
//! does. So a request and its answer cost no wake-up and no lock that anybody else holds; what an idle
//! connection has to say (that it was closed) is read when it is taken, before the request is written.

mod body;
mod idle;
mod kept;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use http::{Request, Response};
use hyper::body::{Body as _, Incoming};
use steer_kernel::tcp::tcp_info::TcpInfo;
use steer_policy::config::Config;
use thiserror::Error;
use tokio::net::TcpStream;

use self::idle::Idle;
use self::kept::{Kept, Outgoing};
use super::connect::{ConnectError, Connector};
use super::mss::ClientTcp;
use super::ports::SourcePorts;
use crate::telemetry::Telemetry;

pub use self::body::Body;

/// One pool for each cluster.
#[derive(Debug)]
pub struct Pool {
    /// By name.
    clusters: HashMap<Arc<str>, Cluster>,
    /// Whether streams are given source ports.
    own_ports: bool,
}

#[derive(Debug)]
struct Cluster {
    connector: Connector,
    idle: Arc<Idle>,
}

/// Why there is no response.
#[derive(Debug, Error)]
pub enum SendError {
    #[error("the pool does not know the cluster")]
    NoCluster,
    #[error("there is no connection")]
    Connect(#[source] ConnectError),
    #[error("the connection failed")]
    Exchange(#[source] hyper::Error),
}

impl Pool {
    /// With `ports`, upgraded streams are given source ports of their own.
    pub fn new(config: &Config, telemetry: &Telemetry, ports: Option<&SourcePorts>) -> Self {
        let cluster = |cluster: &steer_policy::config::Cluster| {
            let connector = Connector::new(cluster, telemetry, ports.cloned());
            (cluster.name.as_str().into(), Cluster { connector, idle: Arc::default() })
        };
        Self { clusters: config.clusters.iter().map(cluster).collect(), own_ports: ports.is_some() }
    }

    /// Another one to the same endpoints, for connections that are polled on another thread.
    pub fn another(&self) -> Self {
        let clusters = self.clusters.iter().map(|(name, Cluster { connector, .. })| {
            (Arc::clone(name), Cluster { connector: connector.clone(), idle: Arc::default() })
        });
        Self { clusters: clusters.collect(), own_ports: self.own_ports }
    }

    /// For connections outside the pool. `None`: there is no such cluster.
    pub fn connector(&self, cluster: &str) -> Option<&Connector> {
        self.clusters.get(cluster).map(|cluster| &cluster.connector)
    }

    /// What [`connect_stream`](Connector::connect_stream) should know of a client, if anything.
    pub fn client_tcp(&self, client: &TcpStream) -> Option<ClientTcp> {
        if !self.own_ports {
            return None;
        }
        TcpInfo::of(client).ok().map(|info| ClientTcp::of(&info))
    }

    /// Sends a request with an origin-form target on an idle connection to `endpoint`, or on a new
    /// one. It is sent again only if an idle connection had closed before any of it was written.
    ///
    /// # Errors
    /// The endpoint could not be reached, or broke off before its response head, or the request's body
    /// ended with an error.
    pub async fn send(
        &self,
        cluster: &str,
        endpoint: SocketAddr,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, SendError> {
        let Some(Cluster { connector, idle }) = self.clusters.get(cluster) else {
            return Err(SendError::NoCluster);
        };
        // Held by the body until it is written.
        let sending = (!request.body().is_end_stream()).then(|| Arc::new(()));
        let mut request = request.map(|body| Outgoing::new(body, sending.clone()));
        loop {
            let (mut kept, reused) = match idle.take(endpoint) {
                Some(kept) => (kept, true),
                // Boxed, so that requests that need none do not keep room for it.
                None => (Box::pin(open(connector, endpoint)).await?, false),
            };
            match kept.exchange(request).await {
                Ok(response) => {
                    let still_sending = sending.is_some_and(|sending| Arc::strong_count(&sending) > 1);
                    return Ok(response.map(|incoming| {
                        if still_sending {
                            // A reader of the response that stops must not stop the request.
                            tokio::spawn(Arc::clone(idle).keep_when_ready(endpoint, kept));
                            return Body::from(incoming);
                        }
                        Body::new(incoming, endpoint, kept, Arc::clone(idle))
                    }));
                }
                Err(mut failed) => match failed.take_message() {
                    Some(unsent) if reused => request = unsent,
                    _ => return Err(SendError::Exchange(failed.into_error())),
                },
            }
        }
    }
}

/// A new connection for the pool.
async fn open(connector: &Connector, endpoint: SocketAddr) -> Result<Box<Kept>, SendError> {
    let socket = connector.connect(endpoint).await.map_err(SendError::Connect)?;
    Ok(Box::new(Kept::new(socket).await.map_err(SendError::Exchange)?))
}
