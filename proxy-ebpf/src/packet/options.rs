//! TCP options in a packet.

use core::ffi::c_void;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::{bpf_loop, bpf_skb_load_bytes, bpf_skb_store_bytes};
use aya_ebpf::programs::TcContext;
use proxy_common::flow::flags;
use proxy_common::packet::checksum::Difference;
use proxy_common::packet::headers::{Ip, Tcp};
use proxy_common::packet::options::{MAX_LEN, SackBlock, SackHead, TimestampsOption, Translation, Walk};
use proxy_common::stat::Stat;

use crate::has_loop;
use crate::maps::STEER_OPTIONS;
use crate::packet::access::{at, checked, read, tcp_offset};
use crate::packet::stats::count;

/// What became of the options.
#[derive(Clone, Copy, Default)]
pub(super) struct Translated {
    pub(super) change: Difference,
    /// The TSval as it was (host order), if there was one.
    pub(super) ts_value: Option<u32>,
}

/// Translates the options of a TCP header of `header_len` bytes (20 to 60), which is linear.
/// `None`: the kernel refused.
#[inline(always)]
pub(super) fn translate<I: Ip>(ctx: &TcContext, header_len: u32, to: &Translation) -> Option<Translated> {
    let mut all = Translated::default();
    let mut offset = tcp_offset::<I>() + Tcp::LEN;
    let mut left = header_len - Tcp::LEN as u32;
    if left >= TimestampsOption::LEN as u32
        && let Some((change, value)) = timestamps(ctx, offset, to)
    {
        all = Translated { change, ts_value: Some(value) };
        offset += TimestampsOption::LEN;
        left -= TimestampsOption::LEN as u32;
    }
    if left == 0 {
        return Some(all);
    }
    if let Some(change) = sack(ctx, offset, left, to) {
        all.change.add(change);
        return Some(all);
    }
    let rest = unusual(ctx, offset, left, to)?;
    all.change.add(rest.change);
    all.ts_value = all.ts_value.or(rest.ts_value);
    Some(all)
}

/// The TSval (host order) of a TCP header as [`translate`] takes it, if it has one; the packet is
/// left as it is.
#[inline(always)]
pub(super) fn ts_value<I: Ip>(ctx: &TcContext, header_len: u32, to: &mut Translation) -> Option<Option<u32>> {
    let offset = tcp_offset::<I>() + Tcp::LEN;
    let len = header_len - Tcp::LEN as u32;
    if len < TimestampsOption::LEN as u32 {
        return Some(None);
    }
    let option = read::<TimestampsOption>(ctx, offset)?;
    if option.head == TimestampsOption::HEAD {
        return Some(Some(u32::from_be(option.value)));
    }
    // Without a copy, since the stack is short.
    to.set_only_looks(true);
    let found = unusual(ctx, offset, len, to);
    to.set_only_looks(false);
    found.map(|found| found.ts_value)
}

/// Translates timestamps if they stand at `offset` as usual.
#[inline(always)]
fn timestamps(ctx: &TcContext, offset: usize, to: &Translation) -> Option<(Difference, u32)> {
    let option = at::<TimestampsOption>(ctx, offset)?;
    // SAFETY: `at` has checked that the bytes are in the packet, to which nobody else has access.
    let option = unsafe { &mut *option };
    let usual = option.head == TimestampsOption::HEAD && to.has(flags::TIMESTAMPS);
    usual.then(|| option.translate(&to.timestamps))
}

/// Translates SACK blocks if they stand at `offset` as usual and fill the rest of the options.
#[inline(always)]
fn sack(ctx: &TcContext, offset: usize, len: u32, to: &Translation) -> Option<Difference> {
    let blocks = read::<SackHead>(ctx, offset)?.blocks(len);
    if blocks == 0 || !to.has(flags::SACK) {
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
        change.add(block.translate(to.ack_delta));
    }
    Some(change)
}

/// Translates any other layout: the `len` bytes of options from `offset` on, in a copy. (Kernels
/// before Linux 5.17 have no bpf_loop, and their verifier gives up on any other loop over options.
/// There all of the options become NOPs.) A function of its own in the program, as it is long and
/// rarely called.
#[inline(never)]
fn unusual(ctx: &TcContext, offset: usize, len: u32, to: &Translation) -> Option<Translated> {
    let len = checked(len, 1..=MAX_LEN as u32)?;
    // SAFETY: this CPU's own value; nothing else uses it while the program runs.
    let walk = unsafe { &mut *STEER_OPTIONS.get_ptr_mut(0)? };
    walk.restart(len, to);
    let bytes = (&raw mut walk.words).cast();
    // SAFETY: `words` has room for `len` bytes.
    let loaded = unsafe { bpf_skb_load_bytes(ctx.as_ptr(), offset as u32, bytes, len) };
    if loaded != 0 {
        return None;
    }
    let mut change = Difference::default();
    walk.words.iter().for_each(|word| change.replace(*word, 0));
    if has_loop() {
        let mut argument = &raw mut *walk;
        // SAFETY: `step` takes what it is given here, and is not called after this.
        unsafe { bpf_loop(len, step as *mut c_void, (&raw mut argument).cast(), 0) };
    } else {
        walk.blank_all();
    }
    if to.only_looks() {
        return Some(Translated { change: Difference::default(), ts_value: walk.ts_value });
    }
    walk.words.iter().for_each(|word| change.replace(0, *word));
    // SAFETY: as above.
    let stored = unsafe { bpf_skb_store_bytes(ctx.skb.skb, offset as u32, bytes, len, 0) };
    if stored != 0 {
        return None;
    }
    count(Stat::OptionsSlow);
    if walk.blanked {
        count(Stat::OptionsBlanked);
    }
    Some(Translated { change, ts_value: walk.ts_value })
}

/// What bpf_loop calls with the number of the round; returns 1 to end it. The argument is a pointer
/// to a pointer, as the kernel wants one to the stack.
unsafe extern "C" fn step(round: u64, walk: *mut *mut Walk) -> u64 {
    // SAFETY: `unusual` hands its own variable over.
    let walk = unsafe { *walk };
    // SAFETY: it points to a live value, which `unusual` does not touch meanwhile.
    let walk = unsafe { &mut *walk };
    u64::from(!walk.step(round as usize))
}
