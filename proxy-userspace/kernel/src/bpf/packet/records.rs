//! The connection records: the map `STEER_CONNS`, mapped into memory, and which of them are free.

use std::collections::VecDeque;
use std::io;
use std::mem::offset_of;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use proxy_common::flow::{DirFixed, DirLive, Flow, FlowRef, Record, bits, state};

use super::mapped::{MappedRecords, Words};

/// All records, and which of them are free. Methods panic if there is no record with the index.
#[derive(Debug)]
pub struct Records {
    memory: MappedRecords,
    free: Mutex<Free>,
}

/// First in, first out: a record rests as long as possible, so that late events of its last stream
/// find it unused.
#[derive(Debug)]
struct Free {
    queue: VecDeque<u32>,
    is_used: Vec<bool>,
}

impl Records {
    /// Maps the array `map`, which must have been made with BPF_F_MMAPABLE (Linux 5.5) for
    /// `capacity` records. All of them are free.
    pub(super) fn map(map: BorrowedFd<'_>, capacity: u32) -> io::Result<Self> {
        let memory = MappedRecords::map(map, capacity)?;
        let free = Free { queue: (0..capacity).collect(), is_used: vec![false; capacity as usize] };
        Ok(Self { memory, free: Mutex::new(free) })
    }

    /// Like [`map`](Self::map), for an array that another process has used: records that are not
    /// OFF are in use.
    pub(super) fn map_used(map: BorrowedFd<'_>, capacity: u32) -> io::Result<Self> {
        let records = Self::map(map, capacity)?;
        records.find_used();
        Ok(records)
    }

    /// Marks the records that are not OFF now as used.
    pub(super) fn find_used(&self) {
        let is_used: Vec<_> = (0..self.capacity()).map(|index| self.state(index) != state::OFF).collect();
        let queue = (0..self.capacity()).filter(|index| !is_used[*index as usize]).collect();
        *self.free_list() = Free { queue, is_used };
    }

    /// Takes a record, whose state is OFF; `None` if all are in use.
    pub fn allocate(&self) -> Option<u32> {
        let mut free = self.free_list();
        let index = free.queue.pop_front()?;
        free.is_used[index as usize] = true;
        Some(index)
    }

    /// Frees a record, whose state becomes OFF. The keys of the record must be gone from the flow
    /// maps, and a grace period must have passed since then: until then a program on another CPU
    /// may still write to the record.
    pub fn free(&self, index: u32) {
        self.set_state(index, state::OFF);
        let mut free = self.free_list();
        // A record that is in the queue twice would belong to two streams later.
        if std::mem::replace(&mut free.is_used[index as usize], false) {
            free.queue.push_back(index);
        } else {
            debug_assert!(false, "record {index} was freed twice");
        }
    }

    /// The records that are in use.
    pub fn all_used(&self) -> Vec<u32> {
        let free = self.free_list();
        (0..self.capacity()).filter(|index| free.is_used[*index as usize]).collect()
    }

    /// How many records are in use.
    pub fn used(&self) -> u32 {
        self.capacity() - self.free_list().queue.len() as u32
    }

    /// How many records there are.
    pub fn capacity(&self) -> u32 {
        self.memory.count()
    }

    /// Writes the whole record with state OFF and the next generation, which is returned.
    pub fn prepare(&self, index: u32, record: Record) -> u32 {
        self.set_state(index, state::OFF);
        let generation = self.snapshot(index).generation.wrapping_add(1);
        self.write(index, Record { state: state::OFF, generation, ..record });
        generation
    }

    /// Writes a whole record, which no program may be using.
    pub(super) fn write(&self, index: u32, content: Record) {
        let words: Words = bytemuck::cast(content);
        let record = self.memory.at(index);
        for (nth, word) in words.into_iter().enumerate() {
            let place = record.wrapping_add(nth);
            // SAFETY: inside the record, and aligned, since it is made of such words.
            unsafe { place.write_volatile(word) };
        }
    }

    /// One of [`state`].
    pub fn state(&self, index: u32) -> u32 {
        self.field(index, offset_of!(Record, state)).load(Ordering::Acquire)
    }

    /// Programs that see the new state see everything that was written before.
    pub fn set_state(&self, index: u32, state: u32) {
        self.field(index, offset_of!(Record, state)).store(state, Ordering::Release);
    }

    /// Changes the state only if it is `from`.
    ///
    /// # Errors
    /// The state that it is instead.
    pub fn advance_state(&self, index: u32, from: u32, to: u32) -> Result<(), u32> {
        let state = self.field(index, offset_of!(Record, state));
        state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).map(drop)
    }

    /// Adds bits of [`proxy_common::flow::flags`].
    pub fn add_flags(&self, index: u32, flags: u32) {
        self.field(index, offset_of!(Record, flags)).fetch_or(flags, Ordering::AcqRel);
    }

    /// A copy of a record. Each counter is right by itself, but two counters may be of slightly
    /// different moments.
    pub fn snapshot(&self, index: u32) -> Record {
        self.memory.snapshot(index)
    }

    /// Sets [`DirLive::own_end`] of a direction (a sequence number in host order, like those
    /// below).
    pub fn set_own_end(&self, flow: FlowRef, end: u32) {
        self.live(flow, offset_of!(DirLive, own_end)).store(end, Ordering::Release);
    }

    /// Sets [`DirFixed::received`] of a direction.
    pub fn set_received(&self, flow: FlowRef, end: u32) {
        self.fixed(flow, offset_of!(DirFixed, received)).store(end, Ordering::Release);
    }

    /// Sets [`DirFixed::ts_floor`] of a direction; programs see it before this returns.
    pub fn set_ts_floor(&self, flow: FlowRef, floor: u32) {
        // A full barrier: a clock that is read afterwards is read after the store.
        self.fixed(flow, offset_of!(DirFixed, ts_floor)).swap(floor, Ordering::SeqCst);
    }

    /// Sets [`Record::relayed`].
    pub fn set_relayed(&self, index: u32, relayed: [u64; 2]) {
        let first: *mut u64 = self.memory.at(index).wrapping_byte_add(offset_of!(Record, relayed));
        for (nth, bytes) in relayed.into_iter().enumerate() {
            // SAFETY: inside the record and aligned, being the offset of a field; mapped as long as
            // `self` lives. No program touches it.
            unsafe { first.wrapping_add(nth).write_volatile(bytes) };
        }
    }

    /// Notes a FIN of this direction that the socket saw, and `fin_end`, the number after it.
    pub fn note_fin(&self, flow: FlowRef, fin_end: u32) {
        self.live(flow, offset_of!(DirLive, fin_end)).store(fin_end, Ordering::Release);
        self.live_half(flow, offset_of!(DirLive, bits)).fetch_or(bits::FIN_SEEN, Ordering::AcqRel);
    }

    fn free_list(&self) -> MutexGuard<'_, Free> {
        // Nothing that runs under the lock leaves it half done.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A `u32` of the record, `offset` bytes into it.
    fn field(&self, index: u32, offset: usize) -> &AtomicU32 {
        debug_assert!(offset + size_of::<u32>() <= size_of::<Record>());
        let field = self.memory.at(index).wrapping_byte_add(offset).cast();
        // SAFETY: inside the record and aligned, being the offset of a field; mapped as long as
        // `self` lives. Programs access such fields whole, as atomics do.
        unsafe { AtomicU32::from_ptr(field) }
    }

    /// A `u32` of [`DirFixed`] of a direction, `offset` bytes into it.
    pub(super) fn fixed(&self, flow: FlowRef, offset: usize) -> &AtomicU32 {
        self.field(flow.record(), offset_of_flow(flow) + offset_of!(Flow, fixed) + offset)
    }

    /// A `u32` of [`DirLive`] of a direction.
    pub(super) fn live(&self, flow: FlowRef, offset: usize) -> &AtomicU32 {
        self.field(flow.record(), offset_of_flow(flow) + offset_of!(Flow, live) + offset)
    }

    /// A `u16` of [`DirLive`] of a direction.
    pub(super) fn live_half(&self, flow: FlowRef, offset: usize) -> &AtomicU16 {
        let offset = offset_of_flow(flow) + offset_of!(Flow, live) + offset;
        let half = self.memory.at(flow.record()).wrapping_byte_add(offset).cast();
        // SAFETY: as in `field`.
        unsafe { AtomicU16::from_ptr(half) }
    }

    /// A `u64` of [`DirLive`] of a direction.
    pub(super) fn live_count(&self, flow: FlowRef, offset: usize) -> &AtomicU64 {
        let offset = offset_of_flow(flow) + offset_of!(Flow, live) + offset;
        let count = self.memory.at(flow.record()).wrapping_byte_add(offset).cast();
        // SAFETY: as in `field`.
        unsafe { AtomicU64::from_ptr(count) }
    }
}

/// The offset of a flow in its record, in bytes.
const fn offset_of_flow(flow: FlowRef) -> usize {
    offset_of!(Record, flows) + size_of::<Flow>() * flow.direction() as usize
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs::File;
    use std::os::fd::AsFd as _;
    use std::sync::Arc;
    use std::thread;

    use bytemuck::Zeroable as _;
    use proxy_common::flow::{Direction, flags};

    use super::*;

    /// A file that takes the place of the map.
    fn file(capacity: u32) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(u64::from(capacity) * size_of::<Record>() as u64).unwrap();
        file
    }

    pub(in super::super) fn records(capacity: u32) -> Records {
        Records::map(file(capacity).as_fd(), capacity).unwrap()
    }

    #[test]
    fn fields_are_written_where_the_program_reads_them() {
        let records = records(3);
        let mut record = Record { flags: flags::SACK, state: state::SPLICED, ..Record::zeroed() };
        record.flows[1].live.bytes = 7;
        assert_eq!(records.prepare(1, record), 1);
        records.set_own_end(FlowRef::new(1, Direction::ToDownstream), 11);
        records.note_fin(FlowRef::new(1, Direction::ToUpstream), 12);
        records.add_flags(1, flags::COPY_ACKS);
        records.set_relayed(1, [21, 22]);
        let seen = records.snapshot(1);
        assert_eq!(
            (seen.state, seen.flags, seen.generation),
            (state::OFF, flags::SACK | flags::COPY_ACKS, 1)
        );
        assert_eq!(seen.relayed, [21, 22]);
        let [up, down] = seen.flows.map(|flow| flow.live);
        assert_eq!((up.fin_end, up.bits, up.own_end, up.bytes), (12, bits::FIN_SEEN, 0, 0));
        assert_eq!((down.fin_end, down.bits, down.own_end, down.bytes), (0, 0, 11, 7));
        for neighbour in [0, 2] {
            assert_eq!(bytemuck::bytes_of(&records.snapshot(neighbour)), [0; size_of::<Record>()]);
        }
        assert_eq!(records.prepare(1, record), 2);
    }

    #[test]
    fn a_state_is_only_left_by_who_knows_it() {
        let records = records(1);
        records.set_state(0, state::HAND_OVER);
        assert_eq!(records.advance_state(0, state::HAND_OVER, state::SPLICED), Ok(()));
        records.set_state(0, state::RESET);
        assert_eq!(records.advance_state(0, state::SPLICED, state::FINISHED), Err(state::RESET));
        assert_eq!(records.state(0), state::RESET);
    }

    #[test]
    fn records_rest_as_long_as_possible() {
        let records = records(3);
        let taken: Vec<_> = std::iter::from_fn(|| records.allocate()).collect();
        assert_eq!((taken, records.used(), records.capacity()), (vec![0, 1, 2], 3, 3));
        records.set_state(1, state::SPLICED);
        records.free(1);
        records.free(0);
        assert_eq!((records.state(1), records.used()), (state::OFF, 1));
        assert_eq!([records.allocate(), records.allocate(), records.allocate()], [Some(1), Some(0), None]);
    }

    #[test]
    fn what_another_process_left_is_in_use() {
        let file = file(4);
        let before = Records::map(file.as_fd(), 4).unwrap();
        before.set_state(1, state::SPLICED);
        before.set_state(3, state::DEAD);
        drop(before);
        let after = Records::map_used(file.as_fd(), 4).unwrap();
        assert_eq!((after.all_used(), after.used()), (vec![1, 3], 2));
        after.free(1);
        assert_eq!([after.allocate(), after.allocate(), after.allocate()], [Some(0), Some(2), Some(1)]);
        assert_eq!(after.allocate(), None);
    }

    #[test]
    fn no_record_has_two_owners() {
        let records = Arc::new(records(8));
        let threads: Vec<_> = (1..=4)
            .map(|owner| {
                let records = Arc::clone(&records);
                thread::spawn(move || {
                    for _ in 0..10_000 {
                        let Some(index) = records.allocate() else { continue };
                        assert_eq!(records.advance_state(index, state::OFF, owner), Ok(()));
                        assert_eq!(records.snapshot(index).state, owner);
                        records.free(index);
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(records.used(), 0);
    }
}
