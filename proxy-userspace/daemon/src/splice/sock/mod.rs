//! The socket splice: the kernel moves payload between the two sockets of a session (sk_skb verdict
//! program, sockmap). Userspace sees only the beginning, the end, and readers that lag.
//!
//! The kernel has no back-pressure and no bound here. So each direction has a credit and a gate
//! (`lane`): a session whose sender gets too far ahead of the reader goes back to userspace. Each
//! direction is a `lane::Lane`; `watch` tells the lanes what happens to their sockets.

mod gauge;
mod lane;
mod watch;

use std::io;
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use proxy_common::reason::Reason;
use socket2::SockRef;
use steer_kernel::bpf::loader::{self, LoadError, SockPrograms};
use steer_kernel::bpf::sock::maps::{Entries, SockMaps};
use steer_kernel::bpf::sock::probe::{self, ProbeError};
use steer_kernel::tcp::tcp_info::{self, TcpInfo};
use tokio::task::AbortHandle;
use tokio::time::sleep;

use self::gauge::MapEntries;
use self::lane::{Lane, Socket};
use self::watch::Watch;
use super::side::Side;
use super::{Refused, Session};
use crate::streams::{Carrier, Stream, StreamGuard};
use crate::streams::{End, Path};
use crate::telemetry::Metrics;

/// Why there is no socket splice in this process.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the socket splice cannot be loaded")]
    Load(#[from] LoadError),
    #[error("the socket splice does not work on this kernel; use splice: relay")]
    Probe(#[from] ProbeError),
    #[error("cannot watch sockets")]
    Watch(#[source] io::Error),
}

impl StartError {
    pub fn reason(&self) -> Reason {
        match self {
            Self::Load(error) => error.reason(),
            Self::Probe(_) => Reason::SelfTestFailed,
            Self::Watch(_) => Reason::KernelRefused,
        }
    }
}

/// The process has one. Dropping it takes the programs out of the kernel.
#[derive(Debug)]
pub struct SockSplice {
    maps: Arc<SockMaps>,
    watch: Arc<Watch>,
    metrics: Arc<Metrics>,
    tasks: [AbortHandle; 2],
}

impl SockSplice {
    /// Loads the programs and tries them on loopback. Blocks for some milliseconds, or for seconds
    /// if the kernel misbehaves. Must be called inside a tokio runtime.
    pub fn start(metrics: Arc<Metrics>) -> Result<Arc<Self>, StartError> {
        let SockPrograms { maps, mut events } = loader::load_sock_splice()?;
        probe::sock_splice(&maps)?;
        let maps = Arc::new(maps);
        let watch = Arc::new(Watch::new().map_err(StartError::Watch)?);

        let sockets = tokio::spawn(Arc::clone(&watch).run()).abort_handle();
        let signals = Arc::clone(&watch);
        let ring = tokio::spawn(async move {
            loop {
                if let Err(error) = events.read(|event| signals.on_event(event)).await {
                    tracing::error!(%error, "cannot read the socket splice's events");
                    break;
                }
            }
        })
        .abort_handle();
        let entries = MapEntries::new(Arc::clone(&maps));
        if let Err(error) = entries.and_then(|entries| metrics.register(Box::new(entries))) {
            tracing::warn!(%error, "the entries of the BPF maps are not in /metrics");
        }
        tracing::info!("socket splice ready");
        Ok(Arc::new(Self { maps, watch, metrics, tasks: [sockets, ring] }))
    }

    /// The numbers of entries in the maps; all are 0 when no session is spliced.
    pub fn entries(&self) -> Entries {
        self.maps.entries()
    }

    /// Carries a session to its end, or gives the session back untouched. Dropping the future
    /// resets both connections, since the bytes that the kernel still holds are lost.
    pub async fn carry(&self, session: Session) -> Result<(), Box<Refused>> {
        let enrolled = match Enrolled::new(self, &session) {
            Ok(enrolled) => enrolled,
            Err(reason) => return Err(Box::new(Refused { session, reason })),
        };
        let Session { downstream, upstream, source, to_upstream, to_downstream, idle_timeout, guard } =
            session;
        guard.stream().set_carrier(Arc::clone(&enrolled.bytes) as Arc<dyn Carrier>);
        let surplus = [to_upstream, to_downstream];
        // The sockets leave tokio's reactor, which would wake up for each segment that the kernel
        // moves.
        let end = match (downstream.into_std(), upstream.into_std()) {
            (Ok(downstream), Ok(upstream)) => {
                enrolled.run([downstream, upstream], surplus, &guard, idle_timeout).await
            }
            _ => End::Reset,
        };
        drop(enrolled);
        drop(source);
        guard.ended(end);
        Ok(())
    }
}

impl Drop for SockSplice {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

/// The entries of a session in the maps. Dropping this removes the entries.
///
/// Arrays are indexed by [`Side`], as everywhere in `splice/`.
struct Enrolled<'a> {
    splice: &'a SockSplice,
    cookies: [u64; 2],
    /// Bytes that were read from each socket before the sockets were enrolled.
    read: [u64; 2],
    bytes: Arc<Carried>,
}

impl<'a> Enrolled<'a> {
    /// Makes each socket the target of the other one. Nothing is redirected yet.
    fn new(splice: &'a SockSplice, session: &Session) -> Result<Self, Reason> {
        let streams = [&session.downstream, &session.upstream];
        let cookie = |stream| SockRef::from(stream).cookie().map_err(|_| Reason::StateUnreadable);
        let cookies = [cookie(streams[0])?, cookie(streams[1])?];
        // Asked before the sockets are in a map: for a socket in a map the kernel does not tell
        // this number.
        let read = [tcp_info::bytes_read(streams[0])?, tcp_info::bytes_read(streams[1])?];
        let bytes = Arc::new(Carried { maps: Arc::clone(&splice.maps), cookies, ended: OnceLock::new() });
        let enrolled = Self { splice, cookies, read, bytes };
        for from in Side::BOTH {
            let inserted = splice.maps.insert_target(cookies[from], streams[from.other()]);
            if let Err(error) = inserted {
                let reason = error.reason();
                tracing::debug!(error = &error as &dyn std::error::Error, "a session cannot be spliced");
                // The relay may use splice(2) on the sockets, so the sockets must not be in any
                // map.
                cookies.into_iter().for_each(|cookie| splice.maps.remove_target(cookie));
                return Err(reason);
            }
        }
        Ok(enrolled)
    }

    async fn run(
        &self,
        streams: [TcpStream; 2],
        [to_upstream, to_downstream]: [Bytes; 2],
        guard: &StreamGuard,
        idle_timeout: Option<Duration>,
    ) -> End {
        let [downstream, upstream] = streams;
        let socket =
            |side: Side, stream| Socket::new(&self.splice.watch, stream, self.cookies[side], self.read[side]);
        let (Ok(downstream), Ok(upstream)) =
            (socket(Side::Downstream, downstream), socket(Side::Upstream, upstream))
        else {
            return End::Reset;
        };
        let session = Shared { splice: self.splice, guard, in_kernel: AtomicUsize::new(0) };
        let up = Lane::new(&session, &downstream, &upstream, Stream::add_to_upstream);
        let down = Lane::new(&session, &upstream, &downstream, Stream::add_to_downstream);

        let end = tokio::select! {
            biased;
            () = downstream.signal.broken() => End::Reset,
            () = upstream.signal.broken() => End::Reset,
            ended = async { tokio::try_join!(up.run(to_upstream), down.run(to_downstream)) } => match ended {
                Ok(_) => End::Finished,
                Err(error) => {
                    let error: &dyn std::error::Error = &error;
                    tracing::debug!(stream = guard.stream().id, error, "stream broke");
                    End::Reset
                }
            },
            () = quiet_for(&downstream, &upstream, idle_timeout) => End::IdleTimeout,
        };
        // If bytes are missing, both connections must be reset: after a FIN the stream would look
        // complete.
        if end == End::Finished || (end == End::IdleTimeout && !up.is_behind() && !down.is_behind()) {
            downstream.close_in_order();
            upstream.close_in_order();
        }
        end
    }
}

impl Drop for Enrolled<'_> {
    fn drop(&mut self) {
        self.bytes.end();
        self.cookies.into_iter().for_each(|cookie| self.splice.maps.forget(cookie));
    }
}

/// State that both lanes of a session share.
struct Shared<'a> {
    splice: &'a SockSplice,
    guard: &'a StreamGuard,
    /// The number of lanes that the kernel carries, or has carried to their end.
    in_kernel: AtomicUsize,
}

impl Shared<'_> {
    fn add_lane(&self) {
        if self.in_kernel.fetch_add(1, Ordering::Relaxed) == 0 {
            self.guard.set_path(Path::Sockmap);
        }
    }

    fn remove_lane(&self) {
        if self.in_kernel.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.guard.set_path(Path::Relay);
        }
    }

    fn count(&self, reason: Reason) {
        self.guard.set_reason(reason);
        let metrics = &self.splice.metrics;
        metrics.splice_fallbacks.with_label_values(&[reason.as_str()]).inc();
        if reason == Reason::Gated {
            metrics.sock_gated.with_label_values(&[&*self.guard.stream().info.cluster]).inc();
        }
    }
}

/// Returns when neither side has sent anything for `limit`. Without a limit, never returns.
async fn quiet_for(downstream: &Socket<'_>, upstream: &Socket<'_>, limit: Option<Duration>) {
    let Some(limit) = limit else { return std::future::pending().await };
    loop {
        // A socket that cannot be asked is broken, and its signal reports that.
        let quiet = [downstream, upstream]
            .into_iter()
            .filter_map(|socket| Some(TcpInfo::of(&socket.stream).ok()?.since_last_data()))
            .min()
            .unwrap_or_default();
        if quiet >= limit {
            return;
        }
        sleep(limit - quiet).await;
    }
}

/// The bytes that the kernel has moved, read from the map on request.
#[derive(Debug)]
struct Carried {
    maps: Arc<SockMaps>,
    cookies: [u64; 2],
    /// The final numbers, set before the entries are removed.
    ended: OnceLock<[u64; 2]>,
}

impl Carried {
    /// A lane that was never switched to the kernel has no entry, and counts as 0 bytes.
    fn now(&self) -> [u64; 2] {
        self.cookies.map(|cookie| self.maps.flow(cookie).map_or(0, |flow| flow.bytes))
    }

    fn end(&self) {
        self.ended.get_or_init(|| self.now());
    }
}

impl Carrier for Carried {
    fn carried(&self) -> [u64; 2] {
        self.ended.get().copied().unwrap_or_else(|| self.now())
    }
}
