//! Packet splice: forwards the packets of a stream from one peer to the other. What is done to a
//! packet is written in `proxy_common::packet`; here are packet access, maps and helpers.

mod access;
mod ack_clone;
mod expiry;
mod family;
mod flows;
mod forward;
mod icmp;
mod local_stack;
mod odd;
mod offer;
mod options;
mod stats;
mod syn;
mod verdict;
mod verify;

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use proxy_common::packet::family::error::TooBig;
use proxy_common::packet::headers::{Ip, Ipv4, Ipv6, protocol};
use proxy_common::packet::shape::ShapedIp;

use crate::packet::flows::Flows;
use crate::packet::odd::Made;
use crate::packet::verdict::Verdict;
pub(crate) use crate::packet::verify::Chunk;

/// For what arrives: forwards a stream's packets, and lets everything else pass.
#[classifier]
fn packet_ingress(ctx: TcContext) -> i32 {
    let verdict = match access::kind(&ctx) {
        Ipv4::KIND => arrival::<Ipv4>(&ctx),
        Ipv6::KIND => arrival::<Ipv6>(&ctx),
        _ => Verdict::Pass,
    };
    verdict.conclude()
}

#[inline(always)]
fn arrival<I: Flows + ShapedIp + TooBig<Other: TooBig>>(ctx: &TcContext) -> Verdict {
    let mut flow = None;
    let mut is_odd = true;
    if let Some(ip) = access::linear_ip::<I>(ctx) {
        if ip.protocol() == protocol::TCP && ack_clone::is_copy(ctx) {
            return ack_clone::deliver::<I>(ctx);
        }
        if ip.is_plain_tcp() {
            flow = forward::flow::<I>(ctx, ip);
            is_odd = false;
        } else if ip.protocol() == I::ICMP {
            return match icmp::packet::<I>(ctx) {
                Verdict::OtherFamily => family::error::<I>(ctx),
                verdict => verdict,
            };
        } else if !ip.may_be_odd() {
            return Verdict::Pass;
        }
    }
    let mut made = Made::PLAIN;
    if is_odd {
        made = odd::packet::<I>(ctx);
        if let Some(verdict) = made.as_verdict() {
            return verdict;
        }
        flow = access::linear_ip::<I>(ctx).and_then(|ip| forward::flow::<I>(ctx, ip));
    }
    let Some(flow) = flow else {
        return if is_odd { Verdict::Pass } else { offer::packet::<I>(ctx) };
    };
    let verdict = forward::packet::<I>(ctx, flow);
    if verdict == Verdict::OtherFamily {
        // A first piece does not come here: see `odd::takes_pieces`.
        return family::packet::<I>(ctx, flow);
    }
    let is_whole = !made.is_first_piece() || odd::put_back::<I>(ctx, made) != 0;
    if is_whole { verdict } else { Verdict::NotRewritten }
}

/// For what leaves: looks after what the local stack sends on a stream's connections. Forwarded
/// packets pass here too.
#[classifier]
fn packet_egress(ctx: TcContext) -> i32 {
    let verdict = match access::kind(&ctx) {
        _ if access::is_forwarded(&ctx) => Verdict::Pass,
        Ipv4::KIND => local_stack::packet::<Ipv4>(&ctx),
        Ipv6::KIND => local_stack::packet::<Ipv6>(&ctx),
        _ => Verdict::Pass,
    };
    verdict.conclude()
}
