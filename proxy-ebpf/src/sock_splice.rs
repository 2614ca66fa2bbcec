//! Socket splice: moves what a socket receives to its peer socket.
//!
//! Runs under the source socket's lock, so one flow is never handled by two CPUs at once.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::sk_action::{SK_DROP, SK_PASS};
use aya_ebpf::helpers::bpf_get_socket_cookie;
use aya_ebpf::macros::stream_verdict;
use aya_ebpf::programs::SkBuffContext;
use proxy_common::sock::{SockEvent, SockFlow, Step, event, gate, step};

use crate::maps::{SOCK_CREDIT, SOCK_EVENTS, SOCK_FLOW, SOCK_TARGET};

#[stream_verdict]
fn sock_splice(ctx: SkBuffContext) -> u32 {
    let len = ctx.len();
    if len == 0 {
        // A FIN without data. Redirected, it would break the target (EPIPE); dropped here it has
        // still ended the source's receiving side, which userspace learns by EPOLLRDHUP.
        return SK_DROP;
    }
    redirect(&ctx, len);
    // Redirected, or left to the flow's own socket where userspace reads it. Never dropped: the
    // sender has had its acknowledgement.
    SK_PASS
}

#[inline(always)]
fn redirect(ctx: &SkBuffContext, len: u32) {
    // SAFETY: the context is the one that this program was called with.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let Some(flow) = SOCK_FLOW.get_ptr_mut(cookie) else { return };
    // SAFETY: map values stay allocated while a program runs, and only this program writes this
    // one, on one CPU at a time.
    let flow = unsafe { &mut *flow };
    // SAFETY: a value that userspace replaces whole; an older one is freed after this program ran.
    let Some(credit) = (unsafe { SOCK_CREDIT.get(cookie) }) else {
        return shut(ctx, flow, cookie, gate::CREDIT);
    };

    match step(flow, credit, len) {
        Step::Pass => {}
        Step::ShutGate => shut(ctx, flow, cookie, gate::CREDIT),
        Step::Redirect { total, warn } => {
            if SOCK_TARGET.redirect_skb(ctx, cookie, 0) != i64::from(SK_PASS) {
                return shut(ctx, flow, cookie, gate::NO_TARGET);
            }
            flow.bytes = total;
            if warn {
                send(cookie, event::WARN);
            }
        }
    }
}

#[inline(always)]
fn shut(_ctx: &SkBuffContext, flow: &mut SockFlow, cookie: u64, why: u32) {
    flow.gate = why;
    #[cfg(feature = "log")]
    aya_log_ebpf::debug!(_ctx, "flow {} leaves the splice, gate {}", cookie, why);
    send(cookie, event::GATE);
}

#[inline(always)]
fn send(cookie: u64, kind: u32) {
    // The ring has room for all events that can be under way (`SOCK_EVENTS_BYTES`).
    if let Some(mut entry) = SOCK_EVENTS.reserve::<SockEvent>(0) {
        entry.write(SockEvent { cookie, kind, _pad: 0 });
        entry.submit(0);
    }
}
