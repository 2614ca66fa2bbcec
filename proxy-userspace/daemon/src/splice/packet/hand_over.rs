//! Moves a stream from two sockets to two entries in a map, without a pause and without a lost
//! byte.
//!
//! Each byte that is read is written. So in each direction the difference between the sequence
//! numbers of the two connections is constant, whatever is under way. `approach` takes this
//! difference, and then one store makes the kernel forward all packets that arrive. After the
//! store,
//!
//! - bytes that had arrived before are still relayed, until none are left;
//! - the sockets still repeat the bytes that they have sent and the peers have not acknowledged.
//!   The program gives the sockets copies of acknowledgements. Before each write, the program must
//!   be told how far those copies may acknowledge (`own_end`);
//! - the sockets are closed only when no packet is on its way to them any more: after a grace
//!   period.
//!
//! Most streams are quiet after the 101. For a quiet stream nothing has to be relayed, no copies
//! are made, and one grace period is enough.

use std::cell::Cell;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use prometheus::IntCounter;
use proxy_common::flow::{flags, state};
use steer_kernel::failpoint;
use steer_kernel::tcp::{clock, repair, tcp_info};
use strum::{IntoStaticStr, VariantArray};
use tokio::net::TcpStream;
use tokio::task::coop;
use tokio::time::{Instant, timeout};

use super::PacketSplice;
use super::lanes::{Lanes, Watcher};
use super::life::{Life, Look, Step};
use super::owned_record::{Carried, OwnedRecord};
use super::table::SplicedStream;
use crate::splice::relay::Broken;
use crate::splice::side::Side;
use crate::streams::ports::Lease;
use crate::streams::{Carrier, StreamGuard};
use crate::streams::{End, Path};
use crate::telemetry::Metrics;

/// How often to check whether the sockets' bytes are acknowledged: the kernel does not report that
/// by itself. The first interval is [`FIRST_LOOK`]. While nothing happens, the interval doubles, up
/// to [`LAST_LOOK`].
const FIRST_LOOK: Duration = Duration::from_millis(1);
const LAST_LOOK: Duration = Duration::from_millis(64);
/// From this interval on, Steer sends acknowledgements to the peers.
const SLOW_LOOK: Duration = Duration::from_millis(16);

/// How long a hand-over may go on that does not wait for a peer. No byte is left to be written or
/// acknowledged, so only this host has something to do, and needs milliseconds. A hand-over that
/// waits for a peer has no time limit, since a peer may stop reading for any time. But the peer
/// must answer probes: see [`HandOver::look_after`].
const FINISH_WITHIN: Duration = Duration::from_secs(5);

/// How a hand-over went: the label of `steer_hand_overs_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case", const_into_str)]
enum How {
    Quiet,
    Busy,
    Failed,
    Expired,
}

/// The counters of `steer_hand_overs_total`.
#[derive(Debug)]
pub(super) struct HandOvers(Vec<IntCounter>);

impl HandOvers {
    pub(super) fn new(metrics: &Metrics) -> Self {
        let counter = |how: &How| metrics.hand_overs.with_label_values(&[how.into_str()]);
        Self(How::VARIANTS.iter().map(counter).collect())
    }

    fn of(&self, how: How) -> &IntCounter {
        &self.0[how as usize]
    }
}

/// Why a hand-over failed.
struct Failed {
    end: End,
    how: How,
}

impl Failed {
    fn because_of_a_peer(end: End) -> Self {
        Self { end, how: How::Failed }
    }
}

/// The tracked connections of a stream: the peer's address, and the local one.
pub(super) type Tracked = Vec<(SocketAddr, SocketAddr)>;

/// A session after the switch, while its sockets are open. Dropping it resets both connections.
pub(super) struct HandOver<'a> {
    pub(super) splice: &'a PacketSplice,
    /// Dropped before the sockets. While the keys are in the maps, the egress program takes the
    /// RSTs of the sockets for RSTs of a local stack that does not know the stream. Then the peers
    /// would learn of the end only when they send something.
    pub(super) watcher: Switched,
    pub(super) lanes: Lanes,
    pub(super) source: Option<Lease>,
    pub(super) guard: StreamGuard,
    pub(super) idle_timeout: Option<Duration>,
    pub(super) tracked: Tracked,
    /// `None` before the grace period has passed.
    pub(super) carried: Option<Arc<Carried>>,
}

/// The record of a stream whose packets the kernel forwards already.
pub(super) struct Switched {
    pub(super) record: OwnedRecord,
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
    const PASSES_FINS: bool = true;

    fn gives(&self, side: Side, end: u32) {
        self.copy_acks();
        self.record.set_own_end(side.direction(), end);
    }

    fn read_fin(&self, side: Side, end: u32) {
        self.record.note_fin(side.direction(), end);
    }
}

impl HandOver<'_> {
    /// Relays the bytes that the sockets still have, closes the sockets, and gives the stream to
    /// the table. `opened`: when the 101 was relayed. `decided`: when Steer decided to splice the
    /// stream.
    pub(super) async fn complete(mut self, opened: Instant, decided: Instant) {
        self.guard.set_path(Path::Packet);
        let drained = self.drain().await;
        let carried = self.carried();
        // The sockets may have received more than was written: a stream may end so quickly that the
        // peers repeated the rest after the switch.
        carried.begin_at(self.written(), self.guard.stream().relayed());
        let how = match (&drained, self.watcher.copies_acks.get()) {
            (Err(failed), _) => failed.how,
            (Ok(()), false) => How::Quiet,
            (Ok(()), true) => How::Busy,
        };
        let metrics = &self.splice.metrics;
        let record = self.watcher.record;
        if drained.is_ok() {
            failpoint::reached("drained");
            record.complete();
            failpoint::reached("spliced");
            metrics.splice_seconds.observe(opened.elapsed().as_secs_f64());
            if how == How::Busy {
                // Copies of acknowledgements may still be on their way to the sockets.
                self.splice.grace.wait().await;
            }
        } else {
            record.abort();
        }
        for socket in self.lanes.sockets {
            close(socket);
            failpoint::reached("closing");
        }
        // The sockets are closed, and netfilter sees no packet of the stream any more.
        self.splice.survey.forget(&self.tracked);
        self.splice.hand_overs.of(how).inc();
        metrics.hand_over_seconds.observe(decided.elapsed().as_secs_f64());
        let stream = SplicedStream::new(record, self.guard, carried, self.source);
        failpoint::reached("closed");
        self.splice.table.insert(stream, drained.err().map(|failed| failed.end));
        failpoint::reached("kept");
    }

    /// Returns when the sockets are not needed any more: all their bytes are delivered, or the
    /// program has seen the end of the stream.
    ///
    /// # Errors
    /// How the stream has to be ended.
    async fn drain(&mut self) -> Result<(), Failed> {
        let mut grace = pin!(self.splice.grace.wait());
        let mut is_past = false;
        let mut life = Life::new();
        // Since this time, the hand-over has not waited for a peer.
        let mut alone_since = Instant::now();
        let mut look = FIRST_LOOK;
        let mut last_moved_ns = clock::monotonic_ns();
        let mut packets = [0; 2];
        loop {
            if self.watcher.record.state() != state::HAND_OVER {
                return Ok(());
            }
            if is_past {
                self.ask_for_unread();
            }
            if self.lanes.step(self.guard.stream(), &self.watcher).map_err(|error| self.broken(&error))? {
                last_moved_ns = clock::monotonic_ns();
                look = FIRST_LOOK;
                alone_since = Instant::now();
                // No `Turn` here: the sockets have at most a window of bytes left, and the peers need
                // these bytes before those that the kernel forwards already.
                coop::consume_budget().await;
                continue;
            }
            if is_past {
                if self.is_drained() {
                    return Ok(());
                }
                self.watcher.copy_acks();
                if look >= SLOW_LOOK {
                    self.acknowledge(&mut packets);
                }
            }
            if self.is_idle(last_moved_ns) {
                return Err(Failed::because_of_a_peer(End::IdleTimeout));
            }
            if self.waits_for_a_peer() {
                alone_since = Instant::now();
            } else if alone_since.elapsed() > FINISH_WITHIN {
                tracing::warn!(
                    stream = self.guard.stream().id,
                    "a hand-over did not end within {FINISH_WITHIN:?}; both peers get a RST: please report this"
                );
                return Err(Failed { end: End::Reset, how: How::Expired });
            }
            if look >= LAST_LOOK {
                self.look_after(&mut life)?;
            }
            tokio::select! {
                () = &mut grace, if !is_past => {
                    is_past = true;
                    self.settle();
                }
                waited = timeout(look, self.lanes.wait()) => {
                    waited.unwrap_or(Ok(())).map_err(|error| self.broken(&error))?;
                    look = LAST_LOOK.min(look * 2);
                }
            }
        }
    }

    /// Sends an [acknowledgement](OwnedRecord::acknowledge) to each peer that has sent packets
    /// since `packets` was counted. The other peer may be unable to acknowledge. If this peer does
    /// not read before it gets an acknowledgement, its window would never open.
    fn acknowledge(&self, packets: &mut [u64; 2]) {
        let record = self.watcher.record.snapshot();
        let received = received(&self.lanes);
        for side in Side::BOTH {
            let before = std::mem::replace(&mut packets[side], record.flows[side].live.packets);
            if before != packets[side] {
                self.watcher.record.acknowledge(&record, side.direction(), received[side]);
            }
        }
    }

    /// Asks the sockets for bytes that they have received and not announced, for example after an
    /// urgent byte. No further packet reaches the sockets that could make them announce the bytes.
    fn ask_for_unread(&mut self) {
        for (side, unread) in Side::BOTH.into_iter().zip(&mut self.lanes.unread) {
            let rcv_nxt = repair::rcv_nxt(&self.lanes.sockets[side]);
            *unread |= rcv_nxt.is_ok_and(|rcv_nxt| rcv_nxt != self.lanes.read_end[side]);
        }
    }

    /// Whether a peer still has to take or to acknowledge bytes.
    fn waits_for_a_peer(&self) -> bool {
        let waits = |side: Side| !self.lanes.held[side].is_empty() || !self.has_all_acknowledged(side);
        Side::BOTH.into_iter().any(waits)
    }

    /// Probes silent peers, as for a spliced stream, since the keepalive of the sockets is off.
    /// (The sockets repeat what they have sent. But they may probe a peer without a window only
    /// every two minutes.)
    ///
    /// # Errors
    /// A peer does not answer.
    fn look_after(&self, life: &mut Life) -> Result<(), Failed> {
        let record = &self.watcher.record;
        let look = Look::of_hand_over(&record.snapshot());
        loop {
            match life.next(clock::monotonic_ns(), &look, self.splice.table.limits(), 0) {
                Step::Probe(direction) => record.probe(direction),
                Step::Abort(end) => return Err(Failed::because_of_a_peer(end)),
                // If the stream has ended, `drain` finds that in the record at the next look.
                Step::Wait { .. } | Step::Ended(_) | Step::ResetAgain | Step::Remove => return Ok(()),
            }
        }
    }

    /// Whether the sockets have no bytes left to be read, written or acknowledged. Once no packet
    /// is on its way to the sockets, a true answer stays true.
    fn is_drained(&self) -> bool {
        let lanes = &self.lanes;
        Side::BOTH.into_iter().all(|side| {
            let socket = &lanes.sockets[side];
            lanes.held[side].is_empty()
                // Also false if a FIN was not read.
                && repair::rcv_nxt(socket).is_ok_and(|rcv_nxt| rcv_nxt == lanes.read_end[side])
                && self.has_all_acknowledged(side)
        })
    }

    /// Whether the peer at `side` has acknowledged all bytes that its socket was given.
    fn has_all_acknowledged(&self, side: Side) -> bool {
        tcp_info::unacknowledged(&self.lanes.sockets[side]).is_ok_and(|bytes| bytes == 0)
            || self.is_acknowledged(side)
    }

    /// Whether the program has seen an acknowledgement of all bytes that the socket was given. The
    /// socket itself may not have seen the acknowledgement.
    fn is_acknowledged(&self, side: Side) -> bool {
        let acknowledged = self.watcher.record.snapshot().flows[side].live.ack_end;
        acknowledged.wrapping_sub(self.lanes.write_end[side]).cast_signed() >= 0
    }

    fn is_idle(&self, last_moved_ns: u64) -> bool {
        self.idle_timeout.is_some_and(|limit| {
            let flows = self.watcher.record.snapshot().flows;
            let last = flows.iter().fold(last_moved_ns, |last, flow| last.max(flow.live.last_payload_ns));
            u128::from(clock::monotonic_ns().saturating_sub(last)) >= limit.as_nanos()
        })
    }

    /// To be called after the grace period: the sockets receive nothing more.
    fn settle(&mut self) {
        let received = received(&self.lanes);
        for side in Side::BOTH {
            self.watcher.record.set_received(side.direction(), received[side]);
        }
        self.carried();
        failpoint::reached("settled");
    }

    /// The count of the bytes that the kernel carries: all bytes after those that the sockets have
    /// received. After the grace period the sockets receive nothing more.
    fn carried(&mut self) -> Arc<Carried> {
        let carried = self.carried.get_or_insert_with(|| {
            let carried = Carried::new(&self.watcher.record, received(&self.lanes));
            self.guard.stream().set_carrier(Arc::clone(&carried) as Arc<dyn Carrier>);
            carried
        });
        Arc::clone(carried)
    }

    /// For each direction: one past the last byte that was written, in the sequence numbers with
    /// which the bytes arrived.
    fn written(&self) -> [u32; 2] {
        let flows = self.watcher.record.snapshot().flows;
        Side::BOTH.map(|from| self.lanes.write_end[from.other()].wrapping_sub(flows[from].fixed.seq_delta))
    }

    fn broken(&self, error: &Broken) -> Failed {
        let error: &dyn std::error::Error = error;
        tracing::debug!(stream = self.guard.stream().id, error, "stream broke during its hand-over");
        Failed::because_of_a_peer(End::Reset)
    }
}

/// One past the last byte, or FIN, that each socket has received.
fn received(lanes: &Lanes) -> [u32; 2] {
    // If the kernel does not tell, the bytes that were read count as all bytes.
    Side::BOTH.map(|side| repair::rcv_nxt(&lanes.sockets[side]).unwrap_or(lanes.read_end[side]))
}

fn close(socket: TcpStream) {
    let closed = socket.into_std().and_then(repair::close_silently);
    if let Err(error) = closed {
        tracing::error!(%error, "cannot close a socket silently");
    }
}
