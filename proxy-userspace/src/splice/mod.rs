//! How an upgraded stream is carried once its 101 has been relayed. This module knows bytes and
//! sockets, never HTTP; `http/` hands over a [`Session`] and does not learn which path takes it.

mod pipe;
mod relay;
pub mod sock;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::TcpStream;

use crate::config::SpliceMode;
use crate::telemetry::Telemetry;
use crate::telemetry::flows::FlowGuard;

/// Two connected sockets whose bytes belong together, and what was already read from them.
#[derive(Debug)]
pub struct Session {
    pub downstream: TcpStream,
    pub upstream: TcpStream,
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
}

impl Splicer {
    pub fn new(telemetry: Arc<Telemetry>) -> Self {
        Self { telemetry, pipes: pipe::Pipes::new(pipe::MAX_PIPES) }
    }

    /// Carries a session to its end. Dropping the future ends the stream at once: both sockets are
    /// closed, and the flow counts as reset.
    pub async fn carry(&self, session: Session) {
        let (path, refusal) = decide(session.mode);
        if let Some(reason) = refusal {
            self.telemetry.metrics.splice_fallbacks.with_label_values(&[reason.as_str()]).inc();
        }
        session.flow.set_path(path);
        match path {
            Path::Relay => relay::run(session, &self.pipes).await,
            Path::Sockmap => unreachable!("decide() never names it"),
        }
    }
}

/// The path for a stream, and why it is not the one that was asked for.
fn decide(mode: SpliceMode) -> (Path, Option<Reason>) {
    match mode {
        SpliceMode::Auto | SpliceMode::Relay => (Path::Relay, None),
        SpliceMode::Sockmap => (Path::Relay, Some(Reason::SockmapUnavailable)),
    }
}

/// Why a stream is relayed although a better path was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The socket splice is not available in this process.
    SockmapUnavailable,
}

impl Reason {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::SockmapUnavailable => "sockmap_unavailable",
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
    /// The proxy stops.
    Shutdown,
}

impl End {
    pub const ALL: [Self; 4] = [Self::Finished, Self::Reset, Self::IdleTimeout, Self::Shutdown];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Reset => "reset",
            Self::IdleTimeout => "idle_timeout",
            Self::Shutdown => "shutdown",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_unmet_wish_has_a_reason() {
        assert_eq!(decide(SpliceMode::Auto), (Path::Relay, None));
        assert_eq!(decide(SpliceMode::Relay), (Path::Relay, None));
        assert_eq!(decide(SpliceMode::Sockmap), (Path::Relay, Some(Reason::SockmapUnavailable)));
    }
}
