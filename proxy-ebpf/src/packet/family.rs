//! Packets that go from an IPv4 peer to an IPv6 peer, or the other way.

use aya_ebpf::bindings::{BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM};
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_skb_change_tail};
use aya_ebpf::programs::TcContext;
use proxy_common::flow::FlowRef;
use proxy_common::packet::checksum::Difference;
use proxy_common::packet::family::OtherFamily;
use proxy_common::packet::family::error::{ShortError, TooBig};
use proxy_common::packet::headers::{Ethernet, Ip, Ipv6, Tcp};

use crate::packet::access::{at, read, tcp_offset};
use crate::packet::flows::{Flows, RecordHandle};
use crate::packet::verdict::Verdict;
use crate::packet::{forward, icmp};

/// Turns a rewritten packet of the flow into one of the other IP version, and sends it on its way.
///
/// A function of its own in the program, which [`packet_ingress`] calls after [`forward::packet`]:
/// so it has its own stack, and costs the other packets nothing.
///
/// [`packet_ingress`]: crate::packet::packet_ingress
#[inline(never)]
pub(super) fn packet<I: Flows + OtherFamily>(ctx: &TcContext, flow: FlowRef) -> Verdict {
    let Some(record) = RecordHandle::of(flow) else { return Verdict::NotRewritten };
    let fixed = &record.arriving().fixed;
    let lacks = I::lacks(&fixed.to_source, &fixed.to_destination);
    let Some(ip) = read::<I>(ctx, Ethernet::LEN) else { return Verdict::NotRewritten };
    // Only IPv4 has an identification.
    // SAFETY: the helper has no conditions.
    let id = if I::KIND == Ipv6::KIND { unsafe { bpf_get_prandom_u32() } } else { 0 } as u16;
    // SAFETY: the context is that of the running program.
    let gso_size = unsafe { (*ctx.skb.skb).gso_size };
    let ip = ip.in_other_family(&fixed.to_source, &fixed.to_destination, gso_size, id);
    match replace::<I>(ctx, &ip, lacks) {
        Some(()) => forward::leave_changed(ctx, fixed, Verdict::Spliced),
        None => Verdict::NotRewritten,
    }
}

/// Turns an ICMP error into one for the sender of the quoted packet, which is of the other IP
/// version, and sends it on its way. [`icmp::packet`] has checked that the sender should get it.
#[inline(never)]
pub(super) fn error<I: Flows + TooBig<Other: TooBig>>(ctx: &TcContext) -> Verdict {
    let Some(error) = icmp::read::<I>(ctx) else { return Verdict::IcmpPassed };
    let Some(record) = I::find(&error.key()).and_then(RecordHandle::of) else {
        return Verdict::IcmpPassed;
    };
    let (sent, back) = (&record.other().fixed, &record.arriving().fixed);
    let Some(error) = error.in_other_family(sent, back) else { return Verdict::IcmpPassed };
    match replace_all::<I>(ctx, &error) {
        Some(()) => forward::leave_changed(ctx, back, Verdict::Icmp),
        None => Verdict::NotRewritten,
    }
}

/// Replaces the packet by the error. `None`: the kernel refused, and the packet is unusable.
#[inline(always)]
fn replace_all<I: OtherFamily<Other: TooBig>>(ctx: &TcContext, error: &ShortError<I::Other>) -> Option<()> {
    let kind = <I::Other as Ip>::KIND;
    let len = Ethernet::LEN + ShortError::<I::Other>::LEN;
    ctx.change_proto(kind, 0).ok()?;
    // SAFETY: the context is that of the running program.
    if unsafe { bpf_skb_change_tail(ctx.skb.skb, len as u32, 0) } != 0 {
        return None;
    }
    set_kind(ctx, kind)?;
    ctx.store(Ethernet::LEN, error, BPF_F_RECOMPUTE_CSUM.into()).ok()
}

/// The helper that changes the IP version does not change Ethernet's header, which loopback reads.
#[inline(always)]
fn set_kind(ctx: &TcContext, kind: u16) -> Option<()> {
    let place = at::<u16>(ctx, core::mem::offset_of!(Ethernet, kind))?;
    // SAFETY: `at` has checked that the field is in the packet, to which nobody else has access.
    unsafe { place.write(kind) };
    Some(())
}

/// Replaces the IP header. `None`: the kernel refused, and the packet is unusable.
#[inline(always)]
fn replace<I: OtherFamily>(ctx: &TcContext, ip: &I::Other, lacks: Difference) -> Option<()> {
    let kind = <I::Other as Ip>::KIND;
    // The segments of a super-packet keep their size.
    ctx.change_proto(kind, 0).ok()?;
    set_kind(ctx, kind)?;
    ctx.store(Ethernet::LEN, ip, BPF_F_RECOMPUTE_CSUM.into()).ok()?;
    if lacks == Difference::default() {
        return Some(());
    }
    // The helper knows whether the field has a checksum, or the sum over the pseudo header, and
    // corrects what the device has summed up.
    let check = tcp_offset::<I::Other>() + Tcp::CHECK;
    ctx.l4_csum_replace(check, 0, lacks.folded().into(), BPF_F_PSEUDO_HDR.into()).ok()
}
