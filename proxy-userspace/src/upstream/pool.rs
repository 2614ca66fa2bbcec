//! Connections to endpoints that are kept for the next request.

use std::net::SocketAddr;
use std::time::Duration;

use http::uri::{Authority, InvalidUri, PathAndQuery, Scheme};
use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::net::TcpStream;

use super::connect::{Connector, MAX_BUFFER};
use super::mss::ClientMss;
use super::ports::SourcePorts;
use crate::config::{ClusterIndex, Config};
use crate::kernel::tcp_info::TcpInfo;
use crate::telemetry::Telemetry;

/// Shorter than the 5 s after which Node's HTTP server (socket.io's) closes an idle connection, so
/// that it is rarely closed just when a request is written to it.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);
/// Idle connections kept for each endpoint.
const MAX_IDLE: usize = 256;

/// One pool for each cluster.
#[derive(Debug)]
pub struct Pool {
    clusters: Vec<Cluster>,
    /// Whether streams are given source ports.
    own_ports: bool,
}

#[derive(Debug)]
struct Cluster {
    connector: Connector,
    client: Client<Connector, Incoming>,
}

impl Pool {
    /// With `ports`, upgraded streams are given source ports of their own.
    pub fn new(config: &Config, telemetry: &Telemetry, ports: Option<&SourcePorts>) -> Self {
        let cluster = |cluster: &crate::config::Cluster| {
            let connector = Connector::new(cluster, telemetry, ports.cloned());
            let client = Client::builder(TokioExecutor::new())
                .set_host(false)
                .pool_timer(TokioTimer::new())
                .pool_idle_timeout(IDLE_TIMEOUT)
                .pool_max_idle_per_host(MAX_IDLE)
                .http1_max_buf_size(MAX_BUFFER)
                .build(connector.clone());
            Cluster { connector, client }
        };
        Self { clusters: config.clusters.iter().map(cluster).collect(), own_ports: ports.is_some() }
    }

    /// For connections outside the pool.
    pub fn connector(&self, cluster: ClusterIndex) -> &Connector {
        &self.clusters[cluster].connector
    }

    /// What [`connect_stream`](Connector::connect_stream) should know of a client, if anything.
    pub fn client_mss(&self, client: &TcpStream) -> Option<ClientMss> {
        if !self.own_ports {
            return None;
        }
        TcpInfo::of(client).ok().map(|info| ClientMss::of(&info))
    }

    /// Sends a request with an origin-form target on an idle connection to `endpoint`, or on a new
    /// one. It is sent again only if an idle connection had closed before any of it was written.
    pub async fn send(
        &self,
        cluster: ClusterIndex,
        endpoint: SocketAddr,
        mut request: Request<Incoming>,
    ) -> Result<Response<Incoming>, Error> {
        let target = request.uri_mut();
        // `host:port` of an IP address always is an authority; should it not be, the connector says
        // what is wrong with the URI.
        if let Ok(uri) = absolute(endpoint, target) {
            *target = uri;
        }
        self.clusters[cluster].client.request(request).await
    }
}

/// The pool's key is the authority; the request still goes out in origin form.
fn absolute(endpoint: SocketAddr, target: &Uri) -> Result<Uri, http::Error> {
    let authority: Result<Authority, InvalidUri> = endpoint.to_string().parse();
    let path = target.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
    Uri::builder().scheme(Scheme::HTTP).authority(authority?).path_and_query(path).build()
}
