//! Packet splice: forwards the packets of a session from one peer to the other.

mod icmp;
mod stats;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::bpf_redirect_neigh;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use proxy_common::flow::DirFixed;

/// Not ours: the next program decides, and if there is none the packet goes on.
pub(crate) const PASS: i32 = TC_ACT_UNSPEC;
pub(crate) const DROP: i32 = TC_ACT_SHOT as i32;

#[classifier]
fn packet_ingress(ctx: TcContext) -> i32 {
    icmp::translate(&ctx).unwrap_or(PASS)
}

/// Sends a packet of a flow, rewritten, on its way. The verdict.
#[inline(always)]
pub(crate) fn leave(_ctx: &TcContext, fixed: &DirFixed) -> i32 {
    // SAFETY: no address is given.
    unsafe { bpf_redirect_neigh(fixed.ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}

#[classifier]
fn packet_egress(_ctx: TcContext) -> i32 {
    PASS
}
