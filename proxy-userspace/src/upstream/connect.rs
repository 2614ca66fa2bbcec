//! Opening a TCP connection to an endpoint.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use prometheus::IntCounter;
use socket2::{SockRef, TcpKeepalive};
use thiserror::Error;
use tokio::net::TcpStream;

use crate::telemetry::Telemetry;

/// hyper's buffer for a connection to an endpoint; a response head that is longer is an error.
pub const MAX_BUFFER: usize = 64 * 1024;

/// Connects to the endpoints of one cluster, and counts how that goes.
#[derive(Debug, Clone)]
pub struct Connector {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    timeout: Duration,
    ok: IntCounter,
    refused: IntCounter,
    timed_out: IntCounter,
    failed: IntCounter,
}

#[derive(Debug, Error)]
pub enum ConnectError {
    #[error("{endpoint} refused the connection")]
    Refused { endpoint: SocketAddr },
    #[error("no connection to {endpoint} within {timeout:?}")]
    Timeout { endpoint: SocketAddr, timeout: Duration },
    #[error("cannot connect to {endpoint}")]
    Failed {
        endpoint: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("{0} does not name an endpoint")]
    NotAnEndpoint(Uri),
}

impl Connector {
    pub fn new(cluster: &str, timeout: Duration, telemetry: &Telemetry) -> Self {
        let counter = |result| telemetry.metrics.upstream_connects.with_label_values(&[cluster, result]);
        Self {
            inner: Arc::new(Inner {
                timeout,
                ok: counter("ok"),
                refused: counter("refused"),
                timed_out: counter("timeout"),
                failed: counter("error"),
            }),
        }
    }

    /// A new connection, [prepared](prepare).
    pub async fn connect(&self, endpoint: SocketAddr) -> Result<TcpStream, ConnectError> {
        let Inner { timeout, ok, refused, timed_out, failed } = &*self.inner;
        let opened = async {
            let socket = TcpStream::connect(endpoint).await?;
            prepare(&socket)?;
            io::Result::Ok(socket)
        };
        match tokio::time::timeout(*timeout, opened).await {
            Ok(Ok(socket)) => {
                ok.inc();
                Ok(socket)
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                refused.inc();
                Err(ConnectError::Refused { endpoint })
            }
            // The kernel's own time limit, where it is the shorter one.
            Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut => {
                timed_out.inc();
                Err(ConnectError::Timeout { endpoint, timeout: *timeout })
            }
            Ok(Err(source)) => {
                failed.inc();
                Err(ConnectError::Failed { endpoint, source })
            }
            Err(_elapsed) => {
                timed_out.inc();
                Err(ConnectError::Timeout { endpoint, timeout: *timeout })
            }
        }
    }
}

/// What both sides' connections have in common: no delay for small writes, and a peer that has vanished
/// is noticed in two minutes of silence.
pub fn prepare(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(60))
        .with_interval(Duration::from_secs(15))
        .with_retries(4);
    SockRef::from(socket).set_tcp_keepalive(&keepalive)
}

/// What the pool asks when it has no idle connection: the URI's authority is the endpoint.
impl tower_service::Service<Uri> for Connector {
    type Response = TokioIo<TcpStream>;
    type Error = ConnectError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move {
            let endpoint = uri.authority().and_then(|authority| authority.as_str().parse().ok());
            let endpoint = endpoint.ok_or(ConnectError::NotAnEndpoint(uri))?;
            connector.connect(endpoint).await.map(TokioIo::new)
        })
    }
}
