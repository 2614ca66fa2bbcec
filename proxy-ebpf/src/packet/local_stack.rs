//! What the local stack sends on the connections of a stream.

use aya_ebpf::programs::TcContext;
use proxy_common::flow::{event, flags, state};
use proxy_common::packet::checksum::Difference;
use proxy_common::packet::copy;
use proxy_common::packet::headers::{Ethernet, Tcp, tcp_flags};
use proxy_common::packet::life;
use proxy_common::packet::options::TimestampsOption;
use proxy_common::packet::rewrite::Timestamps;
use proxy_common::packet::syn::may_offer_timestamps;
use proxy_common::stat::Stat;

use crate::packet::access::{self, read, tcp_offset};
use crate::packet::flows::{Flows, RecordHandle};
use crate::packet::stats::{count, report};
use crate::packet::syn;
use crate::packet::verdict::Verdict;

/// The verdict on a packet of the local stack.
#[inline(always)]
pub(super) fn packet<I: Flows>(ctx: &TcContext) -> Verdict {
    let Some(tcp) = read::<Tcp>(ctx, tcp_offset::<I>()) else { return Verdict::Pass };
    let is_reset = tcp.flags & tcp_flags::RST != 0;
    let mark = access::mark(ctx);
    if mark == access::syn_mark() && may_offer_timestamps(&tcp) {
        return syn::without_timestamps::<I>(ctx);
    }
    let is_own = mark == access::own_mark();
    let accepts = life::accepts_a_connection(tcp.flags);
    if !is_reset && !is_own && !accepts {
        return Verdict::Pass;
    }
    let Some(record) = record_of::<I>(ctx, &tcp) else { return Verdict::Pass };
    let record_state = record.state();
    if accepts {
        return another_connection::<I>(ctx, &record, record_state, &tcp);
    }
    if is_reset && is_own && matches!(record_state, state::HAND_OVER | state::RESET) {
        return match last_word::<I>(ctx, &record, record_state, &tcp) {
            Some(()) => Verdict::Pass,
            None => Verdict::NotRewritten,
        };
    }
    if record_state == state::OFF && !is_reset {
        raise_floor::<I>(ctx, &record);
        return Verdict::Pass;
    }
    if !matches!(record_state, state::HAND_OVER | state::SPLICED) {
        return Verdict::Pass;
    }
    if is_reset {
        // The stream lives. (A process that ends a stream takes its state further before the RST.)
        // The RST is of a socket that is being closed, or the stack knows no socket.
        let reset_seq = u32::from_be(tcp.seq);
        let is_peers = life::answers_the_peer(tcp.flags, reset_seq, record.arriving(), record.other());
        if is_own || record_state != state::SPLICED || !is_peers {
            return Verdict::StackReset;
        }
        give_up(&record);
        return Verdict::GivenUp;
    }
    match freshen::<I>(ctx, &record, &tcp) {
        Some(()) => Verdict::Freshened,
        None => Verdict::NotRewritten,
    }
}

/// The local stack accepts another connection with the tuple of a stream: the client has reset its
/// first connection and has taken the same port again. Userspace has not noticed this yet. From now
/// on no packet of the client leads to the record.
#[inline(always)]
fn another_connection<I: Flows>(
    ctx: &TcContext,
    record: &RecordHandle,
    record_state: u32,
    tcp: &Tcp,
) -> Verdict {
    let mut is_active = record_state == state::HAND_OVER;
    if record_state == state::OFF {
        is_active = record.bury() == state::HAND_OVER;
    } else if !is_active {
        return Verdict::Pass;
    }
    let Some(ip) = read::<I>(ctx, Ethernet::LEN) else { return Verdict::Pass };
    I::forget(&ip.answer_key(tcp.ports));
    if is_active {
        // The endpoint does not know yet that the stream has ended.
        record.advance(state::RESET);
        report(record, event::RESET);
    }
    Verdict::Reused
}

/// The RST of a socket that the kernel closes in the hand-over because the process has ended. What
/// the process had read is lost, so the stream is over, and both peers are to know at once. (A
/// process that ends a stream by itself takes its state further, or its keys out, before.) `None`:
/// the packet is in pieces.
#[inline(always)]
fn last_word<I: Flows>(ctx: &TcContext, record: &RecordHandle, record_state: u32, tcp: &Tcp) -> Option<()> {
    if record_state == state::HAND_OVER {
        // If more data is under way, the RST does not have the number that the peer expects. Then
        // the peer answers, and that answer gets a RST with the right number.
        record.add_flags(flags::GIVEN_UP);
        record.advance(state::RESET);
        report(record, event::RESET);
        count(Stat::OwnerDied);
    }
    let seq = copy::reset_seq(u32::from_be(tcp.seq), record.arriving(), record.other()).to_be();
    let mut change = Difference::default();
    change.replace(tcp.seq, seq);
    let offset = tcp_offset::<I>();
    ctx.store(offset + core::mem::offset_of!(Tcp, seq), &seq, 0).ok()?;
    ctx.l4_csum_replace(offset + Tcp::CHECK, 0, change.folded().into(), 0).ok()
}

/// The local stack got a packet that the ingress program cannot carry, or has not seen. The stream
/// would stall, and nobody would be told, so the stream ends. This peer learns of the end by the
/// stack's RST, whose number is exact. The other peer learns of the end from userspace, or from the
/// answer to its next packet.
#[inline(always)]
fn give_up(record: &RecordHandle) {
    record.add_flags(flags::GIVEN_UP | flags::not_carried(record.flow.direction()));
    record.advance(state::RESET);
    report(record, event::RESET);
}

/// The record of the stream to whose peer the packet goes.
#[inline(always)]
fn record_of<I: Flows>(ctx: &TcContext, tcp: &Tcp) -> Option<RecordHandle> {
    let ip = read::<I>(ctx, Ethernet::LEN)?;
    if !ip.is_plain_tcp() {
        return None;
    }
    I::find(&ip.answer_key(tcp.ports)).and_then(RecordHandle::of)
}

/// Brings numbers, window and timestamp up to date. Writes with helpers, not in place: a program
/// that writes in place makes the kernel prepare every packet for that. `None`: the kernel refused
/// in the middle, and the packet is unusable.
#[inline(always)]
fn freshen<I: Flows>(ctx: &TcContext, record: &RecordHandle, tcp: &Tcp) -> Option<()> {
    let offset = tcp_offset::<I>();
    // What was last forwarded to this peer came from the other peer.
    let forwarded = record.other();
    let ip = read::<I>(ctx, Ethernet::LEN)?;
    let payload = ip.segment_len(ctx.len() - Ethernet::LEN as u32).wrapping_sub(tcp.header_len());
    let fresh = copy::freshen(tcp, payload, forwarded, record.arriving());
    let mut change = Difference::default();
    change.replace(tcp.seq, fresh.seq);
    change.replace(tcp.ack, fresh.ack);
    change.replace(tcp.window.into(), fresh.window.into());
    if record.flags() & flags::TIMESTAMPS != 0 {
        change.add(stamp(ctx, offset + Tcp::LEN, fresh.ts_value)?);
    }
    ctx.store(offset + core::mem::offset_of!(Tcp, seq), &fresh.seq, 0).ok()?;
    ctx.store(offset + core::mem::offset_of!(Tcp, ack), &fresh.ack, 0).ok()?;
    ctx.store(offset + core::mem::offset_of!(Tcp, window), &fresh.window, 0).ok()?;
    ctx.l4_csum_replace(offset + Tcp::CHECK, 0, change.folded().into(), 0).ok()
}

/// A packet of the socket goes out just before its record becomes active: no later timestamp than
/// the floor may have left then.
#[inline(always)]
fn raise_floor<I: Flows>(ctx: &TcContext, record: &RecordHandle) {
    let flow = record.other();
    if flow.fixed.ts_floor.get() == 0 {
        return;
    }
    let Some(option) = read::<TimestampsOption>(ctx, tcp_offset::<I>() + Tcp::LEN) else { return };
    if option.head == TimestampsOption::HEAD {
        Timestamps::raise_floor(flow, u32::from_be(option.value));
    }
}

/// Gives timestamps at `offset`, where Linux writes them, this TSval (wire order).
#[inline(always)]
fn stamp(ctx: &TcContext, offset: usize, value: u32) -> Option<Difference> {
    let mut change = Difference::default();
    let Some(option) = read::<TimestampsOption>(ctx, offset) else { return Some(change) };
    if option.head == TimestampsOption::HEAD {
        change.replace(option.value, value);
        ctx.store(offset + core::mem::offset_of!(TimestampsOption, value), &value, 0).ok()?;
    }
    Some(change)
}
