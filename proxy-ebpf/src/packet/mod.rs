//! Packet splice: forwards the packets of a session from one peer to the other. What is done to a packet is written in
//! `proxy_common::packet`; here are packet access, maps and helpers.

mod access;
mod age;
mod copy;
mod flows;
mod forward;
mod icmp;
mod odd;
mod options;
mod own;
mod stats;
mod verify;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use proxy_common::packet::headers::{Ip, Ipv4, Ipv6, protocol};
use proxy_common::packet::icmp::IcmpIp;
use proxy_common::packet::shape::ShapedIp;

use crate::packet::flows::Flows;
use crate::packet::odd::Made;
pub(crate) use crate::packet::verify::Chunk;

/// Not for us: another program of the hook decides, and if there is none the packet goes on.
pub(crate) const PASS: i32 = TC_ACT_UNSPEC;
pub(crate) const DROP: i32 = TC_ACT_SHOT as i32;

/// For what arrives: forwards a session's packets, and lets everything else pass.
#[classifier]
fn packet_ingress(ctx: TcContext) -> i32 {
    match access::kind(&ctx) {
        Ipv4::KIND => arrival::<Ipv4>(&ctx),
        Ipv6::KIND => arrival::<Ipv6>(&ctx),
        _ => PASS,
    }
}

#[inline(always)]
fn arrival<I: Flows + IcmpIp + ShapedIp>(ctx: &TcContext) -> i32 {
    let mut flow = None;
    let mut is_odd = true;
    if let Some(ip) = access::linear_ip::<I>(ctx) {
        if ip.protocol() == protocol::TCP && copy::is_copy(ctx) {
            return copy::deliver::<I>(ctx);
        }
        if ip.is_plain_tcp() {
            flow = forward::flow::<I>(ctx, ip);
            is_odd = false;
        } else if ip.protocol() == I::ICMP {
            return icmp::packet::<I>(ctx);
        } else if !ip.may_be_odd() {
            return PASS;
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
    let Some(flow) = flow else { return PASS };
    let verdict = forward::packet::<I>(ctx, flow);
    if made.is_first_piece() && odd::put_back::<I>(ctx, made) == 0 { DROP } else { verdict }
}

/// For what leaves: looks after what the local stack sends on a session's connections. Forwarded packets pass here too.
#[classifier]
fn packet_egress(ctx: TcContext) -> i32 {
    if access::is_forwarded(&ctx) {
        return PASS;
    }
    match access::kind(&ctx) {
        Ipv4::KIND => own::packet::<Ipv4>(&ctx),
        Ipv6::KIND => own::packet::<Ipv6>(&ctx),
        _ => PASS,
    }
}
