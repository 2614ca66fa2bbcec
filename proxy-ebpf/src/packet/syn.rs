//! The SYN of a connection to an endpoint that is to have no timestamps. The endpoint does not see
//! an offer, so its SYN-ACK has no timestamps, and the socket that has offered them goes on without
//! (tcp_rcv_synsent_state_process).

use aya_ebpf::programs::TcContext;
use proxy_common::packet::headers::{Ethernet, Tcp};
use proxy_common::packet::syn::SynOptions;

use crate::packet::access::{read, tcp_offset};
use crate::packet::flows::Flows;
use crate::packet::verdict::Verdict;

/// The verdict on a SYN that [may offer
/// timestamps](proxy_common::packet::syn::may_offer_timestamps), of a socket that has the mark for
/// this. A SYN in another layout than that of Linux passes as it is: the stream is relayed then.
#[inline(always)]
pub(super) fn without_timestamps<I: Flows>(ctx: &TcContext) -> Verdict {
    let Some(ip) = read::<I>(ctx, Ethernet::LEN) else { return Verdict::Pass };
    if !ip.is_plain_tcp() {
        return Verdict::Pass;
    }
    let offset = tcp_offset::<I>();
    let Some(options) = read::<SynOptions>(ctx, offset + Tcp::LEN) else { return Verdict::Pass };
    let Some((plain, change)) = options.without_timestamps() else { return Verdict::Pass };
    let at = offset + Tcp::LEN + core::mem::offset_of!(SynOptions, timestamps);
    if ctx.store(at, &plain, 0).is_err() {
        // Nothing was written.
        return Verdict::Pass;
    }
    // The checksum of a SYN is usually left to the device (CHECKSUM_PARTIAL). Then the field has the
    // sum of the pseudo header only, and the helper changes nothing.
    match ctx.l4_csum_replace(offset + Tcp::CHECK, 0, change.folded().into(), 0) {
        Ok(()) => Verdict::SynPlain,
        Err(_) => Verdict::NotRewritten,
    }
}
