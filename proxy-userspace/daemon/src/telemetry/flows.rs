//! The table of live upgraded streams: one compact record each, from the 101 to the end.

use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Instant, SystemTime};

use prometheus::{IntCounterVec, IntGaugeVec};
use proxy_common::reason::Reason;
use serde::Serialize;
use slab::Slab;
use strum::VariantArray as _;

use super::metrics::Metrics;
use crate::telemetry::stream::{End, Path};

/// What is known of a stream when it is opened.
#[derive(Debug, Clone)]
pub struct FlowInfo {
    /// The peer of the downstream connection.
    pub client: SocketAddr,
    pub cluster: Arc<str>,
    pub endpoint: SocketAddr,
    /// `None`: there was no hash key and the endpoint was chosen at random.
    pub key_hash: Option<u64>,
}

/// Bytes that userspace does not see: asked when somebody looks, and once at the end.
pub trait KernelBytes: fmt::Debug + Send + Sync {
    /// Payload bytes carried by the kernel so far, `[to upstream, to downstream]`.
    fn carried(&self) -> [u64; 2];
}

/// The live record of one stream.
#[derive(Debug)]
pub struct Flow {
    pub id: u64,
    pub info: FlowInfo,
    opened: Instant,
    opened_at: SystemTime,
    path: AtomicU8,
    /// [`Reason::number`]; 0 = none.
    reason: AtomicU32,
    /// Payload bytes moved by userspace.
    to_upstream: AtomicU64,
    to_downstream: AtomicU64,
    kernel: OnceLock<Arc<dyn KernelBytes>>,
    /// How much of [`Flow::bytes`] the metric has been told of.
    published: [AtomicU64; 2],
}

impl Flow {
    pub fn add_to_upstream(&self, bytes: u64) {
        self.to_upstream.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn add_to_downstream(&self, bytes: u64) {
        self.to_downstream.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The bytes that the kernel carries are added to those of userspace from now on. May be
    /// called once per flow; later calls are ignored.
    pub fn set_kernel_bytes(&self, source: Arc<dyn KernelBytes>) {
        self.kernel.set(source).ok();
    }

    pub fn path(&self) -> Path {
        Path::VARIANTS[usize::from(self.path.load(Ordering::Relaxed))]
    }

    /// When the stream was opened.
    pub fn opened_unix_ms(&self) -> u64 {
        let since = self.opened_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    /// Why the stream is not on a better path, or not all of it; `None` also while it is not decided.
    pub fn reason(&self) -> Option<Reason> {
        let number = self.reason.load(Ordering::Relaxed);
        Reason::ALL.iter().copied().find(|reason| reason.number() == number)
    }

    /// `[to upstream, to downstream]`
    pub fn bytes(&self) -> [u64; 2] {
        let kernel = self.kernel.get().map_or([0, 0], |source| source.carried());
        let relayed = self.relayed();
        [relayed[0] + kernel[0], relayed[1] + kernel[1]]
    }

    /// Those of [`Self::bytes`] that userspace moved.
    pub fn relayed(&self) -> [u64; 2] {
        [self.to_upstream.load(Ordering::Relaxed), self.to_downstream.load(Ordering::Relaxed)]
    }

    pub fn view(&self) -> FlowView {
        let [to_upstream, to_downstream] = self.bytes();
        FlowView {
            id: self.id,
            client: self.info.client,
            cluster: self.info.cluster.to_string(),
            endpoint: self.info.endpoint,
            key_hash: self.info.key_hash.map(|hash| format!("{hash:016x}")),
            path: self.path().into_str(),
            reason: self.reason().map(Reason::as_str),
            opened_unix_seconds: self
                .opened_at
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0.0, |age| age.as_secs_f64()),
            age_seconds: self.opened.elapsed().as_secs_f64(),
            bytes_to_upstream: to_upstream,
            bytes_to_downstream: to_downstream,
        }
    }
}

/// One row of `/flows`.
#[derive(Debug, Clone, Serialize)]
pub struct FlowView {
    pub id: u64,
    pub client: SocketAddr,
    pub cluster: String,
    pub endpoint: SocketAddr,
    /// 16 hex digits.
    pub key_hash: Option<String>,
    pub path: &'static str,
    /// Why not a better path.
    pub reason: Option<&'static str>,
    pub opened_unix_seconds: f64,
    pub age_seconds: f64,
    pub bytes_to_upstream: u64,
    pub bytes_to_downstream: u64,
}

/// All live streams.
#[derive(Debug)]
pub struct Flows {
    table: Mutex<Table>,
    streams: IntGaugeVec,
    opened: IntCounterVec,
    adopted: IntCounterVec,
    closed: IntCounterVec,
    bytes: IntCounterVec,
}

#[derive(Debug, Default)]
struct Table {
    flows: Slab<Arc<Flow>>,
    next_id: u64,
}

impl Flows {
    pub(super) fn new(metrics: &Metrics) -> Arc<Self> {
        Arc::new(Self {
            table: Mutex::default(),
            streams: metrics.streams.clone(),
            opened: metrics.streams_opened.clone(),
            adopted: metrics.streams_adopted.clone(),
            closed: metrics.streams_closed.clone(),
            bytes: metrics.stream_bytes.clone(),
        })
    }

    /// Registers a stream, on the relay path until [`FlowGuard::set_path`] says otherwise.
    pub fn open(self: &Arc<Self>, info: FlowInfo) -> FlowGuard {
        let guard = self.register(info, SystemTime::now(), Path::Relay);
        self.opened.with_label_values(&[&*guard.flow.info.cluster]).inc();
        guard
    }

    /// Registers a stream that an earlier process has opened and left to the kernel, which carries `kernel` by now.
    pub fn adopt(
        self: &Arc<Self>,
        info: FlowInfo,
        opened_at: SystemTime,
        kernel: Arc<dyn KernelBytes>,
    ) -> FlowGuard {
        let guard = self.register(info, opened_at, Path::Packet);
        // The earlier process has counted them.
        for (published, bytes) in guard.flow.published.iter().zip(kernel.carried()) {
            published.store(bytes, Ordering::Relaxed);
        }
        guard.flow.set_kernel_bytes(kernel);
        self.adopted.with_label_values(&[&*guard.flow.info.cluster]).inc();
        guard
    }

    fn register(self: &Arc<Self>, info: FlowInfo, opened_at: SystemTime, path: Path) -> FlowGuard {
        let now = Instant::now();
        let age = opened_at.elapsed().unwrap_or_default();
        let mut table = self.lock();
        table.next_id += 1;
        let flow = Arc::new(Flow {
            id: table.next_id,
            info,
            opened: now.checked_sub(age).unwrap_or(now),
            opened_at,
            path: AtomicU8::new(index_of(path)),
            reason: AtomicU32::new(0),
            to_upstream: AtomicU64::new(0),
            to_downstream: AtomicU64::new(0),
            kernel: OnceLock::new(),
            published: Default::default(),
        });
        // A stream has descriptors when it begins, so there are not so many.
        let key = u32::try_from(table.flows.insert(Arc::clone(&flow))).expect("fewer than 2^32 streams");
        drop(table);
        self.streams.with_label_values(&[&*flow.info.cluster, path.into_str()]).inc();
        FlowGuard { flows: Arc::clone(self), flow, key, end: Some(End::Reset) }
    }

    pub fn len(&self) -> usize {
        self.lock().flows.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The live streams, oldest first.
    pub fn snapshot(&self) -> Vec<Arc<Flow>> {
        let mut flows: Vec<_> = self.lock().flows.iter().map(|(_, flow)| Arc::clone(flow)).collect();
        flows.sort_unstable_by_key(|flow| flow.id);
        flows
    }

    /// Brings `steer_stream_bytes_total` up to date with the live streams; called before a scrape.
    pub fn publish_bytes(&self) {
        for flow in self.snapshot() {
            self.publish(&flow);
        }
    }

    fn publish(&self, flow: &Flow) {
        let now = flow.bytes();
        for (index, direction) in ["to_upstream", "to_downstream"].into_iter().enumerate() {
            // fetch_max, so that two scrapes at once count no byte twice.
            let before = flow.published[index].fetch_max(now[index], Ordering::Relaxed);
            let new = now[index].saturating_sub(before);
            self.bytes.with_label_values(&[&*flow.info.cluster, direction]).inc_by(new);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        // Nothing panics while the lock is held, and the table is whole between any two statements.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Owns a stream's row; dropping it removes the row and counts the end.
#[derive(Debug)]
pub struct FlowGuard {
    flows: Arc<Flows>,
    flow: Arc<Flow>,
    /// In the table.
    key: u32,
    /// `None`: it goes on without this process.
    end: Option<End>,
}

impl FlowGuard {
    pub fn flow(&self) -> &Arc<Flow> {
        &self.flow
    }

    pub fn set_path(&self, path: Path) {
        let old = Path::VARIANTS[usize::from(self.flow.path.swap(index_of(path), Ordering::Relaxed))];
        let gauge =
            |path: Path| self.flows.streams.with_label_values(&[&*self.flow.info.cluster, path.into_str()]);
        gauge(old).dec();
        gauge(path).inc();
    }

    /// Says why the stream is not on a better path.
    pub fn set_reason(&self, reason: Reason) {
        self.flow.reason.store(reason.number(), Ordering::Relaxed);
    }

    /// Says how the stream ended; without a word it counts as a reset.
    pub fn ended(mut self, end: End) {
        self.end = Some(end);
    }

    /// Says that the stream goes on without this process, so that it does not count as ended.
    pub fn left(mut self) {
        self.end = None;
    }
}

impl Drop for FlowGuard {
    fn drop(&mut self) {
        self.flows.lock().flows.remove(self.key as usize);
        let (cluster, path) = (&*self.flow.info.cluster, self.flow.path().into_str());
        self.flows.publish(&self.flow);
        let [to_upstream, to_downstream] = self.flow.bytes();
        self.flows.streams.with_label_values(&[cluster, path]).dec();
        let Some(end) = self.end else { return };
        self.flows.closed.with_label_values(&[cluster, end.into_str()]).inc();
        tracing::info!(
            stream = self.flow.id,
            client = %self.flow.info.client,
            cluster,
            endpoint = %self.flow.info.endpoint,
            path,
            reason = self.flow.reason().map(Reason::as_str),
            end = end.into_str(),
            seconds = self.flow.opened.elapsed().as_secs_f64(),
            to_upstream,
            to_downstream,
            "stream closed"
        );
    }
}

fn index_of(path: Path) -> u8 {
    // Its position in `Path::VARIANTS`, since no variant has a number of its own.
    path as u8
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::Telemetry;
    use super::*;

    fn info() -> FlowInfo {
        FlowInfo {
            client: "192.0.2.1:5000".parse().unwrap(),
            cluster: "sio".into(),
            endpoint: "192.0.2.9:3000".parse().unwrap(),
            key_hash: Some(0xef46_db37_51d8_e999),
        }
    }

    #[test]
    fn a_stream_is_listed_while_its_guard_lives_and_counted_after() {
        let telemetry = Telemetry::new();
        let guard = telemetry.flows.open(info());
        guard.set_path(Path::Sockmap);
        guard.flow().add_to_upstream(7);
        let rows = telemetry.flows.snapshot();
        assert_eq!(rows.len(), 1);
        let view = rows[0].view();
        assert_eq!((view.path, view.bytes_to_upstream, view.bytes_to_downstream), ("sockmap", 7, 0));
        assert_eq!(view.key_hash.as_deref(), Some("ef46db3751d8e999"));
        assert_eq!(view.reason, None);
        guard.set_reason(Reason::Mss);
        assert_eq!(rows[0].view().reason, Some("mss"));
        assert_eq!(telemetry.metrics.streams.with_label_values(&["sio", "relay"]).get(), 0);
        assert_eq!(telemetry.metrics.streams.with_label_values(&["sio", "sockmap"]).get(), 1);
        let published = || telemetry.metrics.stream_bytes.with_label_values(&["sio", "to_upstream"]).get();
        telemetry.flows.publish_bytes();
        assert_eq!(published(), 7);
        guard.flow().add_to_upstream(3);

        guard.ended(End::Finished);
        assert!(telemetry.flows.is_empty());
        assert_eq!(telemetry.metrics.streams.with_label_values(&["sio", "sockmap"]).get(), 0);
        assert_eq!(telemetry.metrics.streams_closed.with_label_values(&["sio", "finished"]).get(), 1);
        assert_eq!(published(), 10);
    }

    #[derive(Debug)]
    struct Fixed;
    impl KernelBytes for Fixed {
        fn carried(&self) -> [u64; 2] {
            [100, 1000]
        }
    }

    #[test]
    fn a_stream_of_an_earlier_process_keeps_its_age_and_its_bytes_are_not_counted_again() {
        let telemetry = Telemetry::new();
        let opened_at = SystemTime::now() - Duration::from_secs(5);
        let guard = telemetry.flows.adopt(info(), opened_at, Arc::new(Fixed));
        let view = guard.flow().view();
        assert_eq!((view.path, view.bytes_to_upstream, view.bytes_to_downstream), ("packet", 100, 1000));
        assert!((5.0..60.0).contains(&view.age_seconds), "{}", view.age_seconds);
        telemetry.flows.publish_bytes();
        let metrics = &telemetry.metrics;
        assert_eq!(metrics.stream_bytes.with_label_values(&["sio", "to_upstream"]).get(), 0);
        assert_eq!(metrics.streams_opened.with_label_values(&["sio"]).get(), 0);
        assert_eq!(metrics.streams_adopted.with_label_values(&["sio"]).get(), 1);
        assert_eq!(metrics.streams.with_label_values(&["sio", "packet"]).get(), 1);
        drop(guard);
        assert_eq!(metrics.streams.with_label_values(&["sio", "packet"]).get(), 0);
    }

    #[test]
    fn bytes_of_kernel_and_userspace_add_up() {
        let telemetry = Telemetry::new();
        let guard = telemetry.flows.open(info());
        guard.flow().add_to_downstream(5);
        guard.flow().set_kernel_bytes(Arc::new(Fixed));
        assert_eq!(guard.flow().bytes(), [100, 1005]);
    }
}
