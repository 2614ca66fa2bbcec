//! The way of a packet through the splice.

use aya_ebpf::bindings::BPF_F_INGRESS;
use aya_ebpf::helpers::{bpf_jiffies64, bpf_ktime_get_coarse_ns, bpf_redirect, bpf_redirect_neigh};
use aya_ebpf::programs::TcContext;
use proxy_common::flow::{FlowRef, SharedFixed, event, flags, output, state};
use proxy_common::packet::checksum::Difference;
use proxy_common::packet::headers::{Ethernet, Ip, Tcp};
use proxy_common::packet::life::{self, Clock, Segment};
use proxy_common::packet::options::Translation;
use proxy_common::packet::rewrite::{self, Timestamps};
use proxy_common::stat::Stat;

use crate::packet::access::{self, at, tcp_offset, uncovered, view};
use crate::packet::flows::{Flows, RecordHandle};
use crate::packet::stats::{count, report};
use crate::packet::verdict::Verdict;
use crate::packet::{ack_clone, options, verify};

/// The flow of a plain TCP packet that arrives, to whose IP header `ip` points.
#[inline(always)]
pub(super) fn flow<I: Flows>(ctx: &TcContext, ip: &I) -> Option<FlowRef> {
    let tcp = view::<Tcp>(ctx, tcp_offset::<I>())?;
    I::find(&ip.key(tcp.ports))
}

/// The verdict on a plain packet of a flow. A function of its own in the program, like the others
/// that [`packet_ingress`] calls. So the functions do not share one stack frame, and packets that
/// are not ours skip this function.
///
/// [`packet_ingress`]: crate::packet::packet_ingress
#[inline(never)]
pub(super) fn packet<I: Flows>(ctx: &TcContext, flow: FlowRef) -> Verdict {
    let Some(record) = RecordHandle::of(flow) else { return Verdict::Pass };
    let record_state = record.state();
    match record_state {
        state::OFF => return Verdict::Off,
        state::DEAD => return Verdict::Dead,
        _ => {}
    }
    if !access::is_for_us(ctx) && !access::untag(ctx) {
        return Verdict::OddShape;
    }
    let Some(ip) = view::<I>(ctx, Ethernet::LEN) else { return Verdict::Pass };
    let Some(tcp) = view::<Tcp>(ctx, tcp_offset::<I>()) else { return Verdict::Pass };
    forward::<I>(ctx, &record, record_state, ip, tcp)
}

/// A packet of an active stream.
#[inline(always)]
fn forward<I: Flows>(
    ctx: &TcContext,
    record: &RecordHandle,
    record_state: u32,
    ip: &I,
    tcp: &Tcp,
) -> Verdict {
    let frame_len = ctx.len();
    let segment_len = ip.segment_len(frame_len - Ethernet::LEN as u32);
    let complete = segment_len <= frame_len.wrapping_sub(tcp_offset::<I>() as u32);
    let Some(segment) = Segment::new(tcp, segment_len).filter(|_| complete) else {
        return Verdict::OddShape;
    };
    if life::takes_tuple(record_state, record.flow.direction(), tcp.flags) {
        return reused::<I>(record.flow);
    }
    if record_state == state::RESET && record.flags() & flags::GIVEN_UP != 0 {
        return Verdict::Off;
    }
    // The views of the headers end here.
    let header_len = tcp.header_len();
    ack_clone::offer(ctx, record, record_state, tcp.flags);

    let header_end = tcp_offset::<I>() + header_len as usize;
    if ctx.data() + header_end > ctx.data_end() && ctx.pull_data(header_end as u32).is_err() {
        return Verdict::OddShape;
    }
    let believed = observe::<I>(ctx, record, record_state, &segment);
    match rewrite::<I>(ctx, record, record_state, header_len, believed) {
        Some(()) => leave(ctx, &record.arriving().fixed, Verdict::Spliced, Verdict::SplicedInPlace),
        None => Verdict::NotRewritten,
    }
}

/// The verdict on a SYN that takes the tuple of a stream that is over.
///
/// A function of its own in the program, so that its key takes no room on the stack of [`packet`].
/// The frames of a chain of calls, each rounded up to 32 bytes, may have 512 bytes together. (Linux
/// 6.8 refused 544, which 6.12 accepted.) The key comes from the record: if the context were an
/// argument, LLVM would pass the packet's two pointers instead, and the verifier would take these
/// for numbers.
#[inline(never)]
fn reused<I: Flows>(flow: FlowRef) -> Verdict {
    let Some(record) = RecordHandle::of(flow) else { return Verdict::Pass };
    I::forget(&I::key_of(record.shared(), flow.direction()));
    record.advance(state::DEAD);
    report(&record, event::REUSED);
    Verdict::Reused
}

/// Lets the record know of the segment; returns whether it is believed.
#[inline(always)]
fn observe<I: Flows>(ctx: &TcContext, record: &RecordHandle, record_state: u32, segment: &Segment) -> bool {
    if segment.is_an_end() && verify::is_damaged::<I>(ctx) {
        count(Stat::BadChecksum);
        return false;
    }
    let clock = Clock { tick: jiffies(), now_ns: coarse_ns };
    let observed = life::observe(record_state, segment, record.arriving(), record.other(), clock);
    if let Some(next) = observed.state {
        record.advance(next);
    }
    if let Some(kind) = observed.event {
        report(record, kind);
    }
    if let Some(stat) = observed.stat {
        count(stat);
    }
    observed.believed
}

/// The counter that drives the coarse clock. The kernel replaces the call by a load of the
/// variable.
#[inline(always)]
fn jiffies() -> u32 {
    // SAFETY: the helper has no conditions.
    unsafe { bpf_jiffies64() as u32 }
}

/// CLOCK_MONOTONIC_COARSE.
#[inline(always)]
pub(super) fn coarse_ns() -> u64 {
    // SAFETY: the helper has no conditions.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// Rewrites the packet for the other connection. `None`: the kernel refused in the middle, and the
/// packet is unusable.
#[inline(always)]
fn rewrite<I: Ip>(
    ctx: &TcContext,
    record: &RecordHandle,
    record_state: u32,
    header_len: u32,
    believed: bool,
) -> Option<()> {
    let mut to = Translation::of(record.flags(), record.arriving(), record.other());
    let is_unsettled = believed && !to.timestamps.is_known() && to.has(flags::TIMESTAMPS);
    if is_unsettled && let Some(value) = options::ts_value::<I>(ctx, header_len, &mut to)? {
        to.timestamps.settle(record.arriving(), value, || record.state());
    }
    let options = options::translate::<I>(ctx, header_len, &to)?;
    if let (Some(value), true) = (options.ts_value, believed) {
        Timestamps::note(record.arriving(), value);
    }
    let received = record.other().fixed.received.get();
    headers::<I>(
        ctx,
        &record.arriving().fixed,
        to.has(flags::STRIP_ECN),
        record_state,
        received,
        options.change,
    )
}

/// Rewrites all headers and checksums; `received` is for [`rewrite::tcp`], `options` is what the
/// TCP options have changed.
#[inline(always)]
fn headers<I: Ip>(
    ctx: &TcContext,
    fixed: &SharedFixed,
    strip_ecn: bool,
    record_state: u32,
    received: u32,
    options: Difference,
) -> Option<()> {
    let ip = at::<I>(ctx, Ethernet::LEN)?;
    // SAFETY: `at` has checked that the header is in the packet, to which nobody else has access.
    let ip = unsafe { &mut *ip };
    let change = ip.readdress(&fixed.to_source, &fixed.to_destination, strip_ecn);
    let tcp = at::<Tcp>(ctx, tcp_offset::<I>())?;
    // SAFETY: as above; it does not overlap the IP header.
    let tcp = unsafe { &mut *tcp };
    let tcp_change = rewrite::tcp(tcp, fixed, strip_ecn, record_state, received);
    if change.ecn_stripped || tcp_change.ecn_stripped {
        count(Stat::EcnStripped);
    }
    // The field holds a complete checksum, or only the sum over the pseudo header, which a device
    // completes. Only the kernel knows which. The code changes the field as if it held the
    // pseudo-header sum. The helper does nothing to such a sum; for a complete checksum the helper
    // adds what is missing: all other changes, and twice the change of the pseudo header, which
    // went the wrong way.
    tcp.check = change.pseudo.add_to(tcp.check);
    let mut lacking = tcp_change.fields;
    for other in [options, change.pseudo, change.pseudo] {
        lacking.add(other);
    }
    ctx.l4_csum_replace(tcp_offset::<I>() + Tcp::CHECK, 0, lacking.folded().into(), 0).ok()?;
    let whole = I::of_whole_packet(&change);
    if whole != Difference::default() {
        uncovered(ctx, whole.folded());
    }
    Some(())
}

/// Sends a rewritten packet on its way. Returns `redirected`, or `in_place` if the local stack
/// delivers the packet, or [`Verdict::OtherFamily`] if the packet is of the wrong IP version.
#[inline(always)]
pub(super) fn leave(ctx: &TcContext, fixed: &SharedFixed, redirected: Verdict, in_place: Verdict) -> Verdict {
    // The helpers only note where the packet is to go, and refuse nothing but flags that they do
    // not know.
    match fixed.output.get() {
        output::IN_PLACE => in_place,
        output::OTHER_FAMILY | output::OTHER_FAMILY_LOOPBACK => Verdict::OtherFamily,
        output::LOOPBACK => to_loopback(ctx, fixed, redirected),
        _ => to_neighbour(fixed, redirected),
    }
}

/// [`leave`] for a packet that is now of the other IP version.
#[inline(always)]
pub(super) fn leave_changed(ctx: &TcContext, fixed: &SharedFixed, redirected: Verdict) -> Verdict {
    match fixed.output.get() {
        output::OTHER_FAMILY_LOOPBACK => to_loopback(ctx, fixed, redirected),
        _ => to_neighbour(fixed, redirected),
    }
}

#[inline(always)]
fn to_neighbour(fixed: &SharedFixed, redirected: Verdict) -> Verdict {
    // SAFETY: the helper has no conditions; the packet is dropped if there is no such interface.
    // Without parameters the next hop is looked up.
    let _ = unsafe { bpf_redirect_neigh(fixed.ifindex.get(), core::ptr::null_mut(), 0, 0) };
    redirected
}

#[inline(always)]
fn to_loopback(ctx: &TcContext, fixed: &SharedFixed, redirected: Verdict) -> Verdict {
    if zero_mac_addresses(ctx).is_none() {
        return Verdict::NotRewritten;
    }
    // SAFETY: as above.
    let _ = unsafe { bpf_redirect(fixed.ifindex.get(), BPF_F_INGRESS.into()) };
    redirected
}

/// On loopback, a packet with other MAC addresses counts as somebody else's and is discarded.
#[inline(always)]
fn zero_mac_addresses(ctx: &TcContext) -> Option<()> {
    let addresses = at::<[u16; 6]>(ctx, 0)?;
    // SAFETY: `at` has checked that they are in the packet.
    unsafe { addresses.write([0; 6]) };
    Some(())
}
