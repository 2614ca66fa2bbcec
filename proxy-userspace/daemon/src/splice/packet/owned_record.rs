//! The owner of a record. As long as its [`OwnedRecord`] lives, a stream has its place in the
//! kernel's maps: a record, and the two keys that lead to the record.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use prometheus::IntGauge;
use proxy_common::flow::{DirLive, Direction, Flow, FlowRef, Record, bits, flags, state};
use proxy_common::reason::Reason;
use steer_kernel::bpf::packet::{Ends, FlowKey, PacketKernel, Records};
use steer_kernel::tcp::clock;
use steer_kernel::tcp::raw::{RawSender, Segment};
use tokio::sync::Notify;

use super::gate::Gate;
use super::segments;
use super::unfit::Unfit;
use crate::streams::Carrier;

/// What all records share: the kernel's maps, and the records that wait to be freed.
#[derive(Debug)]
pub(super) struct RecordPool {
    pub(super) kernel: PacketKernel,
    raw: RawSender,
    used: IntGauge,
    /// Records whose keys are removed. A program on another CPU may still use such a record.
    retired: Mutex<Vec<u32>>,
    /// Records of streams that were asked to end.
    asked: Mutex<Vec<u32>>,
    pub(super) changed: Notify,
    /// Once this is closed, another process owns the maps, and this process does not change them.
    pub(super) gate: Gate,
    pub(super) unfit: Unfit,
}

impl RecordPool {
    /// Keeps the gauge `used` at the number of records in use.
    pub(super) fn new(kernel: PacketKernel, used: IntGauge) -> io::Result<Arc<Self>> {
        let raw = RawSender::new()?;
        Ok(Arc::new(Self {
            kernel,
            raw,
            used,
            retired: Mutex::default(),
            asked: Mutex::default(),
            changed: Notify::new(),
            gate: Gate::default(),
            unfit: Unfit::default(),
        }))
    }

    /// Takes the records that were retired. The caller [frees](Self::free) them after a grace
    /// period.
    pub(super) fn take_retired(&self) -> Vec<u32> {
        std::mem::take(&mut *self.retired.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes the records of streams that were asked to end. A record may have another stream by
    /// now.
    pub(super) fn take_asked(&self) -> Vec<u32> {
        std::mem::take(&mut *self.asked.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn free(&self, retired: Vec<u32>) {
        retired.into_iter().for_each(|index| self.kernel.records().free(index));
        self.show_used();
    }

    pub(super) fn send(&self, segments: impl IntoIterator<Item = Segment>) {
        segments.into_iter().for_each(|segment| send(&self.raw, segment));
    }

    /// Brings the gauge up to date.
    pub(super) fn show_used(&self) {
        self.used.set(self.kernel.records().used().into());
    }
}

/// The record of one stream. Dropping this removes the keys and retires the record.
#[derive(Debug)]
pub(super) struct OwnedRecord {
    records: Arc<RecordPool>,
    index: u32,
    pub(super) generation: u32,
}

impl OwnedRecord {
    /// Writes the record and its keys. The programs ignore the record until it is
    /// [activated](Self::activate).
    pub(super) fn install(records: &Arc<RecordPool>, content: Record) -> Result<Self, Reason> {
        let kernel = &records.kernel;
        let index = kernel.records().allocate().ok_or(Reason::MapFull)?;
        let generation = kernel.records().prepare(index, content);
        records.show_used();
        let record = Self { records: Arc::clone(records), index, generation };
        for direction in Direction::BOTH {
            let (key, flow) = (FlowKey::of(&content, direction), FlowRef::new(index, direction));
            kernel.insert(&key, flow).map_err(|error| {
                tracing::debug!(error = &error as &dyn std::error::Error, "a stream cannot be spliced");
                error.reason()
            })?;
        }
        Ok(record)
    }

    /// The record of a stream of an earlier process. The record must be in use, and have no other
    /// owner.
    pub(super) fn adopt(records: &Arc<RecordPool>, index: u32) -> Self {
        let generation = records.kernel.records().snapshot(index).generation;
        Self { records: Arc::clone(records), index, generation }
    }

    pub(super) fn index(&self) -> u32 {
        self.index
    }

    /// Sets the [`ts_floor`](proxy_common::flow::DirFixed::ts_floor) of each direction. `offsets`:
    /// for each direction, the [`timestamp_offset`](steer_kernel::tcp::repair::timestamp_offset) of
    /// the connection on which its packets leave. To be called after the sockets are marked.
    ///
    /// No timestamp that the sockets have sent before this returns is above the floor. After that,
    /// and until the record is active, the egress program raises the floor to the timestamps that
    /// the sockets send. The floor is as little ahead of the clock as possible: a packet that was
    /// sent just before, and is overtaken, is refused only if its receiver would refuse it without
    /// a floor, too.
    pub(super) fn set_ts_floors(&self, offsets: [u32; 2]) {
        loop {
            let now = clock::monotonic_ms();
            for (direction, offset) in Direction::BOTH.into_iter().zip(offsets) {
                // The offset may be one too low. A floor of zero would mean no floor.
                let floor = (now as u32).wrapping_add(offset).wrapping_add(1);
                self.records.kernel.records().set_ts_floor(FlowRef::new(self.index, direction), floor.max(1));
            }
            // If the clock has moved on, a packet with a later timestamp may have left before the
            // floor was set.
            if clock::monotonic_ms() == now {
                return;
            }
        }
    }

    /// Makes the kernel forward the packets of the stream, in both directions, from now on.
    ///
    /// # Errors
    /// The local stack has accepted another connection with the same tuple, so the downstream
    /// connection of the stream is gone.
    pub(super) fn activate(&self) -> Result<(), Reason> {
        let activated = self.records.kernel.records().advance_state(self.index, state::OFF, state::HAND_OVER);
        activated.map_err(|_dead| Reason::NotEstablished)
    }

    pub(super) fn state(&self) -> u32 {
        self.records.kernel.records().state(self.index)
    }

    pub(super) fn snapshot(&self) -> Record {
        self.records.kernel.records().snapshot(self.index)
    }

    /// Makes the stream SPLICED: its sockets are not needed any more. Does nothing if the program
    /// has ended the stream already.
    pub(super) fn complete(&self) {
        self.records.kernel.records().advance_state(self.index, state::HAND_OVER, state::SPLICED).ok();
    }

    pub(super) fn add_flags(&self, flags: u32) {
        self.records.kernel.records().add_flags(self.index, flags);
    }

    /// See [`proxy_common::flow::DirLive::own_end`]. `from`: the direction from the peer to which
    /// the bytes go.
    pub(super) fn set_own_end(&self, from: Direction, end: u32) {
        self.records.kernel.records().set_own_end(FlowRef::new(self.index, from), end);
    }

    /// See [`proxy_common::flow::DirFixed::received`].
    pub(super) fn set_received(&self, from: Direction, end: u32) {
        self.records.kernel.records().set_received(FlowRef::new(self.index, from), end);
    }

    pub(super) fn note_fin(&self, from: Direction, end: u32) {
        self.records.kernel.records().note_fin(FlowRef::new(self.index, from), end);
    }

    /// Makes a living stream RESET, without a RST to its peers.
    pub(super) fn set_reset(&self) {
        set_reset(self.records.kernel.records(), self.index);
    }

    /// Ends the stream with a RST to both peers, unless a new connection has its tuple.
    pub(super) fn abort(&self) {
        self.records.send(self.begin_abort());
    }

    /// [`abort`](Self::abort) for a caller that sends the RSTs.
    pub(super) fn begin_abort(&self) -> Vec<Segment> {
        begin_abort(self.records.kernel.records(), self.index)
    }

    /// Notes each peer that has sent a packet that the program could not carry.
    pub(super) fn note_unfit(&self) {
        let content = self.snapshot();
        for from in Direction::BOTH {
            if content.flags & flags::not_carried(from) != 0 {
                self.records.unfit.note(Ends::of(&content, from).peer.ip());
            }
        }
    }

    /// See [`abort_again`]. The caller sends the RSTs.
    pub(super) fn begin_abort_again(&self) -> Vec<Segment> {
        begin_abort_again(self.records.kernel.records(), self.index)
    }

    /// Sends a keepalive probe to the peer that `from` comes from.
    pub(super) fn probe(&self, from: Direction) {
        self.records.send([self.probe_segment(from)]);
    }

    /// [`probe`](Self::probe) for a caller that sends the segment.
    pub(super) fn probe_segment(&self, from: Direction) -> Segment {
        segments::probe(&self.snapshot(), from)
    }

    /// Sends an acknowledgement to the peer that `from` comes from. The local socket has received
    /// all bytes of that peer before `received`.
    pub(super) fn acknowledge(&self, record: &Record, from: Direction, received: u32) {
        self.records.send([segments::acknowledgement(record, from, received)]);
    }
}

/// See [`OwnedRecord::abort`].
pub(super) fn abort(records: &Records, raw: &RawSender, index: u32) {
    begin_abort(records, index).into_iter().for_each(|segment| send(raw, segment));
}

fn begin_abort(records: &Records, index: u32) -> Vec<Segment> {
    // The state comes first: the egress program drops each RST of this host for a living stream.
    set_reset(records, index);
    if records.state(index) == state::DEAD {
        return Vec::new();
    }
    let record = records.snapshot(index);
    Direction::BOTH.into_iter().flat_map(|from| segments::resets(&record, from)).collect()
}

/// Repeats [`abort`]. To be called when the packets that were under way have arrived: then the
/// record has the numbers that the peers expect. From now on the local stack answers a peer that
/// still sends packets.
pub(super) fn abort_again(records: &Records, raw: &RawSender, index: u32) {
    begin_abort_again(records, index).into_iter().for_each(|segment| send(raw, segment));
}

fn begin_abort_again(records: &Records, index: u32) -> Vec<Segment> {
    records.add_flags(index, flags::GIVEN_UP);
    begin_abort(records, index)
}

fn set_reset(records: &Records, index: u32) {
    for living in [state::HAND_OVER, state::SPLICED] {
        // A stream that has already ended is in neither state, so its state stays.
        records.advance_state(index, living, state::RESET).ok();
    }
}

fn send(raw: &RawSender, segment: Segment) {
    if let Err(error) = raw.send(segment) {
        tracing::debug!(%error, peer = %segment.destination, "cannot send a segment");
    }
}

impl Drop for OwnedRecord {
    fn drop(&mut self) {
        let Ok(_kept) = self.records.gate.keep() else { return };
        let content = self.snapshot();
        for direction in Direction::BOTH {
            let (key, flow) = (FlowKey::of(&content, direction), FlowRef::new(self.index, direction));
            self.records.kernel.remove(&key, flow);
        }
        self.records.retired.lock().unwrap_or_else(PoisonError::into_inner).push(self.index);
        self.records.changed.notify_one();
    }
}

/// Counts the payload that the kernel has forwarded for a stream.
#[derive(Debug)]
pub(super) struct Carried {
    records: Arc<RecordPool>,
    index: u32,
    /// By direction, in arrival space: one past the last byte that goes through the sockets.
    /// `None`: the record alone has all bytes of the stream.
    begin: Option<[AtomicU32; 2]>,
    /// The final counts, set before the record is retired.
    ended: OnceLock<[u64; 2]>,
}

impl Carried {
    pub(super) fn new(record: &OwnedRecord, begin: [u32; 2]) -> Arc<Self> {
        let (records, index) = (Arc::clone(&record.records), record.index);
        Arc::new(Self { records, index, begin: Some(begin.map(AtomicU32::new)), ended: OnceLock::new() })
    }

    /// Counts all payload of a stream of an earlier process. The record has the whole count.
    pub(super) fn of_record(record: &OwnedRecord) -> Arc<Self> {
        let (records, index) = (Arc::clone(&record.records), record.index);
        Arc::new(Self { records, index, begin: None, ended: OnceLock::new() })
    }

    /// To be called when the sockets are not needed any more. `begin`: one past the last byte that
    /// went through the sockets. `relayed`: the payload bytes that userspace has moved. From now on
    /// the record alone, too, has all bytes of the stream.
    pub(super) fn begin_at(&self, begin: [u32; 2], relayed: [u64; 2]) {
        for (place, begin) in self.begin.iter().flatten().zip(begin) {
            place.store(begin, Ordering::Relaxed);
        }
        let flows = self.quiet_look();
        let records = self.records.kernel.records();
        records.set_relayed(
            self.index,
            Direction::BOTH.map(|direction| {
                let direction = direction as usize;
                let live = &flows[direction].live;
                relayed[direction].wrapping_add_signed(uncounted(begin[direction], live).into())
            }),
        );
    }

    /// Reads both flows at a moment without packets in between, if there is such a moment in a few
    /// looks.
    fn quiet_look(&self) -> [Flow; 2] {
        const LOOKS: usize = 16;
        let look = || self.records.kernel.records().snapshot(self.index).flows;
        let mut flows = look();
        for _ in 0..LOOKS {
            let before = std::mem::replace(&mut flows, look());
            let counts = |flows: &[Flow; 2]| flows.map(|flow| (flow.live.bytes, flow.live.seq_end));
            if counts(&before) == counts(&flows) {
                break;
            }
        }
        flows
    }

    pub(super) fn end(&self) {
        self.ended.get_or_init(|| self.now());
    }

    fn now(&self) -> [u64; 2] {
        let record = self.records.kernel.records().snapshot(self.index);
        Direction::BOTH.map(|direction| {
            let direction = direction as usize;
            let live = &record.flows[direction].live;
            match &self.begin {
                Some(begin) => bytes_since(begin[direction].load(Ordering::Relaxed), live),
                None => record.relayed[direction].wrapping_add(live.bytes),
            }
        })
    }
}

impl Carrier for Carried {
    fn carried(&self) -> [u64; 2] {
        self.ended.get().copied().unwrap_or_else(|| self.now())
    }

    /// Makes the reaper look at the stream. During a hand-over, the task of the stream does that
    /// itself.
    fn end_was_asked(&self) {
        self.records.asked.lock().unwrap_or_else(PoisonError::into_inner).push(self.index);
        self.records.changed.notify_one();
    }
}

/// Payload bytes after `begin`.
fn bytes_since(begin: u32, live: &DirLive) -> u64 {
    live.bytes.saturating_add_signed(uncounted(begin, live).into())
}

/// How many bytes to add to the program's count, to get the bytes after `begin`. The two differ by
/// the bytes that went through the sockets during the hand-over, but only the program's count knows
/// how often the sequence numbers have wrapped. The result may take off more than the program has
/// counted: the program may still have to see the last bytes that went through the sockets.
fn uncounted(begin: u32, live: &DirLive) -> i32 {
    let has_fin = live.bits & bits::FIN_SEEN != 0 && live.seq_end == live.fin_end;
    let modulo = live.seq_end.wrapping_sub(begin).wrapping_sub(has_fin.into());
    // The number with these lower 32 bits that is nearest to the program's count.
    modulo.wrapping_sub(live.bytes as u32).cast_signed()
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;

    use super::*;

    #[test]
    fn bytes_are_told_by_sequence_numbers_and_wraps_by_the_count() {
        let live = |seq_end, bytes| DirLive { seq_end, bytes, ..DirLive::zeroed() };
        assert_eq!(bytes_since(1000, &live(1500, 500)), 500);
        // The program has counted 200 bytes that went through the socket, or has not seen all of
        // them.
        assert_eq!(bytes_since(1000, &live(1500, 700)), 500);
        assert_eq!(bytes_since(1000, &live(900, 0)), 0);
        // The program will still count these 100 bytes, which must not count twice.
        assert_eq!(uncounted(1000, &live(900, 0)), -100);
        assert_eq!(bytes_since(u32::MAX - 99, &live(400, 600)), 500);
        assert_eq!(bytes_since(1000, &live(1500, 500 + (3 << 32))), 500 + (3 << 32));
        assert_eq!(bytes_since(1000, &live(900, (3_u64 << 32) - 90)), (3 << 32) - 100);
    }

    #[test]
    fn a_fin_is_not_payload() {
        let mut live =
            DirLive { seq_end: 1501, fin_end: 1501, bits: bits::FIN_SEEN, bytes: 500, ..DirLive::zeroed() };
        assert_eq!(bytes_since(1000, &live), 500);
        // The FIN came to the socket.
        live.bytes = 0;
        assert_eq!(bytes_since(1501, &live), 0);
    }
}
