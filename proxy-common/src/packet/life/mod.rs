//! What a packet tells about its stream: how far each direction has advanced, and when the stream
//! is over.
//!
//! A packet that cannot be the peer's (an attacker can guess the tuple, but not the numbers) is
//! forwarded, since the other peer judges the packet as it would without a proxy. But such a packet
//! changes nothing here.

use crate::flow::{Direction, SharedFlow, SharedLive, bits, event, state};
use crate::packet::headers::{Tcp, tcp_flags};
use crate::packet::seq::{after, before, later};
use crate::stat::Stat;

/// The part of a TCP segment that matters here, in host order and with the numbers with which the
/// segment arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Number of the first byte of payload; of a SYN, if the segment has one.
    pub seq: u32,
    /// The number that the sender expects next. Valid with [`tcp_flags::ACK`].
    pub ack: u32,
    /// Bytes of payload.
    pub payload: u32,
    /// The window field of the header, not scaled.
    pub window: u16,
    /// Bits of [`tcp_flags`].
    pub flags: u8,
}

impl Segment {
    /// `len` is the length of header and payload. `None` if the header claims to be longer than
    /// that, or shorter than a header can be.
    #[inline(always)]
    pub fn new(header: &Tcp, len: u32) -> Option<Self> {
        let header_len = header.header_len();
        if header_len < Tcp::LEN as u32 || header_len > len {
            return None;
        }
        Some(Self {
            seq: u32::from_be(header.seq),
            ack: u32::from_be(header.ack),
            payload: len - header_len,
            window: u16::from_be(header.window),
            flags: header.flags,
        })
    }

    #[inline(always)]
    const fn has(&self, flags: u8) -> bool {
        self.flags & flags != 0
    }

    /// Whether the segment ends the stream, or one direction of the stream.
    #[inline(always)]
    pub const fn is_an_end(&self) -> bool {
        self.has(tcp_flags::FIN | tcp_flags::RST)
    }

    #[inline(always)]
    const fn data_end(&self) -> u32 {
        self.seq.wrapping_add(self.payload)
    }

    /// One past the last byte or FIN.
    #[inline(always)]
    const fn end(&self) -> u32 {
        self.data_end().wrapping_add((self.flags & tcp_flags::FIN) as u32)
    }
}

/// Whether a segment opens a connection with the tuple of a stream that is over: the client takes
/// its port again, or the endpoint answers a new connection of the proxy's stack.
#[inline(always)]
pub const fn takes_tuple(record_state: u32, direction: Direction, flags: u8) -> bool {
    const BOTH: u8 = tcp_flags::SYN | tcp_flags::ACK;
    let over = record_state == state::FINISHED || record_state == state::RESET;
    let answer = matches!(direction, Direction::ToDownstream) && flags & BOTH == BOTH;
    over && (flags & BOTH == tcp_flags::SYN || answer)
}

/// Whether a segment accepts a connection. A stack accepts one only if it knows no other connection
/// with the same addresses and ports.
#[inline(always)]
pub const fn accepts_a_connection(flags: u8) -> bool {
    const BOTH: u8 = tcp_flags::SYN | tcp_flags::ACK;
    flags & BOTH == BOTH
}

/// What [`observe`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observed {
    /// The segment is the peer's, as far as can be told.
    pub believed: bool,
    /// The stream's new state, if it changes.
    pub state: Option<u32>,
    /// One of [`event`] for userspace.
    pub event: Option<u32>,
    /// What is to be counted, too.
    pub stat: Option<Stat>,
}

impl Observed {
    const BELIEVED: Self = Self { believed: true, state: None, event: None, stat: None };
}

/// A clock that can tell at low cost whether its time has changed.
#[derive(Debug, Clone, Copy)]
pub struct Clock<F> {
    /// Changes, and wraps, at least as often as the time does.
    pub tick: u32,
    /// The coarse monotonic clock.
    pub now_ns: F,
}

/// Takes in a segment of `flow` in an active stream; `other` is the opposite direction.
#[inline(always)]
pub fn observe(
    record_state: u32,
    segment: &Segment,
    flow: &SharedFlow,
    other: &SharedFlow,
    clock: Clock<impl FnOnce() -> u64>,
) -> Observed {
    flow.live.packets.set(flow.live.packets.get().wrapping_add(1));
    let believed = is_believed(record_state, segment, flow, other);
    if segment.has(tcp_flags::RST) {
        return observe_reset(record_state, segment, flow, other, believed);
    }
    if !believed {
        return Observed { believed, stat: Some(Stat::Implausible), ..Observed::BELIEVED };
    }
    if flow.live.tick.get() != clock.tick {
        flow.live.tick.set(clock.tick);
        flow.live.last_packet_ns.set((clock.now_ns)());
    }
    let first_fin = advance(&flow.live, segment);
    acknowledge(flow, &other.live, segment);

    let both_acked = flow.live.bits.get() & other.live.bits.get() & bits::FIN_ACKED != 0;
    if both_acked && is_open(record_state) {
        return Observed { state: Some(state::FINISHED), event: Some(event::FINISHED), ..Observed::BELIEVED };
    }
    Observed { event: first_fin.then_some(event::FIN), ..Observed::BELIEVED }
}

/// Whether a segment of `flow` is the peer's, as far as can be told.
#[inline(always)]
pub fn is_believed(record_state: u32, segment: &Segment, flow: &SharedFlow, other: &SharedFlow) -> bool {
    if record_state == state::HAND_OVER {
        // What the local socket towards the other peer was given to send came from this peer,
        // whether the program saw it or not.
        let given = other.live.own_end.get().wrapping_add(other.fixed.ack_delta.get());
        flow.live.seq_end.set(later(flow.live.seq_end.get(), given));
    }
    is_plausible(record_state, segment, flow, other)
}

/// Takes in the last piece of a believed packet with these TCP flags. The payload of the packet
/// ends with `end`, which the first piece did not tell. Returns whether the packet has the
/// direction's first FIN.
#[inline(always)]
pub fn last_piece(live: &SharedLive, end: u32, flags: u8) -> bool {
    // A packet that does not follow at once is a retransmission.
    if end.wrapping_sub(live.seq_end.get()) > 1 << 16 {
        return false;
    }
    advance(live, &Segment { seq: end, ack: 0, payload: 0, window: 0, flags })
}

/// A RST ends the stream only if it has exactly the number that its receiver expects, or the last
/// number that was seen. The receiver answers a RST with any other number with an acknowledgement
/// (RFC 5961). If the RST was really the peer's, the peer then repeats it with the right number.
#[inline(always)]
fn observe_reset(
    record_state: u32,
    segment: &Segment,
    flow: &SharedFlow,
    other: &SharedFlow,
    believed: bool,
) -> Observed {
    let expected = other.live.ack_end.get().wrapping_add(other.fixed.ack_delta.get());
    if segment.seq != expected && segment.seq != flow.live.seq_end.get() {
        return Observed { believed: false, stat: Some(Stat::RstUnproven), ..Observed::BELIEVED };
    }
    if !is_open(record_state) {
        return Observed { believed, ..Observed::BELIEVED };
    }
    Observed { believed, state: Some(state::RESET), event: Some(event::RESET), stat: None }
}

/// Whether a RST of the local stack for the peer of `flow` answers a packet of that peer, not of
/// somebody who has guessed the tuple. Such a packet was not carried, and what it says is lost.
///
/// The stack answers a packet of a connection that it does not know with the number which that
/// packet acknowledges (RFC 9293, section 3.10.7.1). The peer acknowledges what it last
/// acknowledged, or all that was sent to it.
#[inline(always)]
pub fn answers_the_peer(reset_flags: u8, seq: u32, flow: &SharedFlow, other: &SharedFlow) -> bool {
    let sent = other.live.seq_end.get().wrapping_add(other.fixed.seq_delta.get());
    reset_flags & tcp_flags::ACK == 0 && (seq == flow.live.ack_end.get() || seq == sent)
}

const fn is_open(record_state: u32) -> bool {
    record_state == state::HAND_OVER || record_state == state::SPLICED
}

/// Whether the peer can have sent these numbers: the data is within the offered window, and the
/// acknowledgement is about what was sent to the peer.
#[inline(always)]
fn is_plausible(record_state: u32, segment: &Segment, flow: &SharedFlow, other: &SharedFlow) -> bool {
    if segment.has(tcp_flags::SYN) || !segment.has(tcp_flags::ACK) {
        return false;
    }
    // Then neither direction can be checked: the check of each needs the numbers of the other.
    if may_lag(&flow.live) || may_lag(&other.live) {
        return true;
    }
    // A FIN may follow a full window, and a probe may come one before it.
    let reach = largest_window(other) + 2;
    let acked = other.live.ack_end.get().wrapping_add(other.fixed.ack_delta.get());
    // In the hand-over the local socket may have acknowledged more than the other peer has, and
    // offered a window from there.
    let base = if record_state == state::HAND_OVER { later(acked, flow.live.seq_end.get()) } else { acked };
    let too_far = after(segment.end(), base.wrapping_add(reach));
    let too_old = before(segment.seq, flow.live.seq_end.get().wrapping_sub(reach));
    !too_far && !too_old && acknowledges_plausibly(record_state, segment, flow, other)
}

/// Whether the segment acknowledges about what the peer has acknowledged before, or more, but
/// nothing that the peer cannot have received. The distance to the last byte sent does not matter:
/// in the hand-over the local socket may have megabytes to send.
#[inline(always)]
fn acknowledges_plausibly(
    record_state: u32,
    segment: &Segment,
    flow: &SharedFlow,
    other: &SharedFlow,
) -> bool {
    let too_old = before(segment.ack, flow.live.ack_end.get().wrapping_sub(largest_window(flow)));
    let mut sent = other.live.seq_end.get();
    if record_state == state::HAND_OVER {
        // As in `is_believed`, for the other direction.
        sent = later(sent, flow.live.own_end.get().wrapping_add(flow.fixed.ack_delta.get()));
    }
    // Some of what was sent may have counted as implausible, but at most a window of it.
    let acknowledged = segment.ack.wrapping_add(flow.fixed.ack_delta.get());
    !too_old && !after(acknowledged, sent.wrapping_add(largest_window(flow)))
}

/// The largest window that this direction's peer has offered, in bytes; at least 64 KiB, since a
/// peer without scaling offers less.
#[inline(always)]
fn largest_window(flow: &SharedFlow) -> u32 {
    let window = u32::from(flow.live.window_max.get()) << (flow.fixed.window_left.get() & 15);
    if window < 1 << 16 { 1 << 16 } else { window }
}

/// Whether other maps may know more of the direction, which an unknown window says. The next packet
/// of the direction tells how far it has advanced.
#[inline(always)]
fn may_lag(live: &SharedLive) -> bool {
    live.window_max.get() == 0
}

/// How far `number` is ahead of `known`, one of `live`; 0 if it is an old one. A record may lag by
/// more than half of the number space. Then only numbers that may still be under way count as old.
#[inline(always)]
fn ahead(number: u32, known: u32, live: &SharedLive) -> u32 {
    const UNDER_WAY: u32 = 64 << 20;
    let distance = number.wrapping_sub(known);
    let limit = if may_lag(live) { UNDER_WAY.wrapping_neg() } else { 1 << 31 };
    if distance < limit { distance } else { 0 }
}

/// Takes in bytes and FIN; returns whether it is the direction's first FIN.
#[inline(always)]
fn advance(live: &SharedLive, segment: &Segment) -> bool {
    let data_end = segment.data_end();
    let more = ahead(data_end, live.seq_end.get(), live);
    if more != 0 {
        live.bytes.set(live.bytes.get().wrapping_add(more.into()));
        live.last_payload_ns.set(live.last_packet_ns.get());
        live.seq_end.set(data_end);
        // No byte follows a FIN, so the earlier FIN was not a real one. (A FIN that only the local
        // socket has seen comes after `seq_end`, and so does whatever follows that FIN.)
        if live.bits.get() & bits::FIN_SEEN != 0 && after(data_end, live.fin_end.get()) {
            live.bits.set(0);
        }
    }
    if !segment.has(tcp_flags::FIN) || before(segment.end(), live.seq_end.get()) {
        return false;
    }
    live.seq_end.set(segment.end());
    live.fin_end.set(segment.end());
    let first = live.bits.get() & bits::FIN_SEEN == 0;
    if first {
        live.bits.set(live.bits.get() | bits::FIN_SEEN);
    }
    first
}

/// Takes in acknowledgement and window.
#[inline(always)]
fn acknowledge(flow: &SharedFlow, other: &SharedLive, segment: &Segment) {
    if segment.ack == flow.live.ack_end.get() || ahead(segment.ack, flow.live.ack_end.get(), &flow.live) != 0
    {
        flow.live.ack_end.set(segment.ack);
        flow.live.window.set(segment.window);
    }
    if segment.window > flow.live.window_max.get() {
        flow.live.window_max.set(segment.window);
    }
    let acknowledged = segment.ack.wrapping_add(flow.fixed.ack_delta.get());
    let waiting = other.bits.get() & (bits::FIN_SEEN | bits::FIN_ACKED) == bits::FIN_SEEN;
    if waiting && !before(acknowledged, other.fin_end.get()) {
        other.bits.set(other.bits.get() | bits::FIN_ACKED);
    }
}

#[cfg(test)]
mod tests;
