//! Packet splice: forwards the packets of a session from one peer to the other. What is done to a packet is written in
//! `proxy_common::packet`; here are packet access, maps and helpers.

mod access;
mod age;
mod copy;
mod flows;
mod forward;
mod icmp;
mod options;
mod own;
mod stats;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use proxy_common::packet::headers::{Ip, Ipv4, Ipv6, protocol};
use proxy_common::packet::icmp::IcmpIp;

use crate::packet::flows::Flows;

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
fn arrival<I: Flows + IcmpIp>(ctx: &TcContext) -> i32 {
    let Some(ip) = access::linear_ip::<I>(ctx) else { return PASS };
    match ip.protocol() {
        protocol::TCP if copy::is_copy(ctx) => copy::deliver::<I>(ctx),
        protocol::TCP => forward::packet::<I>(ctx, ip),
        other if other == I::ICMP => icmp::packet::<I>(ctx),
        _ => PASS,
    }
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
