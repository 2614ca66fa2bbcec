//! Segments that Steer makes up itself, in the name of one peer of a spliced stream, for the other
//! peer: probes, acknowledgements and RSTs.

use proxy_common::flow::{Direction, Record, flags};
use proxy_common::packet::headers::tcp_flags;
use proxy_common::packet::rewrite::{self, Timestamps};
use proxy_common::packet::seq;
use proxy_common::shared::Share as _;
use steer_kernel::bpf::packet::Ends;
use steer_kernel::tcp::raw::Segment;

/// A keepalive probe for the peer that `from` comes from: an empty segment whose sequence number is
/// one before the number that the peer expects. The peer has to answer such a segment.
pub(super) fn probe(record: &Record, from: Direction) -> Segment {
    let expected = record.flows[from as usize].live.ack_end;
    segment(record, from, expected.wrapping_sub(1), tcp_flags::ACK)
}

/// An acknowledgement during the hand-over, for the peer that `from` comes from. It acknowledges
/// what the local socket has received (up to `received`) or what the other peer has acknowledged,
/// whichever is later. This peer discards the other peer's own acknowledgements while the other
/// peer has sent more than this peer's window lets in. Bytes that the sockets still hold can cause
/// that.
pub(super) fn acknowledgement(record: &Record, from: Direction, received: u32) -> Segment {
    let to = &record.flows[from.opposite() as usize];
    let forwarded = to.live.ack_end.wrapping_add(to.fixed.ack_delta);
    let ack = seq::later(forwarded, received);
    // A later acknowledgement makes the window smaller, so the right edge of the other peer's
    // window stays.
    let window = rewrite::window_less(to.live.window, ack.wrapping_sub(forwarded), &to.fixed.to_shared());
    let expected = record.flows[from as usize].live.ack_end;
    Segment { ack, window, ..segment(record, from, expected, tcp_flags::ACK) }
}

/// RSTs for the peer that `from` comes from. The peer accepts a RST only with the exact number that
/// it expects. That is the number that the peer acknowledged last or, if it has not acknowledged
/// everything yet, the number after everything that was sent to it.
pub(super) fn resets(record: &Record, from: Direction) -> impl Iterator<Item = Segment> {
    let acknowledged = record.flows[from as usize].live.ack_end;
    let to = &record.flows[from.opposite() as usize];
    let sent = to.live.seq_end.wrapping_add(to.fixed.seq_delta);
    let reset = move |seq| segment(record, from, seq, tcp_flags::RST | tcp_flags::ACK);
    [Some(acknowledged), (sent != acknowledged).then_some(sent)].into_iter().flatten().map(reset)
}

fn segment(record: &Record, from: Direction, seq: u32, flag_bits: u8) -> Segment {
    let ends = Ends::of(record, from);
    let to = &record.flows[from.opposite() as usize];
    let live = &record.flows[from as usize].live;
    let has_timestamps = record.flags & flags::TIMESTAMPS != 0;
    // Zero, which means no echo, while no timestamp of the peer is known.
    let echo = live.ts_value;
    Segment {
        source: ends.local,
        destination: ends.peer,
        seq,
        ack: live.seq_end,
        flags: flag_bits,
        window: rewrite::window(to.live.window, &to.fixed.to_shared()),
        timestamps: has_timestamps.then(|| (Timestamps::newest(&to.to_shared()), echo)),
    }
}
