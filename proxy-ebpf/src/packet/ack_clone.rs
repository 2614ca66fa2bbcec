//! The hand-over: copies of acknowledgements for the proxy's own sockets, which wait until the last
//! bytes that they sent are acknowledged.
//!
//! A packet is marked and cloned to the ingress of its own interface. There the clone meets the
//! program again, which cuts the clone to a bare acknowledgement for the socket.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{BPF_F_INGRESS, bpf_sock, bpf_sock_tuple};
use aya_ebpf::helpers::{
    bpf_sk_release, bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes, bpf_skc_lookup_tcp,
    bpf_tcp_sock,
};
use aya_ebpf::programs::TcContext;
use bytemuck::Zeroable as _;
use proxy_common::flow::{flags, state};
use proxy_common::packet::checksum::Difference;
use proxy_common::packet::copy::{HEADER_WORDS, HeaderCopy};
use proxy_common::packet::headers::{Ethernet, Ip, Tcp, tcp_flags};
use proxy_common::stat::Stat;

use crate::packet::access::{self, at, checked, read, tcp_offset, uncovered};
use crate::packet::flows::{Flows, RecordHandle};
use crate::packet::stats::count;
use crate::packet::verdict::Verdict;

/// The mark of a copy.
#[inline(always)]
fn copy_mark() -> u32 {
    access::own_mark().wrapping_add(1)
}

/// Whether the packet is a copy.
#[inline(always)]
pub(super) fn is_copy(ctx: &TcContext) -> bool {
    access::mark(ctx) == copy_mark()
}

/// Sends the local stack a copy of an acknowledgement, if the record asks for it.
#[inline(always)]
pub(super) fn offer(ctx: &TcContext, record: &RecordHandle, record_state: u32, tcp: u8) {
    const RELEVANT: u8 = tcp_flags::SYN | tcp_flags::RST | tcp_flags::ACK;
    let wanted = record_state == state::HAND_OVER && record.flags() & flags::COPY_ACKS != 0;
    if !wanted || tcp & RELEVANT != tcp_flags::ACK {
        return;
    }
    let own = access::mark(ctx);
    ctx.set_mark(copy_mark());
    let sent = ctx.clone_redirect(access::ingress_ifindex(ctx), BPF_F_INGRESS.into());
    ctx.set_mark(own);
    count(if sent.is_ok() { Stat::Copied } else { Stat::CopyFailed });
}

/// The verdict on a copy: cut to size, and passed to the socket; or dropped, if the hand-over is
/// over or the socket is gone. A copy of a stream that has no record here is left to the programs of
/// another instance, which has the same marks by default. (Our own copies do not outlive a record.)
/// A function of its own in the program, so that it has its own stack.
#[inline(never)]
pub(super) fn deliver<I: Flows>(ctx: &TcContext) -> Verdict {
    let Some(key) = key::<I>(ctx) else { return Verdict::Pass };
    let Some(record) = I::find(&key).and_then(RecordHandle::of) else { return Verdict::Pass };
    if record.state() != state::HAND_OVER {
        return Verdict::LateCopy;
    }
    let Some(rcv_nxt) = rcv_nxt(ctx, key) else { return Verdict::LateCopy };
    match trim::<I>(ctx, rcv_nxt, record.arriving().live.own_end.get()) {
        Some(()) => Verdict::Copy,
        None => Verdict::BadCopy,
    }
}

/// The key of the flow to which the packet belongs.
#[inline(always)]
fn key<I: Flows>(ctx: &TcContext) -> Option<I::Key> {
    let ip = read::<I>(ctx, Ethernet::LEN)?;
    let tcp = read::<Tcp>(ctx, tcp_offset::<I>())?;
    Some(ip.key(tcp.ports))
}

/// The sequence number that the local socket expects; `None` if the socket is gone. (Then the
/// lookup finds the listener, and the stack would answer the copy with a RST.)
#[inline(always)]
fn rcv_nxt<K>(ctx: &TcContext, mut key: K) -> Option<u32> {
    const TCP_LISTEN: u32 = 10;
    let socket = Found::look_up(ctx, (&raw mut key).cast(), size_of::<K>() as u32)?;
    if socket.state() == TCP_LISTEN {
        return None;
    }
    socket.rcv_nxt()
}

/// A socket with a reference to it.
struct Found(*mut bpf_sock);

impl Found {
    /// A flow's key has the layout of the kernel's tuple: source, destination, ports of the packet.
    #[inline(always)]
    fn look_up(ctx: &TcContext, tuple: *mut bpf_sock_tuple, len: u32) -> Option<Self> {
        /// The namespace in which the program runs.
        const BPF_F_CURRENT_NETNS: u64 = u64::MAX;
        // SAFETY: `tuple` points to `len` bytes.
        let socket = unsafe { bpf_skc_lookup_tcp(ctx.as_ptr(), tuple, len, BPF_F_CURRENT_NETNS, 0) };
        if socket.is_null() { None } else { Some(Self(socket)) }
    }

    #[inline(always)]
    fn state(&self) -> u32 {
        // SAFETY: not null, and referenced until it is dropped.
        unsafe { (*self.0).state }
    }

    /// `None` for what is not a full socket (TIME_WAIT, a request).
    #[inline(always)]
    fn rcv_nxt(&self) -> Option<u32> {
        // SAFETY: as above.
        let tcp = unsafe { bpf_tcp_sock(self.0) };
        if tcp.is_null() {
            return None;
        }
        // SAFETY: checked; it lives as long as the reference.
        Some(unsafe { (*tcp).rcv_nxt })
    }
}

impl Drop for Found {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: the reference is given back once.
        unsafe { bpf_sk_release(self.0.cast()) };
    }
}

/// Cuts the payload off and makes the header fit the local socket.
#[inline(always)]
fn trim<I: Ip>(ctx: &TcContext, rcv_nxt: u32, own_end: u32) -> Option<()> {
    let len = read::<Tcp>(ctx, tcp_offset::<I>())?.header_len();
    let len = checked(len, Tcp::LEN as u32..=HEADER_WORDS as u32 * 4)?;
    let end = tcp_offset::<I>() as u32 + len;
    // SAFETY: the context is that of the running program.
    if unsafe { bpf_skb_change_tail(ctx.skb.skb, end, 0) } != 0 {
        return None;
    }
    ctx.pull_data(end).ok()?;
    let ip = at::<I>(ctx, Ethernet::LEN)?;
    // SAFETY: `at` has checked that the header is in the packet, to which nobody else has access.
    let ip = unsafe { &mut *ip };
    let mut change = ip.set_segment_len(len as u16).header;
    let pseudo_sum = ip.pseudo_sum(len as u16);
    change.add(trim_header(ctx, tcp_offset::<I>() as u32, len, |header| {
        header.trim(rcv_nxt, own_end, pseudo_sum)
    })?);
    // If the device made a sum, the kernel has corrected it for the payload that was cut off.
    uncovered(ctx, change.folded());
    Some(())
}

/// Changes the TCP header of `len` bytes at `offset` in a copy.
#[inline(always)]
fn trim_header(
    ctx: &TcContext,
    offset: u32,
    len: u32,
    trim: impl FnOnce(&mut HeaderCopy),
) -> Option<Difference> {
    let mut header = HeaderCopy::zeroed();
    let bytes = (&raw mut header).cast();
    // SAFETY: `header` has room for `len` bytes.
    if unsafe { bpf_skb_load_bytes(ctx.as_ptr(), offset, bytes, len) } != 0 {
        return None;
    }
    let mut change = Difference::default();
    header.0.iter().for_each(|word| change.replace(*word, 0));
    trim(&mut header);
    header.0.iter().for_each(|word| change.replace(0, *word));
    // SAFETY: as above.
    if unsafe { bpf_skb_store_bytes(ctx.skb.skb, offset, bytes, len, 0) } != 0 {
        return None;
    }
    Some(change)
}
