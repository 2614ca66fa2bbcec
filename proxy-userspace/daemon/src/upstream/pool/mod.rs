//! Connections to endpoints that are kept for the next request.
//!
//! A connection has no task of its own: the request that uses it polls it, and while it is idle nobody
//! does. So a request and its answer cost no wake-up and no lock that anybody else holds; what an idle
//! connection has to say (that it was closed) is read when it is taken, before the request is written.

mod body;
mod connection;
mod idle;

use std::net::SocketAddr;
use std::sync::Arc;

use http::{Request, Response};
use hyper::body::{Body as _, Incoming};
use thiserror::Error;

use self::connection::{Outgoing, PooledConn};
use self::idle::Idle;
use super::Cluster;
use super::connect::{ConnectError, Connector};

pub use self::body::Body;

/// The idle connections of one worker, to the endpoints of all clusters.
#[derive(Debug, Default)]
pub struct Pool {
    idle: Arc<Idle>,
}

/// Which connections are as good as each other: those of a cluster to an endpoint. By name, since the cluster may be of
/// another generation by the time the connection is idle.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    cluster: Arc<str>,
    endpoint: SocketAddr,
}

/// Why there is no response.
#[derive(Debug, Error)]
pub enum SendError {
    #[error("there is no connection")]
    Connect(#[source] ConnectError),
    #[error("the connection failed")]
    Exchange(#[source] hyper::Error),
}

impl Pool {
    /// Sends a request with an origin-form target on an idle connection to `endpoint`, or on a new
    /// one. It is sent again only if an idle connection had closed before any of it was written.
    ///
    /// # Errors
    /// The endpoint could not be reached, or broke off before its response head, or the request's body
    /// ended with an error.
    pub async fn send(
        &self,
        cluster: &Cluster,
        endpoint: SocketAddr,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, SendError> {
        let key = Key { cluster: Arc::clone(&cluster.name), endpoint };
        let idle = &self.idle;
        // Held by the body until it is written.
        let sending = (!request.body().is_end_stream()).then(|| Arc::new(()));
        let mut request = request.map(|body| Outgoing::new(body, sending.clone()));
        loop {
            let (mut connection, reused) = match idle.take(&key) {
                Some(connection) => (connection, true),
                // Boxed, so that requests that need none do not keep room for it.
                None => (Box::pin(open(&cluster.connector, endpoint)).await?, false),
            };
            match connection.exchange(request).await {
                Ok(response) => {
                    let still_sending = sending.is_some_and(|sending| Arc::strong_count(&sending) > 1);
                    return Ok(response.map(|incoming| {
                        if still_sending {
                            // A reader of the response that stops must not stop the request.
                            tokio::spawn(Arc::clone(idle).keep_when_ready(key, connection));
                            return Body::from(incoming);
                        }
                        Body::new(incoming, key, connection, Arc::clone(idle))
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
async fn open(connector: &Connector, endpoint: SocketAddr) -> Result<Box<PooledConn>, SendError> {
    let socket = connector.connect(endpoint).await.map_err(SendError::Connect)?;
    Ok(Box::new(PooledConn::new(socket).await.map_err(SendError::Exchange)?))
}
