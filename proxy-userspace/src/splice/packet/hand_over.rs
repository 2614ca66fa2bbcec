//! From two sockets to two entries in a map, without a pause and without a lost byte.
//!
//! What makes it exact is that each byte that is read is written: the difference between the sequence numbers of the
//! two connections, in each direction, is therefore constant, whatever is under way. It is taken when the stream
//! begins. Later, at any moment, one store makes the kernel forward whatever arrives. Then
//!
//! - what had arrived before is still relayed, until nothing is left of it;
//! - what the sockets had sent and the peers have not acknowledged stays the sockets' to repeat: the program gives
//!   them copies of acknowledgements. It must know, before each write, how far those may go (`own_end`);
//! - and the sockets may go only when no packet is on its way to them any more: after a grace period.
//!
//! Commonly the stream is quiet after its 101. Then nothing has to be relayed, no copies are made, and one grace period
//! is enough.

use std::cell::Cell;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use proxy_common::flow::{Direction, flags, state};
use proxy_common::reason::Reason;
use tokio::task::coop;
use tokio::time::Instant;

use super::PacketSplice;
use super::lanes::{Lanes, Watcher};
use super::record::{Carried, Record};
use super::table::Stream;
use crate::kernel::{clock, repair, tcp_info};
use crate::splice::relay::Broken;
use crate::splice::{End, Path};
use crate::telemetry::flows::{FlowGuard, KernelBytes};
use crate::upstream::ports::Lease;

/// How often it is looked whether the sockets' bytes are acknowledged, which the kernel does not tell by itself: at
/// first, and at most, the time being doubled while nothing happens.
const FIRST_LOOK: Duration = Duration::from_millis(1);
const LAST_LOOK: Duration = Duration::from_millis(64);

/// A session after the switch, as long as its sockets are there. Dropping it resets both connections.
pub(super) struct HandOver<'a> {
    pub(super) splice: &'a PacketSplice,
    pub(super) lanes: Lanes,
    pub(super) watcher: Switched,
    /// What the record began with.
    pub(super) seq_end: [u32; 2],
    pub(super) source: Lease,
    pub(super) flow: FlowGuard,
    pub(super) idle_timeout: Option<Duration>,
}

/// The record of a stream whose packets the kernel forwards already.
pub(super) struct Switched {
    pub(super) record: Record,
    /// See [`flags::COPY_ACKS`].
    pub(super) copies_acks: Cell<bool>,
}

impl Switched {
    fn copy_acks(&self) {
        if !self.copies_acks.replace(true) {
            self.record.add_flags(flags::COPY_ACKS);
        }
    }
}

impl Watcher for Switched {
    fn gives(&self, side: usize, end: u32) {
        self.copy_acks();
        self.record.set_own_end(Direction::BOTH[side], end);
    }

    fn read_fin(&self, side: usize, end: u32) {
        self.record.note_fin(Direction::BOTH[side], end);
    }
}

/// Why the sockets are not needed any more.
enum Outcome {
    /// All that they had is where it belongs, or the program has seen the end of the stream.
    Done,
    Ended(End),
}

impl HandOver<'_> {
    /// Relays what the sockets still have, closes them, and leaves the stream to the table.
    pub(super) async fn complete(mut self, began: Instant) {
        self.flow.set_path(Path::Packet);
        let outcome = self.drain().await;
        let how = match (&outcome, self.watcher.copies_acks.get()) {
            (Outcome::Ended(_), _) => "failed",
            (Outcome::Done, false) => "quiet",
            (Outcome::Done, true) => "busy",
        };
        let metrics = &self.splice.telemetry.metrics;
        metrics.hand_overs.with_label_values(&[how]).inc();
        metrics.hand_over_seconds.observe(began.elapsed().as_secs_f64());
        ...
    }
}
