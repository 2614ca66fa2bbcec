//! ICMP errors about packets that were spliced.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::BPF_F_RECOMPUTE_CSUM;
use aya_ebpf::helpers::{bpf_skb_load_bytes, bpf_skb_store_bytes};
use aya_ebpf::programs::TcContext;
use proxy_common::flow::{SharedFixed, output, state};
use proxy_common::packet::family::error::TooBig;
use proxy_common::packet::headers::Ethernet;
use proxy_common::packet::icmp::{IcmpError, IcmpIp, is_outstanding};
use proxy_common::packet::seq;

use crate::packet::flows::{Flows, RecordHandle};
use crate::packet::verdict::Verdict;
use crate::packet::{access, forward};

/// The verdict on an ICMP packet that arrives: an error about a spliced packet goes on to the peer
/// that had sent that packet, all others pass untouched.
///
/// Only errors about packets that are on their way are believed. So nobody who merely guesses ports
/// can shrink the MTU of a stream's path, or break the stream. In a hand-over, an error about bytes
/// of the proxy's own socket is for the local stack alone, which sends these bytes again; the
/// peer's copy of them was acknowledged long ago, so the peer would ignore the error. So each error
/// has one receiver, and none is copied.
///
/// [`Verdict::OtherFamily`]: the error is for a peer of the other IP version, and unchanged.
// A function of its own in the program, for its own stack.
#[inline(never)]
pub(super) fn packet<I: Flows + TooBig>(ctx: &TcContext) -> Verdict {
    let Some(error) = read::<I>(ctx) else { return Verdict::Pass };
    let Some(record) = I::find(&error.key()).and_then(RecordHandle::of) else { return Verdict::Pass };
    if !access::is_for_us(ctx) || !is_for_sender(&record, error.quoted_seq()) {
        return Verdict::IcmpPassed;
    }
    let (sent, back) = (&record.other().fixed, &record.arriving().fixed);
    if output::is_other_family(back.output.get()) {
        return if I::mtu(&error.icmp).is_some() { Verdict::OtherFamily } else { Verdict::IcmpPassed };
    }
    send(ctx, error, sent, back).unwrap_or(Verdict::IcmpPassed)
}

/// An error about a TCP packet.
#[inline(always)]
pub(super) fn read<I: IcmpIp>(ctx: &TcContext) -> Option<IcmpError<I>> {
    let mut error = IcmpError::<I>::zeroed();
    load(ctx, &mut error, IcmpError::<I>::SHORT)?;
    if !error.is_about_tcp() {
        return None;
    }
    if error.quotes_tcp_header() {
        load(ctx, &mut error, IcmpError::<I>::LONG)?;
    }
    Some(error)
}

/// Whether `quoted_seq`, as it left the proxy, is of a spliced packet that is on its way. The
/// direction is that of packets from the host to which the quoted packet was sent.
#[inline(always)]
fn is_for_sender(record: &RecordHandle, quoted_seq: u32) -> bool {
    let (back, sent) = (record.arriving(), record.other());
    let una = match record.state() {
        state::OFF | state::DEAD => return false,
        // Bytes before `own_end` belong to the local socket.
        state::HAND_OVER => seq::later(back.live.ack_end.get(), back.live.own_end.get()),
        _ => back.live.ack_end.get(),
    };
    is_outstanding(quoted_seq, una, sent.live.seq_end.get().wrapping_add(sent.fixed.seq_delta.get()))
}

/// Translates an error and sends it to the peer; `None` if the kernel refuses to change the packet.
#[inline(always)]
fn send<I: IcmpIp>(
    ctx: &TcContext,
    mut error: IcmpError<I>,
    sent: &SharedFixed,
    back: &SharedFixed,
) -> Option<Verdict> {
    error.translate(sent, back);
    store(ctx, &error)?;
    Some(forward::leave(ctx, back, Verdict::Icmp, Verdict::IcmpInPlace))
}

/// Reads the first `len` bytes of an error, [`IcmpError::LONG`] at most.
#[inline(always)]
fn load<I: IcmpIp>(ctx: &TcContext, error: &mut IcmpError<I>, len: usize) -> Option<()> {
    let to = (&raw mut *error).cast();
    // SAFETY: `to` has room for `len` bytes, which may hold anything: integers only.
    let result = unsafe { bpf_skb_load_bytes(ctx.as_ptr(), Ethernet::LEN as u32, to, len as u32) };
    (result == 0).then_some(())
}

/// Writes an error back, as far as it was read.
#[inline(always)]
fn store<I: IcmpIp>(ctx: &TcContext, error: &IcmpError<I>) -> Option<()> {
    let len = if error.quotes_tcp_header() { IcmpError::<I>::LONG } else { IcmpError::<I>::SHORT };
    let (from, flags) = ((&raw const *error).cast(), u64::from(BPF_F_RECOMPUTE_CSUM));
    // SAFETY: `from` is at least `len` bytes, all of them initialised.
    let result = unsafe { bpf_skb_store_bytes(ctx.skb.skb, Ethernet::LEN as u32, from, len as u32, flags) };
    (result == 0).then_some(())
}
