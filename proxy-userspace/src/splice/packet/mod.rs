//! The packet splice: the kernel forwards the packets of a stream between its two peers, and the proxy has neither
//! sockets nor a task for it. In reading order:
//!
//! `relayed` is a session before its hand-over (copied by `lanes`), which many streams never get to · `decide` says whether
//! and how, from what `survey` found · `approach` prepares a session and switches it · `hand_over` is what happens until the sockets are closed · `record` is a stream's
//! place in the kernel's maps · `table` holds the streams, `reap` looks after them, by the rules of `life` · `segments`
//! are those that Steer sends in the name of a peer.

mod approach;
mod counters;
mod decide;
mod hand_over;
mod lanes;
mod life;
mod reap;
mod record;
mod relayed;
mod segments;
mod survey;
mod table;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use proxy_common::reason::Reason;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use self::approach::Approach;
use self::life::Limits;
use self::record::Records;
use self::relayed::Relayed;
use self::survey::Survey;
use self::table::Table;
use super::{Refused, Session};
use crate::config;
use crate::kernel::grace::Grace;
use crate::kernel::loader::LoadError;
use crate::kernel::packet::PacketKernel;
use crate::telemetry::Telemetry;

/// Why there is no packet splice in this process.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the packet splice cannot be loaded")]
    Load(#[from] LoadError),
    #[error("the packet splice cannot send segments or read routes; it needs CAP_NET_ADMIN and CAP_NET_RAW")]
    Sockets(#[source] io::Error),
    #[error("a thread cannot be started")]
    Thread(#[source] io::Error),
}

impl StartError {
    /// The reason of streams that are relayed because of it.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Load(error) => error.reason(),
            Self::Sockets(_) => Reason::NoCapability,
            Self::Thread(_) => Reason::KernelRefused,
        }
    }
}

/// One for the process.
#[derive(Debug)]
pub struct PacketSplice {
    telemetry: Arc<Telemetry>,
    records: Arc<Records>,
    table: Arc<Table>,
    grace: Arc<Grace>,
    survey: Survey,
    /// See [`config::PacketSplice::hand_over_after`].
    after: Duration,
    /// See [`config::PacketSplice::hand_over_within`].
    within: Duration,
    reaper: AbortHandle,
}

impl PacketSplice {
    /// Loads the programs; they are attached to an interface when the first stream comes over it. Must be called inside
    /// a tokio runtime, and blocks for some milliseconds.
    ///
    /// # Errors
    /// The kernel does not take the programs, or a capability or a descriptor is missing.
    pub fn start(telemetry: Arc<Telemetry>, config: &config::PacketSplice) -> Result<Arc<Self>, StartError> {
        let (kernel, events) = PacketKernel::load(config.max_streams, config.mark)?;
        let used = telemetry.metrics.packet_streams.with_label_values(&["used"]);
        let records = Records::new(kernel, used).map_err(StartError::Sockets)?;
        telemetry.metrics.packet_streams.with_label_values(&["limit"]).set(config.max_streams.into());
        let survey = Survey::new().map_err(StartError::Sockets)?;
        let grace = Grace::start().map_err(StartError::Thread)?;
        let limits = Limits { keepalive: config.keepalive, linger: config.linger };
        let table = Arc::new(Table::new(Arc::clone(&records), limits));
        let counters = counters::Counters::new(Arc::clone(&records));
        if let Err(error) = counters.and_then(|counters| telemetry.metrics.register(Box::new(counters))) {
            tracing::warn!(%error, "what the programs count is not in /metrics");
        }
        let reaper = reap::run(Arc::clone(&table), Arc::clone(&records), Arc::clone(&grace), events);
        let reaper = tokio::spawn(reaper).abort_handle();
        tracing::info!(max_streams = config.max_streams, "packet splice ready");
        Ok(Arc::new(Self {
            telemetry,
            records,
            table,
            grace,
            survey,
            after: config.hand_over_after,
            within: config.hand_over_within,
            reaper,
        }))
    }

    /// Returns when the kernel has the stream, or when it is over. Dropping the future resets both connections.
    ///
    /// # Errors
    /// The session is given back whole, with the reason why it is not spliced.
    pub async fn carry(&self, session: Session) -> Result<(), Box<Refused>> {
        let opened = Instant::now();
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
            rested.switch()?.complete(opened, decided).await;
        }
        Ok(())
    }

    /// Ends the streams that the kernel carries: both peers of each get a RST.
    pub fn stop(&self) {
        self.reaper.abort();
        self.table.end_all();
    }
}

impl Drop for PacketSplice {
    fn drop(&mut self) {
        self.reaper.abort();
    }
}
