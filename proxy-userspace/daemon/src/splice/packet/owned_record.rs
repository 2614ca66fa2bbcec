//! The owner of a record: a stream has its place in the kernel's maps, a record and the two keys that lead to it, for as long as its
//! [`OwnedRecord`] lives.

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

/// The kernel's part, and the records that wait to be used again.
#[derive(Debug)]
pub(super) struct RecordPool {
    pub(super) kernel: PacketKernel,
    raw: RawSender,
    used: IntGauge,
    /// Without keys, but perhaps still seen by a program on another CPU.
    retired: Mutex<Vec<u32>>,
    /// Records of streams that somebody wants to end.
    asked: Mutex<Vec<u32>>,
    pub(super) changed: Notify,
    /// Closed: another process has the maps now, and those who are left here leave them as they are.
    pub(super) gate: Gate,
    pub(super) unfit: Unfit,
}

impl RecordPool {
    /// `used` is kept at the number of records in use.
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

    /// Records that were given up; to be [freed](Self::free) after a grace period.
    pub(super) fn take_retired(&self) -> Vec<u32> {
        std::mem::take(&mut *self.retired.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Records whose streams somebody wants to end. By the time they are looked at they may have other streams.
    pub(super) fn take_asked(&self) -> Vec<u32> {
        std::mem::take(&mut *self.asked.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn free(&self, retired: Vec<u32>) {
        retired.into_iter().for_each(|index| self.kernel.records().free(index));
        self.show_used();
    }

    /// Brings the gauge up to date.
    pub(super) fn show_used(&self) {
        self.used.set(self.kernel.records().used().into());
    }
}

/// One stream's record; dropping it takes the keys out and retires the record.
#[derive(Debug)]
pub(super) struct OwnedRecord {
    records: Arc<RecordPool>,
    index: u32,
    pub(super) generation: u32,
}

impl OwnedRecord {
    /// Writes the record and its keys. Packets pass it by until its [state](Self::activate) changes.
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

    /// The record of an earlier process's stream; it must be in use, and have no other owner.
    pub(super) fn adopt(records: &Arc<RecordPool>, index: u32) -> Self {
        let generation = records.kernel.records().snapshot(index).generation;
        Self { records: Arc::clone(records), index, generation }
    }

    pub(super) fn index(&self) -> u32 {
        self.index
    }

    /// Sets [`proxy_common::flow::DirFixed::ts_floor`] of each direction, whose packets leave on a connection with this
    /// [`timestamp_offset`](steer_kernel::tcp::repair::timestamp_offset). To be called when the sockets are marked: nothing that
    /// they have sent until this returns goes beyond the floor, and the egress program raises the floor to what they send until the
    /// record is active. The floor is not further ahead of the clock than need be: what was sent just before it was set, and is
    /// overtaken, is refused then as it would be without it.
    pub(super) fn set_ts_floors(&self, offsets: [u32; 2]) {
        loop {
            let now = clock::monotonic_ms();
            for (direction, offset) in Direction::BOTH.into_iter().zip(offsets) {
                // The offset may be one too low, and zero is no floor.
                let floor = (now as u32).wrapping_add(offset).wrapping_add(1);
                self.records.kernel.records().set_ts_floor(FlowRef::new(self.index, direction), floor.max(1));
            }
            // Otherwise a later packet may have left that did not know of the floor.
            if clock::monotonic_ms() == now {
                return;
            }
        }
    }

    /// From now on the kernel forwards the stream's packets, in both directions.
    ///
    /// # Errors
    /// The local stack has accepted another connection with the tuple, so the stream's downstream connection is gone.
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

    /// The sockets are done with, unless the program has gone further already.
    pub(super) fn complete(&self) {
        self.records.kernel.records().advance_state(self.index, state::HAND_OVER, state::SPLICED).ok();
    }

    pub(super) fn add_flags(&self, flags: u32) {
        self.records.kernel.records().add_flags(self.index, flags);
    }

    /// See [`proxy_common::flow::DirLive::own_end`]; `from` is the direction from the peer that is given the bytes.
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

    /// Takes a living stream for reset; its peers are not told.
    pub(super) fn set_reset(&self) {
        set_reset(self.records.kernel.records(), self.index);
    }

    /// Ends the stream, unless a new connection has its tuple: a RST for each peer.
    pub(super) fn abort(&self) {
        abort(self.records.kernel.records(), &self.records.raw, self.index);
    }

    /// Remembers the peers of whom the program could not carry a packet.
    pub(super) fn note_unfit(&self) {
        let content = self.snapshot();
        for from in Direction::BOTH {
            if content.flags & flags::not_carried(from) != 0 {
                self.records.unfit.note(Ends::of(&content, from).peer.ip());
            }
        }
    }

    /// See [`abort_again`].
    pub(super) fn abort_again(&self) {
        abort_again(self.records.kernel.records(), &self.records.raw, self.index);
    }

    /// Asks the peer that `from` comes from whether it is there.
    pub(super) fn probe(&self, from: Direction) {
        self.send(segments::probe(&self.snapshot(), from));
    }

    /// Tells the peer that `from` comes from, whose socket has received everything up to `received`, what is acknowledged.
    pub(super) fn acknowledge(&self, record: &Record, from: Direction, received: u32) {
        self.send(segments::acknowledgement(record, from, received));
    }

    fn send(&self, segment: Segment) {
        send(&self.records.raw, segment);
    }
}

/// See [`OwnedRecord::abort`].
pub(super) fn abort(records: &Records, raw: &RawSender, index: u32) {
    // First, since the egress program lets no RST of this host through to the peers of a living stream.
    set_reset(records, index);
    if records.state(index) == state::DEAD {
        return;
    }
    let record = records.snapshot(index);
    for segment in Direction::BOTH.into_iter().flat_map(|from| segments::resets(&record, from)) {
        send(raw, segment);
    }
}

/// To be called some time after [`abort`], when what was under way has arrived, and the record knows of it: the same once more,
/// with the numbers that are right now. A peer that goes on all the same is answered by the local stack from then on.
pub(super) fn abort_again(records: &Records, raw: &RawSender, index: u32) {
    records.add_flags(index, flags::GIVEN_UP);
    abort(records, raw, index);
}

fn set_reset(records: &Records, index: u32) {
    for living in [state::HAND_OVER, state::SPLICED] {
        // A stream that has ended already is in neither state, and stays as it is.
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

/// The payload that the kernel has forwarded for a stream.
#[derive(Debug)]
pub(super) struct Carried {
    records: Arc<RecordPool>,
    index: u32,
    /// By direction, in arrival space: one past what came, or will come, by way of the sockets. `None`: the record says
    /// what came before, too.
    begin: Option<[AtomicU32; 2]>,
    /// Set before the record goes.
    ended: OnceLock<[u64; 2]>,
}

impl Carried {
    pub(super) fn new(record: &OwnedRecord, begin: [u32; 2]) -> Arc<Self> {
        let (records, index) = (Arc::clone(&record.records), record.index);
        Arc::new(Self { records, index, begin: Some(begin.map(AtomicU32::new)), ended: OnceLock::new() })
    }

    /// All payload of a stream of an earlier process, which is what its record tells.
    pub(super) fn of_record(record: &OwnedRecord) -> Arc<Self> {
        let (records, index) = (Arc::clone(&record.records), record.index);
        Arc::new(Self { records, index, begin: None, ended: OnceLock::new() })
    }

    /// The sockets are gone: `begin` is where they got to, `relayed` the payload that userspace has moved. From now on the
    /// record alone tells the stream's bytes, too.
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

    /// A look at which no packet came in between, if there is one.
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

    /// The reaper looks at the stream, if that is all that looks after it.
    fn end_was_asked(&self) {
        self.records.asked.lock().unwrap_or_else(PoisonError::into_inner).push(self.index);
        self.records.changed.notify_one();
    }
}

/// Payload bytes after `begin`.
fn bytes_since(begin: u32, live: &DirLive) -> u64 {
    live.bytes.saturating_add_signed(uncounted(begin, live).into())
}

/// By how many bytes the program's own count differs from those after `begin`: it does by what came during the hand-over to the
/// sockets, but tells how often the sequence numbers have wrapped. More are to be taken off than were counted if what
/// went by the sockets last is still to be noticed by the program.
fn uncounted(begin: u32, live: &DirLive) -> i32 {
    let has_fin = live.bits & bits::FIN_SEEN != 0 && live.seq_end == live.fin_end;
    let modulo = live.seq_end.wrapping_sub(begin).wrapping_sub(has_fin.into());
    // The number nearest to the program's that has these lower bits.
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
        // The program has counted 200 that had come to the socket; or has not seen all that had.
        assert_eq!(bytes_since(1000, &live(1500, 700)), 500);
        assert_eq!(bytes_since(1000, &live(900, 0)), 0);
        // But the hundred will be counted, and must not be twice.
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
        // It came to the socket.
        live.bytes = 0;
        assert_eq!(bytes_since(1501, &live), 0);
    }
}
