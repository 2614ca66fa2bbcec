//! Map types of the socket splice.
//!
//! The key of every map is the *socket cookie* (`SO_COOKIE`, `bpf_get_socket_cookie()`): a `u64`
//! that the kernel never uses twice, the same for both address families. A flow is named by the
//! cookie of the socket that it is read from.

use bytemuck::{Pod, Zeroable};

/// What the program has done with a flow. Userspace inserts zeroes; after that only the program
/// writes, and userspace reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct SockFlow {
    /// Payload bytes redirected to the peer socket.
    pub bytes: u64,
    /// One of [`gate`]; once shut it stays shut.
    pub gate: u32,
    /// Padding, which nobody reads.
    pub _pad: u32,
}

/// How far a flow may go before userspace has looked at it again. Written by userspace only.
/// Both are values of [`SockFlow::bytes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct SockCredit {
    /// The first byte after this number of bytes shuts the gate.
    pub limit: u64,
    /// Reaching this sends [`event::WARN`].
    pub warn: u64,
}

/// A record of the event ring, from the program to userspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct SockEvent {
    /// Cookie of the socket that the flow is read from.
    pub cookie: u64,
    /// One of [`event`].
    pub kind: u32,
    /// Padding, which nobody reads.
    pub _pad: u32,
}

/// Values of [`SockFlow::gate`].
pub mod gate {
    /// Payload is redirected.
    pub const OPEN: u32 = 0;
    /// The credit is used up: payload is passed to the flow's own socket.
    pub const CREDIT: u32 = 1;
    /// The peer socket is not (or no longer) a target: payload is passed to the flow's own socket.
    pub const NO_TARGET: u32 = 2;
}

/// Values of [`SockEvent::kind`].
pub mod event {
    /// [`super::SockCredit::warn`] was reached; sent once for each value of it.
    pub const WARN: u32 = 1;
    /// The gate was shut; sent once in a flow's life.
    pub const GATE: u32 = 2;
}

#[cfg(feature = "user")]
mod user {
    // SAFETY: `repr(C)`, integers only, no padding (checked below and by bytemuck's derive).
    unsafe impl aya::Pod for super::SockFlow {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::SockCredit {}
}

const _: () = {
    use core::mem::{align_of, offset_of, size_of};
    assert!(size_of::<SockFlow>() == 16 && align_of::<SockFlow>() == 8);
    assert!(offset_of!(SockFlow, bytes) == 0 && offset_of!(SockFlow, gate) == 8);
    assert!(size_of::<SockCredit>() == 16 && align_of::<SockCredit>() == 8);
    assert!(offset_of!(SockCredit, limit) == 0 && offset_of!(SockCredit, warn) == 8);
    assert!(size_of::<SockEvent>() == 16 && align_of::<SockEvent>() == 8);
    assert!(offset_of!(SockEvent, cookie) == 0 && offset_of!(SockEvent, kind) == 8);
};

/// What the program does with one segment of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Redirect the segment to the peer socket.
    Redirect {
        /// Value of [`SockFlow::bytes`] after this segment.
        total: u64,
        /// Tell userspace ([`event::WARN`]), since this segment reaches [`SockCredit::warn`].
        warn: bool,
    },
    /// The credit does not cover it: shut the gate.
    ShutGate,
    /// The gate is shut: leave it to the flow's own socket.
    Pass,
}

/// The credit gate (see [`SockCredit`]) for a segment of `len` payload bytes.
#[inline(always)]
pub fn step(flow: &SockFlow, credit: &SockCredit, len: u32) -> Step {
    if flow.gate != gate::OPEN {
        return Step::Pass;
    }
    let total = flow.bytes.wrapping_add(len as u64);
    if total > credit.limit {
        return Step::ShutGate;
    }
    Step::Redirect { total, warn: flow.bytes < credit.warn && total >= credit.warn }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CREDIT: SockCredit = SockCredit { limit: 1000, warn: 500 };

    fn flow(bytes: u64) -> SockFlow {
        SockFlow { bytes, ..SockFlow::default() }
    }

    #[test]
    fn warns_once_when_the_mark_is_reached_or_jumped() {
        assert_eq!(step(&flow(0), &CREDIT, 499), Step::Redirect { total: 499, warn: false });
        assert_eq!(step(&flow(499), &CREDIT, 1), Step::Redirect { total: 500, warn: true });
        assert_eq!(step(&flow(400), &CREDIT, 400), Step::Redirect { total: 800, warn: true });
        assert_eq!(step(&flow(500), &CREDIT, 1), Step::Redirect { total: 501, warn: false });
    }

    #[test]
    fn the_limit_is_the_last_byte_allowed() {
        assert_eq!(step(&flow(999), &CREDIT, 1), Step::Redirect { total: 1000, warn: false });
        assert_eq!(step(&flow(999), &CREDIT, 2), Step::ShutGate);
        assert_eq!(step(&flow(0), &SockCredit::default(), 1), Step::ShutGate);
    }

    #[test]
    fn a_shut_gate_stays_shut() {
        for gate in [gate::CREDIT, gate::NO_TARGET] {
            assert_eq!(step(&SockFlow { gate, ..flow(0) }, &CREDIT, 1), Step::Pass);
        }
    }
}
