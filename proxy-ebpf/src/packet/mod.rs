//! Packet splice: forwards the packets of a session from one peer to the other.

mod icmp;
mod stats;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;

/// Not ours: the next program decides, and if there is none the packet goes on.
pub(crate) const PASS: i32 = TC_ACT_UNSPEC;
pub(crate) const DROP: i32 = TC_ACT_SHOT as i32;

#[classifier]
fn packet_ingress(_ctx: TcContext) -> i32 {
    PASS
}

#[classifier]
fn packet_egress(_ctx: TcContext) -> i32 {
    PASS
}
