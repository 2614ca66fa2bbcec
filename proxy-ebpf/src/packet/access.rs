//! Access to the packet and what the kernel knows about it.

use core::hint::black_box;
use core::ops::RangeInclusive;

use aya_ebpf::helpers::{bpf_csum_update, bpf_skb_vlan_pop};
use aya_ebpf::programs::TcContext;
use bytemuck::Pod;
use proxy_common::packet::headers::{Ethernet, Ip, Tcp};

use crate::MARK;

/// Where the TCP header starts after an IP header without options.
pub(super) const fn tcp_offset<I: Ip>() -> usize {
    Ethernet::LEN + I::LEN
}

/// The bytes of the packet from `offset` on as a `T`, if they are there and linear. The pointer is
/// good until the next helper that may move the packet; the verifier sees to that.
///
/// BPF loads and stores need no alignment, and the kernel aligns network headers where the machine
/// wants it.
#[inline(always)]
pub(super) fn at<T: Pod>(ctx: &TcContext, offset: usize) -> Option<*mut T> {
    let start = ctx.data() + offset;
    if start + size_of::<T>() > ctx.data_end() {
        return None;
    }
    Some(start as *mut T)
}

/// What stands at `offset`, in place. Valid as long as the pointer from [`at`].
#[inline(always)]
pub(super) fn view<T: Pod>(ctx: &TcContext, offset: usize) -> Option<&T> {
    let place = at::<T>(ctx, offset)?;
    // SAFETY: `at` has checked that the bytes belong to the packet, and every bit pattern is a `T`.
    Some(unsafe { &*place })
}

/// A copy of what stands at `offset`.
#[inline(always)]
pub(super) fn read<T: Pod>(ctx: &TcContext, offset: usize) -> Option<T> {
    view(ctx, offset).copied()
}

/// The IP header, made linear together with as many following bytes as a TCP header has. `None` if
/// the packet is shorter.
#[inline(always)]
pub(super) fn linear_ip<I: Ip>(ctx: &TcContext) -> Option<&I> {
    let needed = tcp_offset::<I>() + Tcp::LEN;
    if ctx.data() + needed > ctx.data_end() {
        ctx.pull_data(needed as u32).ok()?;
    }
    view::<I>(ctx, Ethernet::LEN)
}

/// The network protocol, [`Ip::KIND`] if it is one of ours.
#[inline(always)]
pub(super) fn kind(ctx: &TcContext) -> u16 {
    ctx.skb.protocol() as u16
}

/// Whether the packet came in from an interface (also if it was rewritten since) and is not of the
/// local stack.
#[inline(always)]
pub(super) fn is_forwarded(ctx: &TcContext) -> bool {
    // The kernel sets this field when a packet arrives. A packet of the local stack starts with
    // zero.
    ingress_ifindex(ctx) != 0
}

/// The interface by which the packet came in.
#[inline(always)]
pub(super) fn ingress_ifindex(ctx: &TcContext) -> u32 {
    // SAFETY: the context is that of the running program.
    unsafe { (*ctx.skb.skb).ingress_ifindex }
}

/// The packet's mark.
#[inline(always)]
pub(super) fn mark(ctx: &TcContext) -> u32 {
    // SAFETY: as above.
    unsafe { (*ctx.skb.skb).mark }
}

/// The mark of the proxy's own sockets during a hand-over.
#[inline(always)]
pub(super) fn own_mark() -> u32 {
    // SAFETY: a constant, but one that userspace sets after the compiler has seen it.
    unsafe { (&raw const MARK).read_volatile() }
}

/// The mark of the proxy's own sockets whose SYN is to leave without timestamps.
#[inline(always)]
pub(super) fn syn_mark() -> u32 {
    proxy_common::abi::syn_mark(own_mark())
}

/// Corrects the sum that the receiving device may have made over the packet, for a change that no
/// checksum in the packet compensates.
#[inline(always)]
pub(super) fn uncovered(ctx: &TcContext, change: u32) {
    // The helper fails if the device made no sum. Then there is nothing to correct. SAFETY: the
    // context is that of the running program.
    let _ = unsafe { bpf_csum_update(ctx.skb.skb, change) };
}

/// Whether the packet is addressed to this host, on the interface itself and not on one of its
/// VLANs.
#[inline(always)]
pub(super) fn is_for_us(ctx: &TcContext) -> bool {
    const PACKET_HOST: u32 = 0;
    // SAFETY: as above.
    let kind = unsafe { (*ctx.skb.skb).pkt_type };
    // SAFETY: as above.
    let vlan = unsafe { (*ctx.skb.skb).vlan_present };
    kind == PACKET_HOST && vlan == 0
}

/// Removes a priority tag (IEEE 802.1Q with VLAN 0), which puts a packet into no VLAN. Returns
/// whether the packet is [for us](is_for_us). Moves the packet.
#[inline(always)]
pub(super) fn untag(ctx: &TcContext) -> bool {
    const VLAN: u32 = 0x0fff;
    // SAFETY: as above.
    let tag = unsafe { (*ctx.skb.skb).vlan_tci };
    // SAFETY: the context is that of the running program. Without a tag the helper does nothing.
    tag & VLAN == 0 && unsafe { bpf_skb_vlan_pop(ctx.skb.skb) } == 0 && is_for_us(ctx)
}

/// `len`, if it is in the range, in a way that convinces every verifier.
///
/// The function compares once, and compares the number that is used afterwards. LLVM merges two
/// comparisons into one of a copy (`len - start < size`). Verifiers before Linux 6.18 do not apply
/// the bound of the copy to `len`, and so see a helper called with an unbounded length. Therefore
/// the function subtracts first, hides the difference from LLVM with `black_box`, compares, and
/// adds again.
#[inline(always)]
pub(super) fn checked(len: u32, range: RangeInclusive<u32>) -> Option<u32> {
    let (start, end) = range.into_inner();
    let above = black_box(len.wrapping_sub(start));
    if above > end - start {
        return None;
    }
    Some(above + start)
}
