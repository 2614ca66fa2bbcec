//! The streams that only the kernel carries.

use std::collections::BTreeMap;
use std::mem;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proxy_common::flow::state;

use super::life::{Life, Limits, Look, Step};
use super::record::{Carried, Record, Records};
use crate::kernel::clock;
use crate::splice::End;
use crate::telemetry::flows::FlowGuard;
use crate::upstream::ports::Lease;

/// Streams that are looked at under one lock.
const BATCH: usize = 256;

/// What userspace keeps of a stream.
#[derive(Debug)]
pub(super) struct Stream {
    /// Dropped before the port is given back, so that no packet of the port's next connection meets it.
    record: Record,
    /// `None` once the stream has ended.
    open: Option<Open>,
    life: Life,
    /// The state of the record when it was last looked at closely, and when it has to be again.
    state: u32,
    look_at_ns: u64,
    _source: Option<Lease>,
}

#[derive(Debug)]
struct Open {
    flow: FlowGuard,
    carried: Arc<Carried>,
}

impl Open {
    fn end(self, end: End) {
        self.carried.end();
        self.flow.ended(end);
    }
}

impl Stream {
    pub(super) fn new(record: Record, flow: FlowGuard, carried: Arc<Carried>, source: Option<Lease>) -> Self {
        let open = Some(Open { flow, carried });
        Self { record, open, life: Life::new(), state: state::SPLICED, look_at_ns: 0, _source: source }
    }

    /// A stream of an earlier process; without `open` it is over.
    pub(super) fn adopted(
        record: Record,
        open: Option<(FlowGuard, Arc<Carried>)>,
        source: Option<Lease>,
        now_ns: u64,
    ) -> Self {
        let open = open.map(|(flow, carried)| Open { flow, carried });
        let life = Life::adopted(now_ns);
        Self { record, open, life, state: state::SPLICED, look_at_ns: 0, _source: source }
    }

    /// Takes what steps there are to be taken. What goes slowly is left for after the lock.
    fn look(&mut self, now_ns: u64, limits: &Limits, later: &mut Later) -> Keep {
        let state = self.record.state();
        // One cache line for most of the streams, most of the time.
        if state == self.state && now_ns < self.look_at_ns {
            return Keep::Yes;
        }
        self.state = state;
        let look = Look::from(&self.record.snapshot());
        loop {
            match self.life.next(now_ns, &look, limits, self.record.conn() as u8) {
                Step::Wait { until_ns } => {
                    self.look_at_ns = until_ns;
                    return Keep::Yes;
                }
                Step::Probe(direction) => self.record.probe(direction),
                Step::Ended(end) => later.ended.extend(self.open.take().map(|open| (open, end))),
                Step::Abort(end) => {
                    self.record.abort();
                    later.ended.extend(self.open.take().map(|open| (open, end)));
                }
                Step::ResetAgain => self.record.abort(),
                Step::Remove => return Keep::No,
            }
        }
    }

    /// Ends it, unless it has ended, with a RST to both peers.
    fn abort(mut self) {
        if let Some(open) = self.open.take() {
            self.record.abort();
            open.end(End::Reset);
        }
    }
}

#[derive(PartialEq, Eq)]
enum Keep {
    Yes,
    No,
}

/// What is finished when the table is unlocked: log lines, metrics, system calls.
#[derive(Default)]
struct Later {
    ended: Vec<(Open, End)>,
    removed: Vec<Stream>,
}

impl Drop for Later {
    fn drop(&mut self) {
        self.ended.drain(..).for_each(|(open, end)| open.end(end));
    }
}

/// By index of the record, which is the order in memory of what a sweep reads.
#[derive(Debug)]
pub(super) struct Table {
    streams: Mutex<BTreeMap<u32, Stream>>,
    /// No stream is taken over any more. Written under the lock.
    is_closed: AtomicBool,
    records: Arc<Records>,
    limits: Limits,
}

impl Table {
    pub(super) fn new(records: Arc<Records>, limits: Limits) -> Self {
        Self { streams: Mutex::default(), is_closed: AtomicBool::new(false), records, limits }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Stream>> {
        // Nothing panics while it is held.
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Takes a stream over. Its events may have come already. With `ended`, it only lingers.
    pub(super) fn insert(&self, mut stream: Stream, ended: Option<End>) {
        if let Some((open, end)) = stream.open.take_if(|_| ended.is_some()).zip(ended) {
            open.end(end);
        }
        let (conn, generation) = (stream.record.conn(), stream.record.generation);
        let mut streams = self.lock();
        if self.is_closed.load(Ordering::Relaxed) {
            drop(streams);
            return stream.abort();
        }
        streams.insert(conn, stream);
        drop(streams);
        self.examine(conn, generation);
        self.records.changed.notify_one();
    }

    /// Looks at one stream, if it is still the one that is meant.
    pub(super) fn examine(&self, conn: u32, generation: u32) {
        let mut later = Later::default();
        let mut streams = self.lock();
        let Some(stream) = streams.get_mut(&conn).filter(|stream| stream.record.generation == generation)
        else {
            return;
        };
        if stream.look(clock::monotonic_ns(), &self.limits, &mut later) == Keep::No {
            later.removed.extend(streams.remove(&conn));
        }
        drop(streams);
    }

    /// Looks at all streams.
    pub(super) async fn sweep(&self) {
        let mut after = Bound::Unbounded;
        while let Some(last) = self.sweep_batch(after) {
            after = Bound::Excluded(last);
            tokio::task::yield_now().await;
        }
    }

    /// Returns the last one that was looked at; `None` when there was none.
    fn sweep_batch(&self, after: Bound<u32>) -> Option<u32> {
        let mut later = Later::default();
        let now_ns = clock::monotonic_ns();
        let mut streams = self.lock();
        let (mut last, mut gone) = (None, Vec::new());
        for (conn, stream) in streams.range_mut((after, Bound::Unbounded)).take(BATCH) {
            last = Some(*conn);
            if stream.look(now_ns, &self.limits, &mut later) == Keep::No {
                gone.push(*conn);
            }
        }
        later.removed.extend(gone.into_iter().filter_map(|conn| streams.remove(&conn)));
        drop(streams);
        last
    }

    /// Ends all streams, with a RST to both peers of each, and those that come later.
    pub(super) fn end_all(&self) {
        self.close().into_values().for_each(Stream::abort);
    }

    /// Leaves the streams to the kernel, and returns how many live; those that come later are ended.
    pub(super) fn leave_all(&self) -> usize {
        let streams = self.close();
        let living = streams.values().filter(|stream| stream.open.is_some()).count();
        if living > 0 {
            // To drop a stream is to take its keys out.
            streams.into_values().for_each(mem::forget);
        }
        living
    }

    fn close(&self) -> BTreeMap<u32, Stream> {
        let mut streams = self.lock();
        self.is_closed.store(true, Ordering::Relaxed);
        mem::take(&mut *streams)
    }
}
