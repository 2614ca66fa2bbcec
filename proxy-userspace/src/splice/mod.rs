//! How an upgraded stream is carried once its 101 has been relayed. This module knows bytes and
//! sockets, never HTTP; `http/` hands over a [`Session`] and does not learn which path takes it.

mod pipe;
mod relay;
pub mod sock;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use proxy_common::reason::Reason;
use tokio::net::TcpStream;

use self::sock::SockSplice;
use crate::config::SpliceMode;
use crate::telemetry::Telemetry;
use crate::telemetry::flows::FlowGuard;
use crate::upstream::ports::Lease;

/// Two connected sockets whose bytes belong together, and what was already read from them.
#[derive(Debug)]
pub struct Session {
    pub downstream: TcpStream,
    pub upstream: TcpStream,
    /// The source port of `upstream`, held while anything of the stream is left; `None`: the kernel chose it.
    pub source: Option<Lease>,
    /// Read from `downstream`, not yet written to `upstream`.
    pub to_upstream: Bytes,
    /// Read from `upstream` (behind the 101), not yet written to `downstream`.
    pub to_downstream: Bytes,
    pub mode: SpliceMode,
    /// Ends the stream when nothing has moved in either direction for this long.
    pub idle_timeout: Option<Duration>,
    /// Registers the stream in `/flows`; dropping it is the end of the stream.
    pub flow: FlowGuard,
}

/// Carries sessions: decides on the path, and falls back to the relay with a counted reason.
#[derive(Debug)]
pub struct Splicer {
    telemetry: Arc<Telemetry>,
    pipes: pipe::Pipes,
    /// Or why it is not there.
    sock: Result<Arc<SockSplice>, Reason>,
}

impl Splicer {
    /// Prepares what `mode` may need. A splice that cannot be had is no error, since the relay
    /// carries everything; it is logged here, and counted for each stream. Must be called inside a
    /// tokio runtime, and may block for some milliseconds.
    pub fn start(telemetry: Arc<Telemetry>, mode: SpliceMode) -> Self {
        let sock = match mode {
            SpliceMode::Auto | SpliceMode::Packet | SpliceMode::Relay => Err(Reason::SpliceOff),
            SpliceMode::Sockmap => SockSplice::start(Arc::clone(&telemetry)).map_err(|error| {
                let reason = error.reason();
                let error: &dyn std::error::Error = &error;
                tracing::warn!(error, reason = reason.as_str(), "no socket splice, streams are relayed");
                reason
            }),
        };
        Self { telemetry, pipes: pipe::Pipes::new(pipe::MAX_PIPES), sock }
    }

    /// Carries a session to its end. Dropping the future ends the stream at once: both sockets are
    /// closed, and the flow counts as reset.
    pub async fn carry(&self, session: Session) {
        let session = match session.mode {
            SpliceMode::Auto | SpliceMode::Packet | SpliceMode::Relay => session,
            SpliceMode::Sockmap => match self.spliced(session).await {
                Ok(()) => return,
                Err(refused) => {
                    let reason = refused.reason.as_str();
                    self.telemetry.metrics.splice_fallbacks.with_label_values(&[reason]).inc();
                    refused.session
                }
            },
        };
        session.flow.set_path(Path::Relay);
        relay::run(session, &self.pipes).await;
    }

    async fn spliced(&self, session: Session) -> Result<(), Box<sock::Refused>> {
        match &self.sock {
            Ok(sock) => sock.carry(session).await,
            Err(reason) => Err(Box::new(sock::Refused { session, reason: *reason })),
        }
    }
}

/// What carries a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Path {
    Relay,
    Sockmap,
}

impl Path {
    pub const ALL: [Self; 2] = [Self::Relay, Self::Sockmap];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Relay => "relay",
            Self::Sockmap => "sockmap",
        }
    }
}

/// How a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum End {
    /// Both directions were finished by FIN.
    Finished,
    /// One side reset, or vanished; the other was reset too.
    Reset,
    IdleTimeout,
}

impl End {
    pub const ALL: [Self; 3] = [Self::Finished, Self::Reset, Self::IdleTimeout];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Reset => "reset",
            Self::IdleTimeout => "idle_timeout",
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;
    use crate::telemetry::flows::FlowInfo;

    async fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        (near.unwrap(), far.unwrap().0)
    }

    #[tokio::test]
    async fn a_stream_that_is_refused_is_relayed_and_counted() {
        let telemetry = Telemetry::new();
        let splicer = Splicer::start(Arc::clone(&telemetry), SpliceMode::Relay);
        let ((mut client, downstream), (mut backend, upstream)) = (connected().await, connected().await);
        let flow = telemetry.flows.open(FlowInfo {
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
            mode: SpliceMode::Sockmap,
            idle_timeout: None,
            flow,
        };
        let carried = tokio::spawn(async move { splicer.carry(session).await });
        client.write_all(b"late").await.unwrap();
        client.shutdown().await.unwrap();
        let mut got = Vec::new();
        backend.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"early, late");
        drop((client, backend));
        carried.await.unwrap();
        let refused = telemetry.metrics.splice_fallbacks.with_label_values(&["splice_off"]).get();
        assert_eq!(refused, 1);
    }
}
