//! ICMP errors about packets of a flow.

use aya_ebpf::programs::TcContext;

/// The verdict on an ICMP or ICMPv6 packet that arrives, `None` if it does not concern a flow.
#[inline(always)]
pub(crate) fn translate(_ctx: &TcContext) -> Option<i32> {
    None
}
