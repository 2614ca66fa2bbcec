//! Carries an upgraded stream after its 101 was relayed. This module knows bytes and sockets, never
//! HTTP. `http/` hands over a [`Session`] and does not learn which path carries it.

mod client_mss;
pub mod coverage;
pub mod packet;
mod pipe;
mod relay;
mod side;
pub mod sock;

use std::fs::File;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use proxy_common::reason::Reason;
use steer_kernel::tcp::socket;
use tokio::net::TcpStream;

use steer_policy::config::{Config, SpliceMode};

use self::client_mss::ClientMss;
use self::packet::{PacketSplice, Predecessor};
use self::sock::SockSplice;
use crate::streams::ports::{Lease, SourcePorts};
use crate::streams::{Path, Stream, StreamGuard, Streams};
use crate::telemetry::Metrics;

/// Two connected sockets whose bytes belong together, and the bytes that were already read from
/// them. Until a path carries the session, closing the sockets resets both connections, also at the
/// end of the process: bytes may wait in either socket, and a FIN would claim that all data was
/// delivered. (A silent close sends neither a FIN nor a RST. The relay takes the setting back: what
/// it has written is to arrive also if the process ends.)
#[derive(Debug)]
pub struct Session {
    pub downstream: TcpStream,
    pub upstream: TcpStream,
    /// The source port of `upstream`, leased until nothing of the stream is left. `None`: the
    /// kernel chose the port.
    pub source: Option<Lease>,
    /// Read from `downstream`, not yet written to `upstream`.
    pub to_upstream: Bytes,
    /// Read from `upstream` (after the 101), not yet written to `downstream`.
    pub to_downstream: Bytes,
    /// Ends the stream when nothing has moved in either direction for this long.
    pub idle_timeout: Option<Duration>,
    /// Lists the stream in `/flows`. Dropping the guard ends the stream.
    pub guard: StreamGuard,
}

/// A session that a path gave back whole, for the relay.
#[derive(Debug)]
pub struct Refused {
    pub session: Session,
    pub reason: Reason,
}

/// Carries sessions: chooses the path, or falls back to the relay and counts the reason.
#[derive(Debug)]
pub struct Splicer {
    metrics: Arc<Metrics>,
    streams: Arc<Streams>,
    mode: SpliceMode,
    pipes: pipe::Pipes,
    /// The packet splice, or why there is none. A takeover by another process removes the packet
    /// splice.
    packet: ArcSwap<Result<Arc<PacketSplice>, Reason>>,
    sock: Result<Arc<SockSplice>, Reason>,
    client_mss: ClientMss,
}

impl Splicer {
    /// Prepares what the configured mode may need. Without a splice the relay carries all streams:
    /// the cause is logged here, and the reason is counted for each stream. Must be called inside a
    /// tokio runtime, and may block for some milliseconds.
    ///
    /// # Errors
    /// The packet splice cannot start, and either the mode is [`SpliceMode::Packet`] or the
    /// predecessor is still running. Or the instance cannot be taken.
    pub fn start(
        metrics: Arc<Metrics>,
        streams: Arc<Streams>,
        config: &Config,
        predecessor: Predecessor,
    ) -> Result<Self, packet::StartError> {
        let mut splicer = Self {
            metrics: Arc::clone(&metrics),
            streams: Arc::clone(&streams),
            mode: config.splice,
            pipes: pipe::Pipes::new(pipe::MAX_PIPES),
            packet: ArcSwap::from_pointee(Err(Reason::SpliceOff)),
            sock: Err(Reason::SpliceOff),
            client_mss: ClientMss::default(),
        };
        let insists = config.splice == SpliceMode::Packet || matches!(predecessor, Predecessor::Draining(_));
        match config.splice {
            SpliceMode::Relay => {}
            SpliceMode::Packet | SpliceMode::Auto => {
                match PacketSplice::start(metrics, streams, config, predecessor) {
                    Ok(packet) => splicer.packet = ArcSwap::from_pointee(Ok(packet)),
                    Err(error) if insists || error.is_fatal() => return Err(error),
                    Err(error) => {
                        let reason = error.reason();
                        let error: &dyn std::error::Error = &error;
                        tracing::warn!(
                            error,
                            reason = reason.as_str(),
                            "no packet splice, streams are relayed"
                        );
                        splicer.packet = ArcSwap::from_pointee(Err(reason));
                    }
                }
            }
            SpliceMode::Sockmap => {
                splicer.sock = SockSplice::start(metrics).map_err(|error| {
                    let reason = error.reason();
                    let error: &dyn std::error::Error = &error;
                    tracing::warn!(error, reason = reason.as_str(), "no socket splice, streams are relayed");
                    reason
                });
            }
        }
        Ok(splicer)
    }

    /// Whether streams need leased source ports, because the packet splice may carry them.
    pub fn needs_source_ports(&self) -> bool {
        self.packet.load().is_ok()
    }

    /// The `SO_MARK` with which a socket connects from `source` to `endpoint` without TCP timestamps:
    /// see [`PacketSplice::mark_without_timestamps`].
    pub fn mark_without_timestamps(&self, source: IpAddr, endpoint: IpAddr) -> Option<u32> {
        self.packet.load().as_ref().as_ref().ok()?.mark_without_timestamps(source, endpoint)
    }

    /// Lets a listener announce at most `mss` to the clients that connect from now on. `None`: no
    /// limit. With `learns`, the listener announces less as soon as an endpoint accepts less.
    pub fn limit_mss(
        &self,
        socket: &Arc<TcpListener>,
        address: SocketAddr,
        mss: Option<u16>,
        learns: bool,
    ) -> io::Result<()> {
        if learns {
            self.client_mss.add(Arc::downgrade(socket), address, mss);
        }
        mss.map_or(Ok(()), |mss| client_mss::limit(socket, mss))
    }

    /// Carries a session until its stream has ended or needs userspace no more. Dropping the future
    /// ends the stream at once: both sockets are closed, and the stream counts as reset.
    pub async fn carry(&self, session: Session) {
        let stream = Arc::clone(session.guard.stream());
        let carried = match self.mode {
            SpliceMode::Relay => {
                watch_endpoint(&session);
                return self.relay(session).await;
            }
            SpliceMode::Auto | SpliceMode::Packet => match self.packet() {
                // Boxed, so that the task of a relayed stream does not keep room for this future.
                Ok(packet) => {
                    Box::pin(until_asked(&stream, async move { packet.carry(session).await })).await
                }
                Err(reason) => Err(Box::new(Refused { session, reason })),
            },
            SpliceMode::Sockmap => match &self.sock {
                Ok(sock) => {
                    watch_endpoint(&session);
                    until_asked(&stream, sock.carry(session)).await
                }
                Err(reason) => Err(Box::new(Refused { session, reason: *reason })),
            },
        };
        drop(stream);
        if let Err(refused) = carried {
            let Refused { session, reason } = *refused;
            let fallbacks = self.metrics.splice_fallbacks.with_label_values(&[reason.as_str()]);
            fallbacks.inc();
            // For `conntrack`, the packet splice has logged the rule that is in the way.
            if self.mode != SpliceMode::Sockmap
                && reason != Reason::Conntrack
                && let (1, Some(fix)) = (fallbacks.get(), fix(reason))
            {
                let (stream, reason) = (session.guard.stream().id, reason.as_str());
                tracing::warn!(
                    stream,
                    reason,
                    fix,
                    "a stream is relayed; said for the first one with this reason"
                );
            }
            session.guard.set_reason(reason);
            if matches!(reason, Reason::Mss | Reason::TimestampsDiffer) {
                self.client_mss.learn(&session);
            }
            // A stream at its end is not worth the system calls.
            if reason != Reason::NotEstablished {
                watch_endpoint(&session);
            }
            self.relay(session).await;
        }
    }

    fn packet(&self) -> Result<Arc<PacketSplice>, Reason> {
        Result::clone(&self.packet.load())
    }

    async fn relay(&self, session: Session) {
        session.guard.set_path(Path::Relay);
        relay::run(session, &self.pipes).await;
    }

    /// Adopts the streams that an earlier process has left to the kernel, with their source ports.
    /// If the earlier process `goes_on`, its streams in a hand-over are adopted, too.
    pub fn adopt(&self, ports: Option<&SourcePorts>, config: &Config, goes_on: bool) {
        if let Ok(packet) = self.packet() {
            packet.adopt(ports, config, goes_on);
        }
    }

    /// Whether another process can take over while this process goes on. No process can if the
    /// packet splice ends its streams with this process.
    pub fn can_give_away(&self) -> bool {
        self.packet().map_or(true, |packet| packet.outlives())
    }

    /// Gives the streams that the kernel carries to another process, while this process goes on
    /// with all other streams. Returns the lock of the instance, if there is one: the other process
    /// needs the lock. From now on upgraded streams are relayed.
    pub async fn give_away(&self) -> Option<File> {
        let packet = self.packet().ok()?;
        self.packet.store(Arc::new(Err(Reason::TakenOver)));
        packet.give_away().await
    }

    /// Takes the streams back from a process that ended before it went on with them.
    pub fn take_back(&self, lock: File, ports: Option<&SourcePorts>, config: &Config) {
        let (metrics, streams) = (Arc::clone(&self.metrics), Arc::clone(&self.streams));
        match PacketSplice::start(metrics, streams, config, Predecessor::Draining(lock)) {
            Ok(packet) => {
                packet.adopt(ports, config, true);
                self.packet.store(Arc::new(Ok(packet)));
            }
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::error!(
                    error,
                    "the streams that the kernel carries go on, but nobody looks after them until the next start"
                );
            }
        }
    }

    /// Called at the end of the process: leaves the streams that the kernel carries to the next
    /// process, or ends them.
    pub async fn stop(&self) {
        if let Ok(packet) = self.packet() {
            packet.stop().await;
        }
    }
}

/// Lets the kernel notice that the endpoint has vanished. (A client's connection has the setting from
/// its listener. The packet splice watches the peers itself.)
fn watch_endpoint(session: &Session) {
    // A socket that refuses is closed already.
    socket::watch_peer(&session.upstream).ok();
}

/// Waits for `carried`. When [`Stream::end`] is called before, drops `carried`, which resets both
/// connections.
async fn until_asked(
    stream: &Stream,
    carried: impl Future<Output = Result<(), Box<Refused>>>,
) -> Result<(), Box<Refused>> {
    tokio::select! {
        biased;
        carried = carried => carried,
        _ = stream.end_asked() => Ok(()),
    }
}

/// What an operator can do about a reason of the packet splice that concerns more than one stream.
const fn fix(reason: Reason) -> Option<&'static str> {
    Some(match reason {
        Reason::TimestampsDiffer => {
            "nothing, if these are the first streams to an endpoint without TCP timestamps; else let \
             packet_splice.agree_at_handshake be true"
        }
        Reason::Mss => {
            "nothing for first streams: later clients are told to send smaller segments, unless packet_splice.mss is set"
        }
        Reason::FamiliesDiffer => "give the cluster endpoints of the clients' address family",
        Reason::Conntrack => {
            "the log names the rule that is in the way; exempt both connections from tracking (notrack in the raw table)"
        }
        Reason::LocalHop => {
            "let clients or endpoints of this host use 127.0.0.1 or ::1, with net.ipv4.tcp_early_demux=1"
        }
        Reason::NoSourcePort => "give the cluster more source_addresses, or widen packet_splice.source_ports",
        Reason::MapFull => "raise packet_splice.max_streams",
        Reason::Window => {
            "give the peers larger receive buffers, or this host a smaller maximum in net.ipv4.tcp_rmem"
        }
        Reason::NotCarried => {
            "see docs/splice.md, `Odd packets`: a network in between changes the packets of this peer"
        }
        Reason::Interface => {
            "only Ethernet and loopback are spliced; to hide this message, set splice: relay"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;
    use crate::streams::StreamInfo;

    async fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        (near.unwrap(), far.unwrap().0)
    }

    #[tokio::test]
    async fn a_stream_that_is_refused_is_relayed_and_counted() {
        let metrics = Metrics::new();
        let streams = Streams::new(&metrics);
        let splicer = Splicer {
            metrics: Arc::clone(&metrics),
            streams: Arc::clone(&streams),
            mode: SpliceMode::Auto,
            pipes: pipe::Pipes::new(1),
            packet: ArcSwap::from_pointee(Err(Reason::NoCapability)),
            sock: Err(Reason::SpliceOff),
            client_mss: ClientMss::default(),
        };
        let ((mut client, downstream), (mut backend, upstream)) = (connected().await, connected().await);
        let guard = streams.open(StreamInfo {
            client: client.local_addr().unwrap(),
            cluster: "sio".into(),
            endpoint: backend.local_addr().unwrap(),
            key_hash: None,
        });
        let session = Session {
            downstream,
            upstream,
            source: None,
            to_upstream: Bytes::from_static(b"early, "),
            to_downstream: Bytes::new(),
            idle_timeout: None,
            guard,
        };
        let carried = tokio::spawn(async move { splicer.carry(session).await });
        client.write_all(b"late").await.unwrap();
        client.shutdown().await.unwrap();
        let mut got = Vec::new();
        backend.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"early, late");
        drop((client, backend));
        carried.await.unwrap();
        let refused = metrics.splice_fallbacks.with_label_values(&["no_capability"]).get();
        assert_eq!(refused, 1);
    }
}
