//! The SYN of a client whose connection is to have no timestamps, since the endpoints have none.
//! The local stack does not see the offer, so its SYN-ACK has no timestamps, and the client goes on
//! without.

use core::ffi::c_void;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::bpf_skb_load_bytes;
use aya_ebpf::programs::TcContext;
use proxy_common::packet::headers::{Ethernet, Ip, Tcp};
use proxy_common::packet::offer::{self, NOPS, OFFER_LEN};
use proxy_common::packet::options::MAX_LEN;

use crate::maps::STEER_NO_STAMPS;
use crate::packet::access::{checked, tcp_offset, view};
use crate::packet::forward::coarse_ns;
use crate::packet::verdict::Verdict;

/// The verdict on a plain packet of no flow. A function of its own in the program, for its own
/// stack.
#[inline(never)]
pub(super) fn packet<I: Ip>(ctx: &TcContext) -> Verdict {
    let Some(ip) = view::<I>(ctx, Ethernet::LEN) else { return Verdict::Pass };
    let Some(tcp) = view::<Tcp>(ctx, tcp_offset::<I>()) else { return Verdict::Pass };
    if !offer::may_offer(tcp) || ip.segment_len(ctx.len() - Ethernet::LEN as u32) < tcp.header_len() {
        return Verdict::Pass;
    }
    let len = tcp.header_len() - Tcp::LEN as u32;
    // SAFETY: an element of a map without preallocation is freed after the programs that see it,
    // and the kernel replaces the element as a whole.
    let until = unsafe { STEER_NO_STAMPS.get(ip.local_end(tcp.ports)) };
    if until.is_none_or(|until| until.is_over(coarse_ns())) {
        return Verdict::Pass;
    }
    let Some(place) = find::<I>(ctx, len) else { return Verdict::Pass };
    overwrite::<I>(ctx, place)
}

/// Where the offer stands in the `len` bytes of options.
#[inline(always)]
fn find<I: Ip>(ctx: &TcContext, len: u32) -> Option<u32> {
    let len = checked(len, OFFER_LEN as u32..=MAX_LEN as u32)?;
    let mut options = [0_u8; MAX_LEN];
    let to: *mut c_void = (&raw mut options).cast();
    // SAFETY: `options` has room for `len` bytes.
    let loaded = unsafe { bpf_skb_load_bytes(ctx.as_ptr(), (tcp_offset::<I>() + Tcp::LEN) as u32, to, len) };
    if loaded != 0 {
        return None;
    }
    offer::find(&options, len)
}

/// Replaces the offer at `place` of the options by NOPs.
#[inline(always)]
fn overwrite<I: Ip>(ctx: &TcContext, place: u32) -> Verdict {
    let tcp = tcp_offset::<I>();
    let at = tcp + Tcp::LEN + place as usize;
    let Ok(offer) = ctx.load::<[u8; OFFER_LEN]>(at) else { return Verdict::Pass };
    if ctx.store(at, &NOPS, 0).is_err() {
        // Nothing was written.
        return Verdict::Pass;
    }
    // If the packet comes from this host, its checksum may be left to a device (CHECKSUM_PARTIAL).
    // Then the helper changes nothing. If the device has summed up the packet, that sum stays
    // right, since the checksum compensates the change.
    let change = offer::change(&offer, place).folded();
    match ctx.l4_csum_replace(tcp + Tcp::CHECK, 0, change.into(), 0) {
        Ok(()) => Verdict::SynPlainIn,
        Err(_) => Verdict::NotRewritten,
    }
}
