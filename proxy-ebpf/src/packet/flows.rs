//! From a packet to the record of its stream.

use proxy_common::flow::{Direction, FlowKey4, FlowKey6, FlowRef, SharedFlow, SharedRecord, state};
use proxy_common::packet::headers::{Ip, Ipv4, Ipv6};

use crate::maps::{STEER_CONNS, STEER_FLOWS4, STEER_FLOWS6};

/// The flow map of an IP version.
pub(super) trait Flows: Ip {
    fn find(key: &Self::Key) -> Option<FlowRef>;
    fn forget(key: &Self::Key);
    /// The key of a record's flow.
    fn key_of(record: &SharedRecord, direction: Direction) -> Self::Key;
}

impl Flows for Ipv4 {
    #[inline(always)]
    fn find(key: &FlowKey4) -> Option<FlowRef> {
        // SAFETY: an element of a map without preallocation is freed after the programs that see
        // it.
        unsafe { STEER_FLOWS4.get(key) }.copied()
    }

    #[inline(always)]
    fn forget(key: &FlowKey4) {
        // Userspace has removed the key already.
        STEER_FLOWS4.remove(key).ok();
    }

    #[inline(always)]
    fn key_of(record: &SharedRecord, direction: Direction) -> FlowKey4 {
        record.key4(direction)
    }
}

impl Flows for Ipv6 {
    #[inline(always)]
    fn find(key: &FlowKey6) -> Option<FlowRef> {
        // SAFETY: as above.
        unsafe { STEER_FLOWS6.get(key) }.copied()
    }

    #[inline(always)]
    fn forget(key: &FlowKey6) {
        STEER_FLOWS6.remove(key).ok();
    }

    #[inline(always)]
    fn key_of(record: &SharedRecord, direction: Direction) -> FlowKey6 {
        record.key6(direction)
    }
}

/// A record, seen from one of its flows. Userspace and other CPUs write to it at the same time.
#[derive(Clone, Copy)]
pub(super) struct RecordHandle {
    pub(super) flow: FlowRef,
    shared: &'static SharedRecord,
}

impl RecordHandle {
    #[inline(always)]
    pub(super) fn of(flow: FlowRef) -> Option<Self> {
        let shared: *mut SharedRecord = STEER_CONNS.get_ptr_mut(flow.record())?.cast();
        // SAFETY: a record of an array map, which is aligned and never freed while a program runs.
        // All programs access it by words, as userspace does.
        Some(Self { flow, shared: unsafe { &*shared } })
    }

    #[inline(always)]
    pub(super) fn state(&self) -> u32 {
        self.shared.state.get()
    }

    /// Takes the stream to another state, unless userspace has freed the record meanwhile.
    /// (Userspace may still free the record between the two accesses. The state of a free record
    /// does not matter.)
    #[inline(always)]
    pub(super) fn advance(&self, to: u32) {
        if self.state() != state::OFF {
            self.shared.state.set(to);
        }
    }

    /// Takes a record that is not active yet to [`state::DEAD`]. Userspace may be about to activate
    /// the record: the exchange lets one of the two win, and both know which. Returns the state
    /// that the record has had.
    #[inline(always)]
    pub(super) fn bury(&self) -> u32 {
        self.shared.state.compare_exchange(state::OFF, state::DEAD)
    }

    /// The record.
    #[inline(always)]
    pub(super) fn shared(&self) -> &'static SharedRecord {
        self.shared
    }

    #[inline(always)]
    pub(super) fn flags(&self) -> u32 {
        self.shared.flags.get()
    }

    /// Only for flags that end the stream, in a hand-over or after: userspace adds flags only
    /// before that, or to a stream that has ended.
    #[inline(always)]
    pub(super) fn add_flags(&self, flags: u32) {
        self.shared.flags.set(self.flags() | flags);
    }

    #[inline(always)]
    pub(super) fn generation(&self) -> u32 {
        self.shared.generation.get()
    }

    /// The flow.
    #[inline(always)]
    pub(super) fn arriving(&self) -> &'static SharedFlow {
        self.direction(self.flow.direction())
    }

    /// The opposite direction.
    #[inline(always)]
    pub(super) fn other(&self) -> &'static SharedFlow {
        self.direction(self.flow.direction().opposite())
    }

    #[inline(always)]
    fn direction(&self, direction: Direction) -> &'static SharedFlow {
        &self.shared.flows[direction as usize]
    }
}
