//! TCP options in a packet.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::{bpf_skb_load_bytes, bpf_skb_store_bytes};
use aya_ebpf::programs::TcContext;
use proxy_common::packet::checksum::Difference;
use proxy_common::packet::headers::{Ip, Tcp};
use proxy_common::packet::options::{MAX_LEN, Options, SackBlock, SackHead, TimestampsOption};
use proxy_common::packet::rewrite::Timestamps;
use proxy_common::stat::Stat;

use crate::packet::access::{at, read, tcp_offset};
use crate::packet::stats::count;

/// What is to be translated; `None`: overwritten.
pub(super) struct Translation<'a> {
    pub(super) timestamps: Option<&'a Timestamps>,
    /// Added to the edges of SACK blocks.
    pub(super) sack: Option<u32>,
}

/// What became of the options.
#[derive(Clone, Copy, Default)]
pub(super) struct Translated {
    pub(super) change: Difference,
    /// The TSval as it was (host order), if there was one.
    pub(super) ts_value: Option<u32>,
}

/// Translates the options of a TCP header of `header_len` bytes (20 to 60), which is linear. `None`: the kernel refused.
#[inline(always)]
pub(super) fn translate<I: Ip>(ctx: &TcContext, header_len: u32, to: &Translation<'_>) -> Option<Translated> {
    let first = tcp_offset::<I>() + Tcp::LEN;
    let len = header_len - Tcp::LEN as u32;
    if len == 0 {
        return Some(Translated::default());
    }
    let Some((translated, value)) = timestamps(ctx, first, to.timestamps) else {
        let change = sack(ctx, first, len, to.sack);
        return match change {
            Some(change) => Some(Translated { change, ts_value: None }),
            None => unusual(ctx, first, len, to),
        };
    };
    let (behind, left) = (first + TimestampsOption::LEN, len.wrapping_sub(TimestampsOption::LEN as u32));
    let mut all = Translated { change: translated, ts_value: Some(value) };
    if left == 0 {
        return Some(all);
    }
    let rest = match sack(ctx, behind, left, to.sack) {
        Some(change) => change,
        None => unusual(ctx, behind, left, to)?.change,
    };
    all.change.add(rest);
    Some(all)
}

/// Translates timestamps if they stand at `offset` as usual.
#[inline(always)]
fn timestamps(ctx: &TcContext, offset: usize, to: Option<&Timestamps>) -> Option<(Difference, u32)> {
    let option = at::<TimestampsOption>(ctx, offset)?;
    // SAFETY: `at` has checked that the bytes are in the packet, to which nobody else has access.
    let option = unsafe { &mut *option };
    if option.head != TimestampsOption::HEAD {
        return None;
    }
    Some(option.translate(to?))
}

/// Translates SACK blocks if they stand at `offset` as usual and fill the rest of the options.
#[inline(always)]
fn sack(ctx: &TcContext, offset: usize, len: u32, delta: Option<u32>) -> Option<Difference> {
    let delta = delta?;
    let blocks = read::<SackHead>(ctx, offset)?.blocks(len);
    if blocks == 0 {
        return None;
    }
    let mut change = Difference::default();
    for i in 0..SackHead::MAX_BLOCKS {
        if i as u32 >= blocks {
            break;
        }
        let block = at::<SackBlock>(ctx, offset + SackHead::LEN + i * SackBlock::LEN)?;
        // SAFETY: as above.
        let block = unsafe { &mut *block };
        change.add(block.translate(delta));
    }
    Some(change)
}

/// Translates any other layout: the `len` bytes of options from `offset` on, in a copy. A function of its own in the
/// program, as it is long and rarely called.
#[inline(never)]
fn unusual(ctx: &TcContext, offset: usize, len: u32, to: &Translation<'_>) -> Option<Translated> {
    if len == 0 || len > MAX_LEN as u32 {
        return None;
    }
    let mut options = Options::default();
    let bytes = (&raw mut options).cast();
    // SAFETY: `options` has room for `len` bytes.
    let loaded = unsafe { bpf_skb_load_bytes(ctx.as_ptr(), offset as u32, bytes, len) };
    if loaded != 0 {
        return None;
    }
    let result = options.translate(len, to.timestamps, to.sack);
    // SAFETY: as above.
    let stored = unsafe { bpf_skb_store_bytes(ctx.skb.skb, offset as u32, bytes, len, 0) };
    if stored != 0 {
        return None;
    }
    count(Stat::OptionsSlow);
    if result.blanked {
        count(Stat::OptionsBlanked);
    }
    Some(Translated { change: result.change, ts_value: result.ts_value })
}
