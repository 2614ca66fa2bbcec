//! From a packet to its session's record.

use proxy_common::flow::{Conn, Direction, Flow, FlowKey4, FlowKey6, FlowRef, state};
use proxy_common::packet::headers::{Ip, Ipv4, Ipv6};

use crate::maps::{STEER_CONNS, STEER_FLOWS4, STEER_FLOWS6};

/// The flow map of an IP version.
pub(super) trait Flows: Ip {
    fn find(key: &Self::Key) -> Option<FlowRef>;
    fn forget(key: &Self::Key);
    /// That of a record's flow.
    fn key_of(conn: &Conn, direction: Direction) -> Self::Key;
}

impl Flows for Ipv4 {
    #[inline(always)]
    fn find(key: &FlowKey4) -> Option<FlowRef> {
        // SAFETY: an element of a map without preallocation is freed after the programs that see it.
        unsafe { STEER_FLOWS4.get(key) }.copied()
    }

    #[inline(always)]
    fn forget(key: &FlowKey4) {
        // Gone already: userspace was quicker.
        let _ = STEER_FLOWS4.remove(key);
    }

    #[inline(always)]
    fn key_of(conn: &Conn, direction: Direction) -> FlowKey4 {
        conn.key4(direction)
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
        let _ = STEER_FLOWS6.remove(key);
    }

    #[inline(always)]
    fn key_of(conn: &Conn, direction: Direction) -> FlowKey6 {
        conn.key6(direction)
    }
}

/// A session's record, seen from one of its flows.
///
/// Userspace and other CPUs write to it at the same time: single aligned words, each with one writer (the CPU
/// that handles the direction) but for `state`, so a reader sees an old or a new value.
#[derive(Clone, Copy)]
pub(super) struct Session {
    pub(super) flow: FlowRef,
    conn: *mut Conn,
}

impl Session {
    #[inline(always)]
    pub(super) fn of(flow: FlowRef) -> Option<Self> {
        STEER_CONNS.get_ptr_mut(flow.conn()).map(|conn| Self { flow, conn })
    }

    #[inline(always)]
    fn state_word(&self) -> *mut u32 {
        // SAFETY: a live record of an array map, which is never freed while a program runs.
        unsafe { &raw mut (*self.conn).state }
    }

    #[inline(always)]
    pub(super) fn state(&self) -> u32 {
        // SAFETY: a live, aligned word; others write it at once.
        unsafe { self.state_word().read_volatile() }
    }

    /// Takes the session to another state, unless userspace has freed the record in between. (Between the two accesses it
    /// still may; the state of a free record does not matter. Compilers for BPF have no compare-exchange.)
    #[inline(always)]
    pub(super) fn advance(&self, to: u32) {
        if self.state() != state::OFF {
            // SAFETY: as above.
            unsafe { self.state_word().write_volatile(to) };
        }
    }

    /// The record. Words of it may change while it is looked at.
    #[inline(always)]
    pub(super) fn conn(&self) -> &Conn {
        // SAFETY: a live record, see above.
        unsafe { &*self.conn }
    }

    #[inline(always)]
    pub(super) fn flags(&self) -> u32 {
        // SAFETY: a live record, see above.
        unsafe { (*self.conn).flags }
    }

    /// For a session that ends by it, in a hand-over or after: userspace adds flags only before, or to one that has ended.
    #[inline(always)]
    pub(super) fn add_flags(&self, flags: u32) {
        // SAFETY: as above.
        unsafe { (*self.conn).flags |= flags };
    }

    #[inline(always)]
    pub(super) fn generation(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.conn).generation }
    }

    /// The flow.
    #[inline(always)]
    pub(super) fn arriving(&self) -> &mut Flow {
        self.direction(self.flow.direction())
    }

    /// The opposite direction.
    #[inline(always)]
    pub(super) fn other(&self) -> &mut Flow {
        self.direction(self.flow.direction().opposite())
    }

    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "a pointer in disguise: the record is not a part of the session")]
    fn direction(&self, direction: Direction) -> &mut Flow {
        // SAFETY: a live record.
        unsafe { &mut (*self.conn).flows[direction as usize] }
    }
}
