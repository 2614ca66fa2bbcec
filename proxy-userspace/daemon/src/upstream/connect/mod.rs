//! Opening a TCP connection to an endpoint.

use std::future::{Future, poll_fn};
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::IpBindAddressNoPort;
use prometheus::IntCounter;
use rand::seq::SliceRandom as _;
use socket2::SockRef;
use steer_kernel::net::canonical;
use steer_kernel::tcp::tcp_info::TcpInfo;
use steer_kernel::tcp::{repair, socket};
use steer_policy::config;
use thiserror::Error;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::sleep;

use super::mss::{self, ClientTcp};
use crate::streams::ports::{Lease, SourcePorts};
use crate::telemetry::Metrics;

/// Of windows (RFC 7323).
const MAX_SCALE: u8 = 14;

/// Source ports that are tried for one connection, should somebody else on this host use them.
const PORT_TRIES: usize = 8;

/// If the endpoint does not answer within this time (or a quarter of the time limit), somebody else may have the port and
/// get the answers, whom the kernel does not know: a stream of another Steer has no socket.
const LATE_AFTER: Duration = Duration::from_secs(1);
/// So often; the last time from a port that no stream has.
const LATE_TRIES: u32 = 3;

/// Returns the `SO_MARK` with which a socket connects from the first address to the second without
/// TCP timestamps. `None`: that is not possible.
pub type WithoutTimestamps<'a> = dyn Fn(IpAddr, IpAddr) -> Option<u32> + Sync + 'a;

/// A connection that is to become a stream.
#[derive(Debug)]
pub struct Connected {
    pub socket: TcpStream,
    /// Its source port, to be kept for the stream's life; `None`: the kernel chose one.
    pub source: Option<Lease>,
}

/// Connects to the endpoints of one cluster, and counts how that goes.
#[derive(Debug)]
pub struct Connector {
    timeout: Duration,
    /// See [`config::Cluster::source_addresses`].
    sources: Vec<IpAddr>,
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
}

impl Connector {
    pub fn new(cluster: &config::Cluster, metrics: &Metrics) -> Self {
        let name = cluster.name.as_str();
        let counter = |result| metrics.upstream_connects.with_label_values(&[name, result]);
        Self {
            timeout: cluster.connect_timeout,
            sources: cluster.source_addresses.clone(),
            ok: counter("ok"),
            refused: counter("refused"),
            timed_out: counter("timeout"),
            failed: counter("error"),
        }
    }

    /// A new connection, [prepared](socket::prepare). Its peer is [watched](socket::watch_peer).
    pub async fn connect(&self, endpoint: SocketAddr) -> Result<TcpStream, ConnectError> {
        let endpoint = canonical(endpoint);
        let connect = async {
            let socket = self.connect_from_any_port(endpoint).await?;
            socket::watch_peer(&socket)?;
            Ok(socket)
        };
        self.counted(endpoint, connect).await
    }

    /// A new connection for a stream, [prepared](socket::prepare). What carries the stream watches the peer. With `ports` it has one of these, as long as there are
    /// any, and the endpoint is told to send no larger segments than the client
    /// accepts, and windows in units that are no larger than the client's. If the client has no timestamps, the
    /// connection has none either, if possible.
    pub async fn connect_stream(
        &self,
        endpoint: SocketAddr,
        client: Option<ClientTcp>,
        ports: Option<&SourcePorts>,
        without_timestamps: &WithoutTimestamps<'_>,
    ) -> Result<Connected, ConnectError> {
        let endpoint = canonical(endpoint);
        let mut source = None;
        let socket = self.counted(endpoint, async {
            let mut attempts: Vec<Attempt<'_>> = Vec::new();
            let (mut tries, mut late, mut from_any_port) = (0, 0, false);
            loop {
                let may_lease = tries < PORT_TRIES && late < LATE_TRIES;
                if let Some(lease) = may_lease.then(|| self.lease(endpoint, ports?)).flatten() {
                    if let Some(client) = client {
                        self.learn_mss(&lease, endpoint, client).await;
                    }
                    let mark = client
                        .filter(|client| !client.timestamps)
                        .and_then(|_client| without_timestamps(lease.address().ip(), endpoint.ip()));
                    attempts.push(Attempt::from_lease(lease, endpoint, client, mark));
                    tries += 1;
                } else if !from_any_port {
                    attempts.push(Attempt::from_any_port(self, endpoint));
                    from_any_port = true;
                }
                tokio::select! {
                    (lease, connected) = first(&mut attempts) => match (lease, connected?) {
                        (lease, Some(socket)) => {
                            source = lease;
                            // Those that had more time.
                            attempts.into_iter().filter_map(|other| other.lease).for_each(Lease::give_back_foreign);
                            return Ok(socket);
                        }
                        (lease, None) => lease.into_iter().for_each(Lease::give_back_foreign),
                    },
                    () = sleep(self.patience()), if !from_any_port => late += 1,
                }
            }
        });
        let socket = socket.await?;
        Ok(Connected { socket, source })
    }

    /// After this time without an answer another port is tried. What has been tried goes on: the endpoint may only be slow.
    fn patience(&self) -> Duration {
        LATE_AFTER.min(self.timeout / (LATE_TRIES + 1))
    }

    /// A socket that is to tell its peer of a small MSS (TCP_MAXSEG) does not let on whether the peer accepts
    /// more than that itself. That must be known of the endpoint if the client may send more; so it is asked
    /// once, on a connection of no further use.
    async fn learn_mss(&self, lease: &Lease, endpoint: SocketAddr, client: ClientTcp) {
        if client.accepts < client.told
            && lease.endpoint_mss().is_none()
            && let Ok(socket) = self.connect_from_any_port(endpoint).await
            && let Ok(info) = TcpInfo::of(&socket)
        {
            lease.note_endpoint_mss(mss::accepted_by_peer(&info), mss::announced(&info));
        }
    }

    /// A source port towards the endpoint, if there is any.
    fn lease(&self, endpoint: SocketAddr, ports: &SourcePorts) -> Option<Lease> {
        if matches!(endpoint.ip(), IpAddr::V6(ip) if ip.is_unicast_link_local()) {
            // Its source would need a scope, which a lease does not have.
            return None;
        }
        let mut sources: Vec<_> = self.sources(endpoint).collect();
        if sources.is_empty() {
            sources.extend(ports.source_towards(endpoint).ok());
        }
        ports.lease_any(&sources, endpoint).ok()
    }

    /// The configured source addresses for an endpoint.
    fn sources(&self, endpoint: SocketAddr) -> impl Iterator<Item = IpAddr> {
        let family = endpoint.is_ipv4();
        self.sources.iter().copied().filter(move |source| source.is_ipv4() == family)
    }

    /// Connects from a port of the kernel's choice, and from one of the configured source addresses that this
    /// host has.
    async fn connect_from_any_port(&self, endpoint: SocketAddr) -> io::Result<TcpStream> {
        let socket = socket_for(endpoint)?;
        let mut sources: Vec<_> = self.sources(endpoint).collect();
        sources.shuffle(&mut rand::rng());
        if !sources.is_empty() {
            // The port is chosen by connect, which knows that one serves several endpoints.
            setsockopt(&socket, IpBindAddressNoPort, &true)?;
            let mut bound = Ok(());
            for source in sources {
                bound = socket.bind(SocketAddr::new(source, 0));
                if bound.is_ok() {
                    break;
                }
            }
            bound?;
        }
        socket.connect(endpoint).await
    }

    /// Waits for a connection, but not for ever, and counts how that went.
    async fn counted(
        &self,
        endpoint: SocketAddr,
        connect: impl Future<Output = io::Result<TcpStream>>,
    ) -> Result<TcpStream, ConnectError> {
        let Self { timeout, ok, refused, timed_out, failed, .. } = self;
        let opened = async {
            let socket = connect.await?;
            socket::prepare(&socket)?;
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

/// A connection on its way.
struct Attempt<'a> {
    lease: Option<Lease>,
    /// `None`: somebody has the port.
    connecting: Pin<Box<dyn Future<Output = io::Result<Option<TcpStream>>> + Send + 'a>>,
}

impl<'a> Attempt<'a> {
    fn from_lease(lease: Lease, endpoint: SocketAddr, client: Option<ClientTcp>, mark: Option<u32>) -> Self {
        let connecting = Box::pin(connect_from(lease.address(), endpoint, client, mark));
        Self { lease: Some(lease), connecting }
    }

    fn from_any_port(connector: &'a Connector, endpoint: SocketAddr) -> Self {
        let connecting = async move { connector.connect_from_any_port(endpoint).await.map(Some) };
        Self { lease: None, connecting: Box::pin(connecting) }
    }
}

/// The first attempt that has come to an end, which is taken out.
async fn first(attempts: &mut Vec<Attempt<'_>>) -> (Option<Lease>, io::Result<Option<TcpStream>>) {
    poll_fn(|cx| {
        for index in 0..attempts.len() {
            if let Poll::Ready(connected) = attempts[index].connecting.as_mut().poll(cx) {
                return Poll::Ready((attempts.swap_remove(index).lease, connected));
            }
        }
        Poll::Pending
    })
    .await
}

/// Connects from just this address and port, which connections to other endpoints may use, too. During the
/// handshake the socket has the `mark`. `None`: a listener has the port, or a connection to the same endpoint, or
/// the address is not this host's.
async fn connect_from(
    source: SocketAddr,
    endpoint: SocketAddr,
    client: Option<ClientTcp>,
    mark: Option<u32>,
) -> io::Result<Option<TcpStream>> {
    let socket = socket_for(endpoint)?;
    socket::prepare_for_hand_over(&socket);
    socket.set_reuseaddr(true)?;
    // An endpoint cannot be told of more, nor does it need to be: loopback alone has such large segments.
    let mss = client.map(|client| client.accepts).filter(|mss| mss <= config::MSS.end());
    if let Some(mss) = mss {
        SockRef::from(&socket).set_tcp_mss(mss.max(*config::MSS.start()).into())?;
    }
    if let Some(client) = client {
        // Windows of the client are passed on in this connection's units, which must not be larger than its own. The kernel
        // announces the scale that the largest window asks for (tcp_select_initial_window): none larger than the client's
        // own can be.
        let largest = u32::from(u16::MAX) << client.window_scale.min(MAX_SCALE);
        // Refused, the scale is the host's, and the stream may have to be relayed.
        repair::clamp_window(&socket, largest).ok();
    }
    if let Some(mark) = mark {
        // Refused, the connection has timestamps, and the stream is relayed.
        repair::set_mark(&socket, mark).ok();
    }
    let connected = match socket.bind(source) {
        Ok(()) => socket.connect(endpoint).await,
        Err(error) => Err(error),
    };
    match connected {
        Err(error) if is_taken(&error) => Ok(None),
        Ok(socket) => {
            if mark.is_some() {
                // It was for the SYN. Refused, it does no harm: the program looks for nothing else.
                repair::set_mark(&socket, 0).ok();
            }
            Ok(Some(socket))
        }
        Err(error) => Err(error),
    }
}

fn is_taken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}

fn socket_for(endpoint: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if endpoint.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // The request follows at once, and acknowledges the handshake as well. Refused, one more
    // segment is sent.
    SockRef::from(&socket).set_tcp_quickack(false).ok();
    Ok(socket)
}

/// Warns of source addresses that this host does not have. An address may yet come, as addresses do that move between hosts.
pub fn warn_of_absent_sources(cluster: &config::Cluster) {
    for source in &cluster.source_addresses {
        let Err(error) = UdpSocket::bind((*source, 0)) else { continue };
        tracing::warn!(
            cluster = cluster.name,
            %source,
            %error,
            "cannot connect from this source address: give it to the host (ip addr add), or remove it"
        );
    }
}

#[cfg(test)]
mod tests;
