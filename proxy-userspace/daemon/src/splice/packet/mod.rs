//! The packet splice: the kernel forwards the packets of a stream between its two peers, and the proxy has neither
//! sockets nor a task for it. In reading order:
//!
//! `relayed` is a session before its hand-over (copied by `lanes`), which many streams never get to · `decide` says whether
//! and how, from what `survey` found · `approach` prepares a session and switches it · `hand_over` is what happens until the
//! sockets are closed · `record` is a stream's place in the kernel's maps, which are this process' by `gate` · `adopt` takes over those of an earlier process ·
//! `table` holds the streams, `reap` looks after them, by the rules of `life`, `detach` ends those of a stopped process · `segments`
//! are those that Steer sends in the name of a peer · `unfit` remembers peers whose packets cannot be carried.

mod adopt;
mod approach;
mod counters;
mod decide;
pub mod detach;
mod gate;
mod hand_over;
mod lanes;
mod life;
mod owned_record;
mod reap;
mod relayed;
mod segments;
mod survey;
mod table;
mod unfit;

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use proxy_common::instance::Instance;
use proxy_common::reason::Reason;
use steer_kernel::bpf::packet::{FlowEvents, PacketKernel, PacketLoadError, pinned};
use steer_kernel::bpf::pins::{Pins, PinsError};
use steer_kernel::grace::Grace;
use steer_policy::config::Config;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};

use self::approach::Approach;
use self::counters::Counters;
use self::life::Limits;
use self::owned_record::RecordPool;
use self::relayed::Relayed;
use self::survey::Survey;
use self::table::Table;
use super::{Refused, Session};
use crate::streams::Streams;
use crate::streams::ports::{self, SourcePorts};
use crate::telemetry::Metrics;

/// Why there is no packet splice in this process.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the packet splice cannot be loaded")]
    Load(#[from] PacketLoadError),
    #[error("the packet splice cannot send segments or read routes; it needs CAP_NET_ADMIN and CAP_NET_RAW")]
    Sockets(#[source] io::Error),
    #[error("a thread cannot be started")]
    Thread(#[source] io::Error),
    #[error("the instance's lock, which an earlier process has given, cannot be used")]
    PassedLock(#[source] PinsError),
    #[error("{0} runs already; give this process another name with --instance")]
    Owned(String),
    #[error(
        "instance `{instance}` cannot be taken over: see `steer cleanup --instance {instance} --dry-run`, or give this \
         process another name with --instance"
    )]
    Foreign {
        instance: String,
        #[source]
        source: PacketLoadError,
    },
}

impl StartError {
    /// The reason of streams that are relayed because of it.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Load(error) => error.reason(),
            Self::Sockets(_) => Reason::NoCapability,
            Self::Thread(_) | Self::PassedLock(_) | Self::Owned(_) | Self::Foreign { .. } => {
                Reason::KernelRefused
            }
        }
    }

    /// Whether the process must not go on without the packet splice: it would be one too many, or leave streams alone.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::PassedLock(_) | Self::Owned(_) | Self::Foreign { .. })
    }
}

/// One for the process.
#[derive(Debug)]
pub struct PacketSplice {
    metrics: Arc<Metrics>,
    streams: Arc<Streams>,
    records: Arc<RecordPool>,
    table: Arc<Table>,
    grace: Arc<Grace>,
    survey: Survey,
    /// See [`steer_policy::config::PacketSplice::hand_over_after`].
    after: Duration,
    /// See [`steer_policy::config::PacketSplice::hand_over_within`].
    within: Duration,
    /// Sessions that are to be handed over, and those after the switch whose sockets are still there.
    underway: AtomicUsize,
    /// The latter.
    handing_over: AtomicUsize,
    reaper: AbortHandle,
    counters: Option<Counters>,
}

/// The process that had the streams of the instance before this one.
#[derive(Debug)]
pub enum Predecessor {
    /// The process has ended, or there was none.
    Exited,
    /// The process goes on with what it has sockets for, and has passed this lock (see [`PacketSplice::give_away`]).
    Draining(File),
}

/// Hand-overs that run get so long to be complete before the process ends: a grace period or two, if the stream is quiet.
const COMPLETE_WITHIN: Duration = Duration::from_millis(500);
const COMPLETE_LOOK: Duration = Duration::from_millis(5);

impl PacketSplice {
    /// Loads the programs; they are attached to an interface when the first stream comes over it. Must be called inside
    /// a tokio runtime, and blocks for some milliseconds.
    ///
    /// # Errors
    /// The kernel does not take the programs, or a capability or a descriptor is missing.
    pub fn start(
        metrics: Arc<Metrics>,
        streams: Arc<Streams>,
        config: &Config,
        predecessor: Predecessor,
    ) -> Result<Arc<Self>, StartError> {
        let (kernel, events) = load(config, predecessor)?;
        let config = &config.packet_splice;
        if let Err(error) = kernel.set_limits(config.orphan_timeout, config.linger) {
            tracing::warn!(%error, "without a process, streams whose peers vanished are kept");
        }
        let max_streams = kernel.records().capacity();
        if max_streams != config.max_streams {
            tracing::warn!(
                max_streams,
                "packet_splice.max_streams stays that of the streams that were taken over"
            );
        }
        let used = metrics.packet_streams.with_label_values(&["used"]);
        let records = RecordPool::new(kernel, used).map_err(StartError::Sockets)?;
        metrics.packet_streams.with_label_values(&["limit"]).set(max_streams.into());
        let survey = Survey::new().map_err(StartError::Sockets)?;
        let grace = Grace::start().map_err(StartError::Thread)?;
        let limits = Limits { keepalive: config.keepalive, linger: config.linger };
        let table = Arc::new(Table::new(Arc::clone(&records), limits));
        let counters = Counters::new(Arc::clone(&records)).and_then(|counters| {
            metrics.register(Box::new(counters.clone()))?;
            Ok(counters)
        });
        let not_shown = |error: &_| tracing::warn!(%error, "what the programs count is not in /metrics");
        let counters = counters.inspect_err(not_shown).ok();
        let reaper = reap::run(Arc::clone(&table), Arc::clone(&records), Arc::clone(&grace), events);
        let reaper = tokio::spawn(reaper).abort_handle();
        tracing::info!(max_streams, "packet splice ready");
        Ok(Arc::new(Self {
            metrics,
            streams,
            records,
            table,
            grace,
            survey,
            after: config.hand_over_after,
            within: config.hand_over_within,
            underway: AtomicUsize::new(0),
            handing_over: AtomicUsize::new(0),
            reaper,
            counters,
        }))
    }

    /// Returns when the kernel has the stream, or when it is over. Dropping the future resets both connections.
    ///
    /// # Errors
    /// The session is given back whole, with the reason why it is not spliced.
    pub async fn carry(&self, session: Session) -> Result<(), Box<Refused>> {
        let opened = Instant::now();
        let _counted = Counted::new(&self.underway);
        let mut stream = Relayed::from(session);
        // The timer's shortest time is a millisecond.
        if !self.after.is_zero() {
            match stream.relay(self.after, |_| false).await {
                Some(still_there) => stream = still_there,
                None => return Ok(()),
            }
        }
        let decided = Instant::now();
        let mut approach = Approach::begin(self, stream)?;
        if !self.within.is_zero() {
            let moment = rand::random_range(Duration::ZERO..=self.within);
            match approach.relay_for(moment).await {
                Some(still_there) => approach = still_there,
                None => return Ok(()),
            }
        }
        if let Some(rested) = approach.rest().await {
            let hand_over = rested.switch()?;
            let _counted = Counted::new(&self.handing_over);
            hand_over.complete(opened, decided).await;
        }
        Ok(())
    }

    /// Takes over the streams that an earlier process has left; their source ports are of `source_ports`. To be called once, before
    /// there are others.
    pub fn adopt(&self, source_ports: Option<&SourcePorts>, config: &Config, goes_on: bool) {
        // An earlier process completes its hand-overs in its own maps only.
        let completes = goes_on && !self.records.kernel.are_new();
        adopt::adopt(self, source_ports, &config.clusters, completes);
        let reserved = source_ports.map_or(&[][..], SourcePorts::reserved);
        if let Err(error) = self.records.kernel.note_reserved(reserved) {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(
                error,
                "the ports that were reserved are not given back when nothing uses them any more"
            );
        }
    }

    /// Leaves the streams that the kernel carries to the next process; or, where that cannot be, ends them: both peers of
    /// each get a RST.
    pub async fn stop(&self) {
        // Hand-overs that take longer end with a reset.
        timeout(COMPLETE_WITHIN, none_left(&self.handing_over)).await.ok();
        self.reaper.abort();
        let kernel = &self.records.kernel;
        if kernel.ends_with_process() {
            self.table.end_all();
        } else {
            let streams = self.table.leave_all();
            if streams > 0 {
                tracing::info!(streams, "streams go on without this process; `steer detach` ends them");
                return;
            }
        }
        if let Err(error) = clear_up(kernel) {
            tracing::warn!(error = &*error, "cannot clear up; `steer cleanup` does");
        }
    }
}

impl PacketSplice {
    /// Leaves everything to another process, while this one goes on: sessions that are about to be handed over get half a
    /// second for it, and are relayed then; hand-overs that take longer are completed, and the stream is the other
    /// process' already. Returns the lock of the instance, to be given to it. To be called once, if the streams [can be
    /// given](Self::outlives), and when nobody calls [`carry`](Self::carry) any more.
    pub async fn give_away(&self) -> Option<File> {
        // Sessions that take longer are relayed.
        timeout(COMPLETE_WITHIN, none_left(&self.underway)).await.ok();
        self.records.gate.close().await;
        self.reaper.abort();
        if let Some(counters) = &self.counters {
            // This fails only for a collector that is not registered.
            self.metrics.unregister(Box::new(counters.clone())).ok();
        }
        let streams = self.table.give_away();
        tracing::info!(streams, "left the streams to the next process");
        self.records.kernel.give_away()
    }

    /// Whether another process can take the streams over.
    pub fn outlives(&self) -> bool {
        self.records.kernel.outlives()
    }
}

async fn none_left(count: &AtomicUsize) {
    while count.load(Ordering::Acquire) > 0 {
        sleep(COMPLETE_LOOK).await;
    }
}

impl Drop for PacketSplice {
    fn drop(&mut self) {
        self.reaper.abort();
    }
}

/// Counts itself for as long as it lives.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The programs and maps; those of the instance's last process, if it has left streams.
fn load(config: &Config, predecessor: Predecessor) -> Result<(PacketKernel, FlowEvents), StartError> {
    let (instance, settings) = (&config.instance, &config.packet_splice);
    let (pins, no_pins) = match take(instance, predecessor)? {
        Ok(pins) => (Some(pins), None),
        Err(why) => (None, Some(why)),
    };
    let loaded =
        PacketKernel::load(settings.max_streams, settings.mark, pins).map_err(|error| match error {
            PacketLoadError::Pinned(_) => {
                StartError::Foreign { instance: instance.to_string(), source: error }
            }
            error => error.into(),
        })?;
    // Not of a splice that does not come about.
    if let Some(error) = no_pins {
        let error: &dyn std::error::Error = &error;
        tracing::warn!(error, "streams end with this process");
    }
    Ok(loaded)
}

/// Leaves nothing in the kernel that would stay when the process ends.
fn clear_up(kernel: &PacketKernel) -> Result<(), Box<dyn std::error::Error>> {
    ports::unreserve(&kernel.noted_reserved()?)?;
    kernel.unpin()?;
    Ok(())
}

/// The inner error: there can be no pins, for this reason, and streams end with the process.
fn take(instance: &Instance, predecessor: Predecessor) -> Result<Result<Pins, PinsError>, StartError> {
    if let Predecessor::Draining(lock) = predecessor {
        return Pins::take_over(instance, lock).map(Ok).map_err(StartError::PassedLock);
    }
    match Pins::take(instance) {
        Err(PinsError::Owned(_)) => Err(StartError::Owned(pinned::owner(instance))),
        taken => Ok(taken),
    }
}
