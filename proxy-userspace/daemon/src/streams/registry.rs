//! All live streams: one compact record each, from the 101 to the end.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use proxy_common::reason::Reason;
use slab::Slab;

use super::counts::{Counts, Families};
use super::{Carrier, End, Path, Stream, StreamInfo};
use crate::telemetry::Metrics;

/// All live streams.
#[derive(Debug)]
pub struct Streams {
    table: Mutex<Table>,
    metrics: Families,
}

#[derive(Debug, Default)]
struct Table {
    streams: Slab<Arc<Stream>>,
    /// Positions in `streams`.
    by_endpoint: HashMap<SocketAddr, HashSet<u32>>,
    /// Of each cluster that has had a stream.
    counts: HashMap<Arc<str>, Arc<Counts>>,
    next_id: u64,
}

impl Table {
    fn remove(&mut self, position: u32) {
        let stream = self.streams.remove(position as usize);
        if let Some(positions) = self.by_endpoint.get_mut(&stream.info.endpoint) {
            positions.remove(&position);
            if positions.is_empty() {
                self.by_endpoint.remove(&stream.info.endpoint);
            }
        }
    }
}

impl Streams {
    pub fn new(metrics: &Metrics) -> Arc<Self> {
        Arc::new(Self { table: Mutex::default(), metrics: Families::new(metrics) })
    }

    /// Registers a stream, on the relay path until [`StreamGuard::set_path`] says otherwise.
    pub fn open(self: &Arc<Self>, info: StreamInfo) -> StreamGuard {
        let guard = self.register(info, SystemTime::now(), Path::Relay);
        guard.counts.opened.inc();
        guard
    }

    /// Registers a stream that an earlier process has opened and left to the kernel, where `carrier` carries it by now.
    pub fn adopt(
        self: &Arc<Self>,
        info: StreamInfo,
        opened_at: SystemTime,
        carrier: Arc<dyn Carrier>,
    ) -> StreamGuard {
        let guard = self.register(info, opened_at, Path::Packet);
        // The earlier process has counted them.
        for (published, bytes) in guard.stream.published.iter().zip(carrier.carried()) {
            published.store(bytes, Ordering::Relaxed);
        }
        guard.stream.set_carrier(carrier);
        guard.counts.adopted.inc();
        guard
    }

    fn register(self: &Arc<Self>, info: StreamInfo, opened_at: SystemTime, path: Path) -> StreamGuard {
        let mut table = self.lock();
        table.next_id += 1;
        let new_cluster = || Arc::new(self.metrics.of_cluster(&info.cluster));
        let counts = table.counts.entry(Arc::clone(&info.cluster)).or_insert_with(new_cluster);
        let counts = Arc::clone(counts);
        let stream = Arc::new(Stream::new(table.next_id, info, opened_at, path));
        // A stream has descriptors when it begins, so there are not so many.
        let position =
            u32::try_from(table.streams.insert(Arc::clone(&stream))).expect("fewer than 2^32 streams");
        table.by_endpoint.entry(stream.info.endpoint).or_default().insert(position);
        drop(table);
        counts.alive(path).inc();
        StreamGuard { streams: Arc::clone(self), stream, counts, position, end: Some(End::Reset) }
    }

    pub fn len(&self) -> usize {
        self.lock().streams.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The live streams, oldest first.
    pub fn snapshot(&self) -> Vec<Arc<Stream>> {
        let streams = self.lock().streams.iter().map(|(_, stream)| Arc::clone(stream)).collect();
        oldest_first(streams)
    }

    /// The live streams to an endpoint, oldest first.
    pub fn of_endpoint(&self, endpoint: SocketAddr) -> Vec<Arc<Stream>> {
        let table = self.lock();
        let positions = table.by_endpoint.get(&endpoint).into_iter().flatten();
        let streams = positions.map(|&position| Arc::clone(&table.streams[position as usize])).collect();
        drop(table);
        oldest_first(streams)
    }

    /// Brings `steer_stream_bytes_total` up to date with the live streams; called before a scrape.
    pub fn publish_bytes(&self) {
        let counts = self.lock().counts.clone();
        for stream in self.snapshot() {
            if let Some(counts) = counts.get(&stream.info.cluster) {
                counts.publish_bytes(&stream);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Nothing panics while the lock is held, and the table is whole between any two statements.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn oldest_first(mut streams: Vec<Arc<Stream>>) -> Vec<Arc<Stream>> {
    streams.sort_unstable_by_key(|stream| stream.id);
    streams
}

/// Owns a stream; dropping it removes the stream from the registry and counts the end.
#[derive(Debug)]
pub struct StreamGuard {
    streams: Arc<Streams>,
    stream: Arc<Stream>,
    /// The metrics of its cluster. (Not in `Stream`, which has no room for more.)
    counts: Arc<Counts>,
    /// In the table.
    position: u32,
    /// `None`: it goes on without this process.
    end: Option<End>,
}

impl StreamGuard {
    pub fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    pub fn set_path(&self, path: Path) {
        let old = self.stream.set_path(path);
        self.counts.alive(old).dec();
        self.counts.alive(path).inc();
    }

    /// Says why the stream is not on a better path.
    pub fn set_reason(&self, reason: Reason) {
        self.stream.set_reason(reason);
    }

    /// Says how the stream ended; without a word it counts as a reset, or as what it was [asked](Stream::end) to end as.
    pub fn ended(mut self, end: End) {
        self.end = Some(end);
    }

    /// Says that the stream goes on without this process, so that it does not count as ended.
    pub fn left(mut self) {
        self.end = None;
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        self.streams.lock().remove(self.position);
        let path = self.stream.path();
        self.counts.publish_bytes(&self.stream);
        let [to_upstream, to_downstream] = self.stream.bytes();
        self.counts.alive(path).dec();
        let end = match self.end {
            None => return,
            Some(End::Reset) => self.stream.asked_end().unwrap_or(End::Reset),
            Some(end) => end,
        };
        self.counts.closed(end).inc();
        tracing::info!(
            stream = self.stream.id,
            client = %self.stream.info.client,
            cluster = &*self.stream.info.cluster,
            endpoint = %self.stream.info.endpoint,
            path = path.into_str(),
            reason = self.stream.reason().map(Reason::as_str),
            end = end.into_str(),
            seconds = self.stream.age().as_secs_f64(),
            to_upstream,
            to_downstream,
            "stream closed"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn info() -> StreamInfo {
        StreamInfo {
            client: "192.0.2.1:5000".parse().unwrap(),
            cluster: "sio".into(),
            endpoint: "192.0.2.9:3000".parse().unwrap(),
            key_hash: Some(0xef46_db37_51d8_e999),
        }
    }

    #[test]
    fn a_stream_is_listed_while_its_guard_lives_and_counted_after() {
        let metrics = Metrics::new();
        let streams = Streams::new(&metrics);
        let guard = streams.open(info());
        guard.set_path(Path::Sockmap);
        guard.stream().add_to_upstream(7);
        let rows = streams.snapshot();
        assert_eq!(rows.len(), 1);
        let row = rows[0].row();
        assert_eq!((row.path, row.bytes_to_upstream, row.bytes_to_downstream), ("sockmap", 7, 0));
        assert_eq!(row.key_hash, Some(0xef46_db37_51d8_e999));
        assert_eq!(row.reason, None);
        guard.set_reason(Reason::Mss);
        assert_eq!(rows[0].row().reason, Some("mss"));
        assert_eq!(metrics.streams.with_label_values(&["sio", "relay"]).get(), 0);
        assert_eq!(metrics.streams.with_label_values(&["sio", "sockmap"]).get(), 1);
        let published = || metrics.stream_bytes.with_label_values(&["sio", "to_upstream"]).get();
        streams.publish_bytes();
        assert_eq!(published(), 7);
        guard.stream().add_to_upstream(3);

        guard.ended(End::Finished);
        assert!(streams.is_empty());
        assert_eq!(metrics.streams.with_label_values(&["sio", "sockmap"]).get(), 0);
        assert_eq!(metrics.streams_closed.with_label_values(&["sio", "finished"]).get(), 1);
        assert_eq!(published(), 10);
    }

    #[derive(Debug)]
    struct Fixed;
    impl Carrier for Fixed {
        fn carried(&self) -> [u64; 2] {
            [100, 1000]
        }
    }

    #[test]
    fn a_stream_of_an_earlier_process_keeps_its_age_and_its_bytes_are_not_counted_again() {
        let metrics = Metrics::new();
        let streams = Streams::new(&metrics);
        let opened_at = SystemTime::now() - Duration::from_secs(5);
        let guard = streams.adopt(info(), opened_at, Arc::new(Fixed));
        let row = guard.stream().row();
        assert_eq!((row.path, row.bytes_to_upstream, row.bytes_to_downstream), ("packet", 100, 1000));
        assert!((5.0..60.0).contains(&row.age_seconds), "{}", row.age_seconds);
        streams.publish_bytes();
        assert_eq!(metrics.stream_bytes.with_label_values(&["sio", "to_upstream"]).get(), 0);
        assert_eq!(metrics.streams_opened.with_label_values(&["sio"]).get(), 0);
        assert_eq!(metrics.streams_adopted.with_label_values(&["sio"]).get(), 1);
        assert_eq!(metrics.streams.with_label_values(&["sio", "packet"]).get(), 1);
        drop(guard);
        assert_eq!(metrics.streams.with_label_values(&["sio", "packet"]).get(), 0);
    }

    #[test]
    fn bytes_of_kernel_and_userspace_add_up() {
        let metrics = Metrics::new();
        let streams = Streams::new(&metrics);
        let guard = streams.open(info());
        guard.stream().add_to_downstream(5);
        guard.stream().set_carrier(Arc::new(Fixed));
        assert_eq!(guard.stream().bytes(), [100, 1005]);
    }

    #[test]
    fn streams_are_found_by_their_endpoint() {
        let streams = Streams::new(&Metrics::new());
        let to = |port: u16| StreamInfo { endpoint: ([192, 0, 2, 9], port).into(), ..info() };
        let ids = |port: u16| -> Vec<_> {
            streams.of_endpoint(to(port).endpoint).iter().map(|stream| stream.id).collect()
        };
        let guards: Vec<_> = [3000, 3001, 3000].map(|port| streams.open(to(port))).into();
        assert_eq!((ids(3000), ids(3001), ids(3002)), (vec![1, 3], vec![2], vec![]));
        drop(guards);
        assert_eq!((ids(3000), ids(3001)), (vec![], vec![]));
        assert!(streams.lock().by_endpoint.is_empty(), "an endpoint without streams leaves nothing");
    }

    #[tokio::test]
    async fn whoever_asks_first_says_how_a_stream_ends() {
        let metrics = Metrics::new();
        let streams = Streams::new(&metrics);
        let guard = streams.open(info());
        assert_eq!(guard.stream().asked_end(), None);
        let task = tokio::spawn(async move {
            let end = guard.stream().end_asked().await;
            drop(guard);
            end
        });
        tokio::task::yield_now().await;
        let [stream] = &streams.of_endpoint(info().endpoint)[..] else { panic!("one stream") };
        stream.end(End::IdleTimeout);
        stream.end(End::NotCarried);
        assert_eq!(task.await.unwrap(), End::IdleTimeout);
        assert_eq!(metrics.streams_closed.with_label_values(&["sio", "idle_timeout"]).get(), 1);
    }

    #[test]
    fn a_carrier_without_a_task_is_told_that_its_stream_is_to_end() {
        #[derive(Debug, Default)]
        struct Told(std::sync::atomic::AtomicU32);
        impl Carrier for Told {
            fn carried(&self) -> [u64; 2] {
                [0; 2]
            }
            fn end_was_asked(&self) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let streams = Streams::new(&Metrics::new());
        let (guard, carrier) = (streams.open(info()), Arc::new(Told::default()));
        guard.stream().set_carrier(Arc::clone(&carrier) as _);
        guard.stream().end(End::Reset);
        assert_eq!(carrier.0.load(Ordering::Relaxed), 1);
    }
}
