//! ICMP errors about packets of a flow.

use core::ffi::c_void;
use core::mem::offset_of;

use aya_ebpf::helpers::{bpf_skb_load_bytes, bpf_skb_store_bytes};
use aya_ebpf::programs::TcContext;
use proxy_common::flow::{Conn, FlowRef, state};
use proxy_common::packet::headers::{Ethernet, Ipv4, Ipv6};
use proxy_common::packet::icmp::{IcmpError, IpHeader, is_outstanding};
use proxy_common::packet::seq;
use proxy_common::stat::Stat;

use super::stats::count;
use crate::maps::{STEER_CONNS, STEER_FLOWS4, STEER_FLOWS6};

/// Sends an ICMP error about a spliced packet on to the peer that had sent that packet. The verdict; `None` if
/// this is something else, or is for the local stack: not a byte of it was changed then.
///
/// Only errors about packets that are on their way are believed, so that the path of a stream cannot be made narrow
/// or broken by somebody who merely guesses its ports. In a hand-over, those about bytes of the proxy's own socket are
/// for the local stack alone, which will send them again; the sender has them acknowledged and would ignore
/// the error. So no error has two readers, and none is copied.
#[inline(never)]
pub(crate) fn translate(ctx: &TcContext) -> Option<i32> {
    let protocol_at = |offset: usize| ctx.load::<u8>(Ethernet::LEN + offset).ok();
    match ctx.load::<u16>(offset_of!(Ethernet, kind)).ok()? {
        Ethernet::IPV4 if protocol_at(offset_of!(Ipv4, protocol))? == Ipv4::ICMP => {
            translate_error::<Ipv4>(ctx)
        }
        Ethernet::IPV6 if protocol_at(offset_of!(Ipv6, next_header))? == Ipv6::ICMP => {
            translate_error::<Ipv6>(ctx)
        }
        _ => None,
    }
}

/// The flow maps.
trait Lookup: IpHeader {
    fn flow(key: &Self::Key) -> Option<FlowRef>;
}

impl Lookup for Ipv4 {
    #[inline(always)]
    fn flow(key: &Self::Key) -> Option<FlowRef> {
        // SAFETY: the value is copied at once, and never changes while the key is there.
        unsafe { STEER_FLOWS4.get(key) }.copied()
    }
}

impl Lookup for Ipv6 {
    #[inline(always)]
    fn flow(key: &Self::Key) -> Option<FlowRef> {
        // SAFETY: as above.
        unsafe { STEER_FLOWS6.get(key) }.copied()
    }
}

#[inline(always)]
fn translate_error<Ip: Lookup>(ctx: &TcContext) -> Option<i32> {
    let mut error = IcmpError::<Ip>::zeroed();
    load(ctx, &mut error, IcmpError::<Ip>::SHORT)?;
    if !error.is_about_tcp() {
        return None;
    }
    if error.quotes_tcp_header() {
        load(ctx, &mut error, IcmpError::<Ip>::LONG)?;
    }
    let back = Ip::flow(&error.key())?;
    let conn = STEER_CONNS.get_ptr(back.conn())?;
    // SAFETY: a record lives as long as the map. Others write it meanwhile, but each field that is read here is
    // an aligned word, or does not change while the flow is active.
    let conn = unsafe { &*conn };
    if !is_for_sender(conn, back, error.quoted_seq()) {
        count(Stat::IcmpPassed);
        return None;
    }
    let sent = &conn.flows[back.direction().opposite() as usize].fixed;
    let back = &conn.flows[back.direction() as usize].fixed;
    error.translate(sent, back);
    if store(ctx, &error).is_none() {
        count(Stat::IcmpPassed);
        return None;
    }
    count(Stat::IcmpTranslated);
    Some(super::forward::leave(ctx, back))
}

/// Whether `quoted_seq`, as it left the proxy, is of a spliced packet that is on its way.
#[inline(always)]
fn is_for_sender(conn: &Conn, back: FlowRef, quoted_seq: u32) -> bool {
    let sent = &conn.flows[back.direction().opposite() as usize];
    let back = &conn.flows[back.direction() as usize];
    let una = match conn.state {
        state::OFF | state::DEAD => return false,
        // What lies in front of `own_end` is the local socket's.
        state::HAND_OVER => seq::later(back.live.ack_end, back.live.own_end),
        _ => back.live.ack_end,
    };
    is_outstanding(quoted_seq, una, sent.live.seq_end.wrapping_add(sent.fixed.seq_delta))
}

/// Reads the first `len` bytes of an error, [`IcmpError::LONG`] at most.
#[inline(always)]
fn load<Ip: IpHeader>(ctx: &TcContext, error: &mut IcmpError<Ip>, len: usize) -> Option<()> {
    let to = (&raw mut *error).cast::<c_void>();
    // SAFETY: `to` is at least `len` bytes, all of which may hold anything: integers only.
    let result = unsafe { bpf_skb_load_bytes(ctx.skb.skb.cast(), Ethernet::LEN as u32, to, len as u32) };
    (result == 0).then_some(())
}

/// Writes an error back, as far as it was read. The checksums inside balance all changes, so the sum over the packet that a
/// network card may have made stays right.
#[inline(always)]
fn store<Ip: IpHeader>(ctx: &TcContext, error: &IcmpError<Ip>) -> Option<()> {
    let len = if error.quotes_tcp_header() { IcmpError::<Ip>::LONG } else { IcmpError::<Ip>::SHORT };
    let from = (&raw const *error).cast::<c_void>();
    // SAFETY: `from` is at least `len` bytes, all of them initialised.
    let result = unsafe { bpf_skb_store_bytes(ctx.skb.skb, Ethernet::LEN as u32, from, len as u32, 0) };
    (result == 0).then_some(())
}
