//! The streams that only the kernel carries.

use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proxy_common::stat::Stat;
use steer_kernel::tcp::clock;
use steer_kernel::tcp::raw::Segment;

use super::life::{Life, Limits, Look, Step};
use super::owned_record::{Carried, OwnedRecord, RecordPool};
use crate::streams::End;
use crate::streams::StreamGuard;
use crate::streams::ports::Lease;

/// How many places a sweep looks at under one lock.
const BATCH: usize = 1024;

/// What userspace keeps of a stream.
#[derive(Debug)]
pub(super) struct SplicedStream {
    /// Dropped before the source port is given back, so that no packet of the port's next
    /// connection finds the record.
    record: OwnedRecord,
    /// `None` once the stream has ended.
    open: Option<Open>,
    life: Life,
    _source: Option<Lease>,
}

#[derive(Debug)]
struct Open {
    guard: StreamGuard,
    carried: Arc<Carried>,
}

impl Open {
    fn end(self, end: End) {
        self.carried.end();
        self.guard.ended(end);
    }
}

impl SplicedStream {
    pub(super) fn new(
        record: OwnedRecord,
        guard: StreamGuard,
        carried: Arc<Carried>,
        source: Option<Lease>,
    ) -> Self {
        let open = Some(Open { guard, carried });
        Self { record, open, life: Life::new(), _source: source }
    }

    /// A stream of an earlier process. Without `open`, the stream is over.
    pub(super) fn adopted(
        record: OwnedRecord,
        open: Option<(StreamGuard, Arc<Carried>)>,
        source: Option<Lease>,
        now_ns: u64,
    ) -> Self {
        let open = open.map(|(guard, carried)| Open { guard, carried });
        let life = Life::adopted(now_ns);
        Self { record, open, life, _source: source }
    }

    /// Takes all steps that are due. Slow work goes to `later`, to be done without the lock.
    fn look(&mut self, now_ns: u64, limits: &Limits, later: &mut Later<'_>) -> Keep {
        let asked = self.open.as_ref().and_then(|open| open.guard.stream().asked_end());
        let look = Look::from(&self.record.snapshot()).asked(asked);
        loop {
            match self.life.next(now_ns, &look, limits, self.record.index() as u8) {
                Step::Wait { until_ns } => return Keep::Until(until_ns),
                Step::Probe(direction) => later.segments.push(self.record.probe_segment(direction)),
                Step::Ended(end) => later.ended.extend(self.open.take().map(|open| (open, end))),
                Step::Abort(end) => {
                    if end == End::NotCarried {
                        self.record.note_unfit();
                    }
                    later.segments.extend(self.record.begin_abort());
                    later.ended.extend(self.open.take().map(|open| (open, end)));
                }
                Step::ResetAgain => later.segments.extend(self.record.begin_abort_again()),
                Step::Remove => return Keep::No,
            }
        }
    }

    /// Leaves the stream to another process, which has its record.
    fn leave(mut self) {
        if let Some(open) = self.open.take() {
            open.guard.left();
        }
    }

    /// Ends the stream with a RST to both peers, unless the stream has ended.
    fn abort(mut self) {
        if let Some(open) = self.open.take() {
            self.record.abort();
            open.end(End::Reset);
        }
    }
}

enum Keep {
    /// The stream has to be looked at again at this time, or when an event comes.
    Until(u64),
    No,
}

/// Work for which the table is not locked: log lines, metrics, system calls. Dropping this does the
/// work, so it is made before the table is locked.
struct Later<'a> {
    records: &'a RecordPool,
    segments: Vec<Segment>,
    ended: Vec<(Open, End)>,
    removed: Vec<SplicedStream>,
}

impl<'a> Later<'a> {
    fn new(records: &'a RecordPool) -> Self {
        Self { records, segments: Vec::new(), ended: Vec::new(), removed: Vec::new() }
    }
}

impl Drop for Later<'_> {
    fn drop(&mut self) {
        // Segments are sent before the keys of `removed` streams go.
        self.records.send(self.segments.drain(..));
        self.ended.drain(..).for_each(|(open, end)| open.end(end));
    }
}

/// All streams that only the kernel carries.
#[derive(Debug)]
pub(super) struct Table {
    streams: Mutex<Places>,
    records: Arc<RecordPool>,
    limits: Limits,
}

/// The streams, by index of the record.
#[derive(Debug, Default)]
struct Places {
    places: Vec<Place>,
    count: usize,
    /// The table takes no more streams.
    are_closed: bool,
    /// How many events were lost before the last sweep.
    lost_events: u64,
}

/// Small, since a sweep looks at all places.
#[derive(Debug, Default)]
struct Place {
    look_at_ns: u64,
    stream: Option<Box<SplicedStream>>,
}

impl Places {
    fn insert(&mut self, stream: SplicedStream) {
        let index = stream.record.index() as usize;
        if index >= self.places.len() {
            self.places.resize_with(index + 1, Place::default);
        }
        let before = self.places[index].stream.replace(Box::new(stream));
        debug_assert!(before.is_none(), "record {index} has two streams");
        self.count += 1;
    }

    /// Looks at the stream of a place, if there is one.
    fn look(&mut self, index: usize, now_ns: u64, limits: &Limits, later: &mut Later<'_>) {
        let place = &mut self.places[index];
        let Some(stream) = &mut place.stream else { return };
        match stream.look(now_ns, limits, later) {
            Keep::Until(look_at_ns) => place.look_at_ns = look_at_ns,
            Keep::No => {
                later.removed.extend(place.stream.take().map(|stream| *stream));
                self.count -= 1;
            }
        }
    }
}

impl Table {
    pub(super) fn new(records: Arc<RecordPool>, limits: Limits) -> Self {
        Self { streams: Mutex::default(), records, limits }
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    fn lock(&self) -> MutexGuard<'_, Places> {
        // Nothing panics while the lock is held.
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lock().count == 0
    }

    /// Adds a stream, whose events may have come already. With `ended`, the stream only lingers.
    pub(super) fn insert(&self, mut stream: SplicedStream, ended: Option<End>) {
        if let Some((open, end)) = stream.open.take_if(|_| ended.is_some()).zip(ended) {
            open.end(end);
        }
        let (record, generation) = (stream.record.index(), stream.record.generation);
        let mut streams = self.lock();
        if streams.are_closed {
            drop(streams);
            return if self.records.gate.is_closed() { stream.leave() } else { stream.abort() };
        }
        streams.insert(stream);
        drop(streams);
        self.examine(record, generation);
        self.records.changed.notify_one();
    }

    /// Looks at the stream of a record, if the record still has this generation.
    pub(super) fn examine(&self, record: u32, generation: u32) {
        let mut later = Later::new(&self.records);
        let mut streams = self.lock();
        let index = record as usize;
        let stream = streams.places.get(index).and_then(|place| place.stream.as_ref());
        if stream.is_some_and(|stream| stream.record.generation == generation) {
            streams.look(index, clock::monotonic_ns(), &self.limits, &mut later);
        }
        drop(streams);
    }

    /// Looks at the streams that these records have now.
    pub(super) fn examine_records(&self, records: &[u32]) {
        let mut later = Later::new(&self.records);
        let now_ns = clock::monotonic_ns();
        let mut streams = self.lock();
        for &record in records {
            if (record as usize) < streams.places.len() {
                streams.look(record as usize, now_ns, &self.limits, &mut later);
            }
        }
    }

    /// Looks at all streams whose time has come, or at every stream if an event was lost or may
    /// have been lost.
    pub(super) async fn sweep(&self, events_work: bool) {
        let all = self.has_lost_events() || !events_work;
        let mut from = 0;
        while self.sweep_batch(from, all) {
            from += BATCH;
            tokio::task::yield_now().await;
        }
    }

    /// Whether events were lost since the last call.
    fn has_lost_events(&self) -> bool {
        match self.records.kernel.stat(Stat::EventLost) {
            Ok(lost) => mem::replace(&mut self.lock().lost_events, lost) != lost,
            Err(error) => {
                tracing::debug!(%error, "cannot read how many events were lost");
                true
            }
        }
    }

    /// Looks at the batch of places that begins at `from`. Returns whether there are places after
    /// it.
    fn sweep_batch(&self, from: usize, all: bool) -> bool {
        let mut later = Later::new(&self.records);
        let now_ns = clock::monotonic_ns();
        let mut streams = self.lock();
        let len = streams.places.len();
        for index in from..len.min(from + BATCH) {
            if all || streams.places[index].look_at_ns <= now_ns {
                streams.look(index, now_ns, &self.limits, &mut later);
            }
        }
        drop(streams);
        from + BATCH < len
    }

    /// Ends all streams with a RST to both peers of each. Streams that are inserted later are
    /// ended, too.
    pub(super) fn end_all(&self) {
        self.close().for_each(|stream| stream.abort());
    }

    /// Leaves the streams to the kernel, and returns how many live. Streams that are inserted later
    /// are ended.
    pub(super) fn leave_all(&self) -> usize {
        let streams: Vec<_> = self.close().collect();
        let living = streams.iter().filter(|stream| stream.open.is_some()).count();
        if living > 0 {
            // Dropping a stream would remove its keys.
            streams.into_iter().for_each(mem::forget);
        }
        living
    }

    /// Leaves all streams, also those that are inserted later, to the process that the maps were
    /// given to. Returns how many live.
    pub(super) fn give_away(&self) -> usize {
        let streams: Vec<_> = self.close().collect();
        let living = streams.iter().filter(|stream| stream.open.is_some()).count();
        streams.into_iter().for_each(|stream| stream.leave());
        living
    }

    fn close(&self) -> impl Iterator<Item = Box<SplicedStream>> {
        let streams = mem::replace(&mut *self.lock(), Places { are_closed: true, ..Places::default() });
        streams.places.into_iter().filter_map(|place| place.stream)
    }
}
