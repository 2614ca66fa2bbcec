//! The packet splice: the kernel forwards the packets of a stream between its two peers. The proxy
//! has neither sockets nor a task for the stream. The modules in reading order:
//!
//! - `relayed`: a session before its hand-over, copied by `lanes`. Many streams end before their
//!   hand-over.
//! - `decide`: whether and how a stream is spliced, from what `survey` found.
//! - `handshake`: prepares connections before they are made. `plain_endpoints` has what it knows of
//!   endpoints.
//! - `approach`: prepares a session and switches it.
//! - `hand_over`: everything from the switch until the sockets are closed.
//! - `owned_record`: the place of a stream in the kernel's maps. `gate` says whether this process
//!   still owns the maps.
//! - `adopt`: takes over the records of an earlier process.
//! - `table`: holds the streams. `reap` looks after them, by the rules of `life`.
//! - `detach`: ends the streams of a stopped process.
//! - `liberal`: the setting of connection tracking that `packet_splice.conntrack: liberal` needs.
//! - `segments`: the segments that Steer sends in the name of a peer.
//! - `unfit`: remembers peers whose packets cannot be carried.
//! - `counters`: the metrics of what the programs count.

mod adopt;
mod approach;
mod counters;
mod decide;
pub mod detach;
mod gate;
mod hand_over;
mod handshake;
mod lanes;
pub mod liberal;
mod life;
mod owned_record;
mod plain_endpoints;
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
use self::hand_over::HandOvers;
use self::life::Limits;
use self::owned_record::RecordPool;
use self::plain_endpoints::PlainEndpoints;
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
    /// The fallback reason of the streams that are relayed because of this error.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Load(error) => error.reason(),
            Self::Sockets(_) => Reason::NoCapability,
            Self::Thread(_) | Self::PassedLock(_) | Self::Owned(_) | Self::Foreign { .. } => {
                Reason::KernelRefused
            }
        }
    }

    /// Whether the process must not go on without the packet splice: either another process of the
    /// instance runs, or nothing would look after streams that are left.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::PassedLock(_) | Self::Owned(_) | Self::Foreign { .. })
    }
}

/// The process has one.
#[derive(Debug)]
pub struct PacketSplice {
    metrics: Arc<Metrics>,
    hand_overs: HandOvers,
    streams: Arc<Streams>,
    records: Arc<RecordPool>,
    table: Arc<Table>,
    grace: Arc<Grace>,
    survey: Survey,
    instance: Instance,
    /// See [`steer_policy::config::PacketSplice::hand_over_after`].
    after: Duration,
    /// See [`steer_policy::config::PacketSplice::hand_over_within`].
    within: Duration,
    /// See [`steer_policy::config::PacketSplice::agree_at_handshake`].
    agrees_at_handshake: bool,
    plain_endpoints: PlainEndpoints,
    /// The number of sessions before the switch, and after the switch while their sockets are open.
    underway: AtomicUsize,
    /// The number of sessions after the switch while their sockets are open.
    handing_over: AtomicUsize,
    reaper: AbortHandle,
    counters: Option<Counters>,
}

/// The process that had the streams of the instance before this one.
#[derive(Debug)]
pub enum Predecessor {
    /// The process has ended, or there was none.
    Exited,
    /// The process goes on with the streams that it has sockets for, and has passed this lock (see
    /// [`PacketSplice::give_away`]).
    Draining(File),
}

/// How long running hand-overs may take before the process ends. A quiet stream needs one or two
/// grace periods.
const COMPLETE_WITHIN: Duration = Duration::from_millis(500);
const COMPLETE_LOOK: Duration = Duration::from_millis(5);

impl PacketSplice {
    /// Loads the programs. They are attached to an interface when the first stream uses it. Must be
    /// called inside a tokio runtime, and blocks for some milliseconds.
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
        let (config, instance) = (&config.packet_splice, &config.instance);
        if let Err(error) = kernel.set_limits(config.orphan_timeout, config.linger) {
            tracing::warn!(%error, "while no process runs, the kernel keeps streams whose peers have vanished");
        }
        let max_streams = kernel.records().capacity();
        if max_streams != config.max_streams {
            tracing::warn!(
                max_streams,
                "packet_splice.max_streams keeps the value of the earlier process, whose streams were taken over"
            );
        }
        let used = metrics.packet_streams.with_label_values(&["used"]);
        let records = RecordPool::new(kernel, used).map_err(StartError::Sockets)?;
        metrics.packet_streams.with_label_values(&["limit"]).set(max_streams.into());
        let survey = Survey::new(config.conntrack, instance).map_err(StartError::Sockets)?;
        let grace = Grace::start().map_err(StartError::Thread)?;
        let limits = Limits { keepalive: config.keepalive, linger: config.linger };
        let table = Arc::new(Table::new(Arc::clone(&records), limits));
        let counters = Counters::new(Arc::clone(&records)).and_then(|counters| {
            metrics.register(Box::new(counters.clone()))?;
            Ok(counters)
        });
        let not_shown = |error: &_| tracing::warn!(%error, "the counts of the programs are not in /metrics");
        let counters = counters.inspect_err(not_shown).ok();
        let reaper = reap::run(Arc::clone(&table), Arc::clone(&records), Arc::clone(&grace), events);
        let reaper = tokio::spawn(reaper).abort_handle();
        tracing::info!(max_streams, "packet splice ready");
        Ok(Arc::new(Self {
            hand_overs: HandOvers::new(&metrics),
            metrics,
            streams,
            records,
            table,
            grace,
            survey,
            instance: instance.clone(),
            after: config.hand_over_after,
            within: config.hand_over_within,
            agrees_at_handshake: config.agree_at_handshake,
            plain_endpoints: PlainEndpoints::default(),
            underway: AtomicUsize::new(0),
            handing_over: AtomicUsize::new(0),
            reaper,
            counters,
        }))
    }

    /// Returns when the kernel has the stream, or when the stream is over. Dropping the future
    /// resets both connections.
    ///
    /// # Errors
    /// The whole session, and the reason why it is not spliced.
    pub async fn carry(&self, session: Session) -> Result<(), Box<Refused>> {
        let opened = Instant::now();
        let _counted = Counted::new(&self.underway);
        let mut stream = Relayed::from(session);
        // A wait of zero would take a millisecond, the shortest time of the timer.
        if !self.after.is_zero() {
            match stream.relay(self.after, |_| false).await {
                Some(still_there) => stream = still_there,
                None => return Ok(()),
            }
        }
        if stream.has_fin() {
            // Most short streams end here: without a look at routes and sockets.
            return Err(Box::new(Refused { session: stream.into(), reason: Reason::NotEstablished }));
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

    /// Adopts the streams that an earlier process has left, and leases their source ports from
    /// `source_ports`. To be called once, before this process has other streams. `goes_on`: the
    /// earlier process still runs.
    pub fn adopt(&self, source_ports: Option<&SourcePorts>, config: &Config, goes_on: bool) {
        // The earlier process completes its hand-overs only in the maps that it knows.
        let completes = goes_on && !self.records.kernel.are_new();
        adopt::adopt(self, source_ports, &config.clusters, completes);
        let reserved = source_ports.map_or(&[][..], SourcePorts::reserved);
        if let Err(error) = self.records.kernel.note_reserved(reserved) {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(
                error,
                "the reserved source ports stay reserved when no stream uses them any more"
            );
        }
    }

    /// Leaves the streams that the kernel carries to the next process. If no process can take them
    /// over, ends them: both peers of each stream get a RST.
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
        if let Err(error) = clear_up(kernel, &self.instance) {
            tracing::warn!(error = &*error, "cannot clear up; `steer cleanup` does");
        }
    }
}

impl PacketSplice {
    /// Leaves the maps and their streams to another process, while this process goes on. Sessions
    /// before the switch get half a second to be handed over; after that they are relayed. This
    /// process completes hand-overs that take longer, although their streams already belong to the
    /// other process. Returns the lock of the instance, for the other process.
    ///
    /// To be called once, if [`outlives`](Self::outlives) returns true, and only after the last
    /// call of [`carry`](Self::carry).
    pub async fn give_away(&self) -> Option<File> {
        // After this time, sessions before the switch are relayed.
        timeout(COMPLETE_WITHIN, none_left(&self.underway)).await.ok();
        self.records.gate.close().await;
        self.reaper.abort();
        if let Some(counters) = &self.counters {
            // `unregister` fails only for a collector that is not registered.
            self.metrics.unregister(Box::new(counters.clone())).ok();
        }
        let streams = self.table.give_away();
        tracing::info!(streams, "left the streams to the next process");
        self.records.kernel.give_away()
    }

    /// Whether the streams outlive this process, so that another process can take them over.
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

/// Is part of a count for as long as it lives.
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

/// Loads the programs and maps. If the last process of the instance has left streams, uses its
/// maps.
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
    // Not logged if the load fails: then there are no spliced streams.
    if let Some(error) = no_pins {
        let error: &dyn std::error::Error = &error;
        tracing::warn!(error, "streams end with this process");
    }
    Ok(loaded)
}

/// Removes everything from the kernel that would outlive the process.
fn clear_up(kernel: &PacketKernel, instance: &Instance) -> Result<(), Box<dyn std::error::Error>> {
    liberal::restore(instance)?;
    ports::unreserve(&kernel.noted_reserved()?)?;
    kernel.unpin()?;
    Ok(())
}

/// Takes the instance. The inner error: why there can be no pins. Without pins, streams end with
/// the process.
fn take(instance: &Instance, predecessor: Predecessor) -> Result<Result<Pins, PinsError>, StartError> {
    if let Predecessor::Draining(lock) = predecessor {
        return Pins::take_over(instance, lock).map(Ok).map_err(StartError::PassedLock);
    }
    match Pins::take(instance) {
        Err(PinsError::Owned(_)) => Err(StartError::Owned(pinned::owner(instance))),
        taken => Ok(taken),
    }
}
