//! One live stream: who has it, what carries it, how many bytes it has moved; and how to end it.

use std::fmt;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::{Duration, SystemTime};

use atomic_waker::AtomicWaker;
use proxy_common::reason::Reason;
use steer_kernel::bpf::packet::cluster::name_hash;
use steer_kernel::tcp::clock;
use strum::VariantArray as _;

use super::{End, Path, Row};

/// What is known of a stream when it is opened.
#[derive(Debug, Clone)]
pub struct StreamInfo {
    /// The peer of the downstream connection.
    pub client: SocketAddr,
    pub cluster: Arc<str>,
    pub endpoint: SocketAddr,
    /// `None`: there was no hash key and the endpoint was chosen at random.
    pub key_hash: Option<u64>,
}

/// What carries a stream, or a part of it, outside of userspace.
pub trait Carrier: fmt::Debug + Send + Sync {
    /// Payload bytes carried so far, `[to upstream, to downstream]`: asked when somebody looks, and once at the end.
    fn carried(&self) -> [u64; 2];

    /// Somebody [asked](Stream::end) to end the stream. To be told is of use to a carrier whose streams have no task.
    fn end_was_asked(&self) {}
}

/// One live stream. Whoever holds it can look at it and ask to end it; the stream itself ends with its
/// [guard](super::StreamGuard).
#[derive(Debug)]
pub struct Stream {
    /// Grows from stream to stream of a process.
    pub id: u64,
    pub info: StreamInfo,
    /// On [`clock::monotonic_ns`]; smaller than an [`Instant`](std::time::Instant).
    opened_ns: u64,
    opened_unix_ns: u64,
    path: AtomicU8,
    /// The position in [`End::VARIANTS`], counted from 1, of how somebody wants it ended; 0: nobody does.
    asked: AtomicU8,
    /// [`Reason::number`]; 0 = none.
    reason: AtomicU32,
    /// Payload bytes moved by userspace.
    to_upstream: AtomicU64,
    to_downstream: AtomicU64,
    carrier: OnceLock<Arc<dyn Carrier>>,
    /// Of the task that carries it.
    waker: AtomicWaker,
    /// How much of [`Self::bytes`] the metric has been told of.
    pub(super) published: [AtomicU64; 2],
}

impl Stream {
    /// `opened_at` may be before this process.
    pub(super) fn new(id: u64, info: StreamInfo, opened_at: SystemTime, path: Path) -> Self {
        let age = opened_at.elapsed().unwrap_or_default();
        let since_epoch = opened_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self {
            id,
            info,
            opened_ns: clock::monotonic_ns().saturating_sub(nanoseconds(age)),
            opened_unix_ns: nanoseconds(since_epoch),
            path: AtomicU8::new(index_of(path)),
            asked: AtomicU8::new(0),
            reason: AtomicU32::new(0),
            to_upstream: AtomicU64::new(0),
            to_downstream: AtomicU64::new(0),
            carrier: OnceLock::new(),
            waker: AtomicWaker::new(),
            published: Default::default(),
        }
    }

    pub fn add_to_upstream(&self, bytes: u64) {
        self.to_upstream.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn add_to_downstream(&self, bytes: u64) {
        self.to_downstream.fetch_add(bytes, Ordering::Relaxed);
    }

    /// From now on [`Self::bytes`] adds the carrier's bytes to those of userspace. Only the first call
    /// has an effect.
    pub fn set_carrier(&self, carrier: Arc<dyn Carrier>) {
        // An error says that the stream has a carrier already.
        self.carrier.set(carrier).ok();
    }

    /// Asks the task or the carrier of the stream to end the stream at once, with a RST to both peers. The
    /// call returns before the stream has ended. The first call decides how the end is counted.
    pub fn end(&self, how: End) {
        // The exchange fails if an earlier call has set the end.
        self.asked.compare_exchange(0, how as u8 + 1, Ordering::SeqCst, Ordering::SeqCst).ok();
        // Pairs with the fence in `asked_end`. Either this call sees a carrier that is being set, or
        // the table sees `asked` when it takes the stream over.
        fence(Ordering::SeqCst);
        self.waker.wake();
        if let Some(carrier) = self.carrier.get() {
            carrier.end_was_asked();
        }
    }

    /// The end that [`Self::end`] asked for, if there was a call.
    pub fn asked_end(&self) -> Option<End> {
        fence(Ordering::SeqCst);
        let position = usize::from(self.asked.load(Ordering::SeqCst)).checked_sub(1)?;
        End::VARIANTS.get(position).copied()
    }

    /// Waits for a call of [`Self::end`]. Only one task may wait.
    pub async fn end_asked(&self) -> End {
        let _forget = Forget(&self.waker);
        poll_fn(|cx| {
            if let Some(end) = self.asked_end() {
                return Poll::Ready(end);
            }
            self.waker.register(cx.waker());
            // A call before the waker was registered has woken nobody.
            self.asked_end().map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    pub fn path(&self) -> Path {
        Path::VARIANTS[usize::from(self.path.load(Ordering::Relaxed))]
    }

    /// Returns the path before.
    pub(super) fn set_path(&self, path: Path) -> Path {
        Path::VARIANTS[usize::from(self.path.swap(index_of(path), Ordering::Relaxed))]
    }

    /// When the stream was opened.
    pub fn opened_unix_ms(&self) -> u64 {
        self.opened_unix_ns / 1_000_000
    }

    pub fn age(&self) -> Duration {
        Duration::from_nanos(clock::monotonic_ns().saturating_sub(self.opened_ns))
    }

    /// Why the stream is not on a better path, or not all of it; `None` also while it is not decided.
    pub fn reason(&self) -> Option<Reason> {
        let number = self.reason.load(Ordering::Relaxed);
        Reason::ALL.iter().copied().find(|reason| reason.number() == number)
    }

    pub(super) fn set_reason(&self, reason: Reason) {
        self.reason.store(reason.number(), Ordering::Relaxed);
    }

    /// `[to upstream, to downstream]`
    pub fn bytes(&self) -> [u64; 2] {
        let carried = self.carrier.get().map_or([0, 0], |carrier| carrier.carried());
        let relayed = self.relayed();
        [relayed[0] + carried[0], relayed[1] + carried[1]]
    }

    /// Those of [`Self::bytes`] that userspace moved.
    pub fn relayed(&self) -> [u64; 2] {
        [self.to_upstream.load(Ordering::Relaxed), self.to_downstream.load(Ordering::Relaxed)]
    }

    pub fn row(&self) -> Row {
        let [bytes_to_upstream, bytes_to_downstream] = self.bytes();
        Row {
            id: Some(self.id),
            client: self.info.client,
            listener: None,
            source: None,
            endpoint: self.info.endpoint,
            cluster: Some(self.info.cluster.to_string()),
            cluster_hash: name_hash(&self.info.cluster),
            key_hash: self.info.key_hash,
            path: self.path().into_str(),
            reason: self.reason().map(Reason::as_str),
            state: None,
            opened_unix_seconds: Duration::from_nanos(self.opened_unix_ns).as_secs_f64(),
            age_seconds: self.age().as_secs_f64(),
            idle_seconds: None,
            bytes_to_upstream,
            bytes_to_downstream,
            packets_to_upstream: None,
            packets_to_downstream: None,
        }
    }
}

/// Enough for 584 years.
fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Takes the waker back when the wait is over. A waker keeps the memory of its task (some KiB), and a
/// spliced stream outlives the task.
struct Forget<'a>(&'a AtomicWaker);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.0.take();
    }
}

fn index_of(path: Path) -> u8 {
    // The discriminants are the positions in `Path::VARIANTS`.
    path as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_ends_are_indexed_by_discriminant() {
        assert!(Path::VARIANTS.iter().zip(0..).all(|(&path, position)| index_of(path) == position));
        assert!(End::VARIANTS.iter().zip(0..).all(|(&end, position)| end as u8 == position));
    }

    #[test]
    fn a_stream_is_small() {
        // With the counts of an `Arc` the next size classes of jemalloc are 224 and 256 bytes.
        assert!(size_of::<Stream>() <= 208, "{} bytes", size_of::<Stream>());
    }

    #[tokio::test]
    async fn a_stream_does_not_keep_the_task_that_has_waited_for_its_end() {
        let address = ([192, 0, 2, 1], 1).into();
        let info = StreamInfo { client: address, cluster: "sio".into(), endpoint: address, key_hash: None };
        let stream = Stream::new(1, info, SystemTime::now(), Path::Relay);
        let asked = tokio::time::timeout(Duration::from_millis(1), stream.end_asked()).await;
        assert!(asked.is_err(), "nobody asks");
        assert!(stream.waker.take().is_none());
    }
}
