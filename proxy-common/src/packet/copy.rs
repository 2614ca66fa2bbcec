//! The hand-over: the proxy's sockets still wait for acknowledgements, and still send, while the
//! programs already forward the packets. So the sockets get copies of the acknowledgements, and the
//! programs bring the sockets' packets up to date.

use crate::flow::SharedFlow;
use crate::packet::checksum;
use crate::packet::headers::{Tcp, tcp_flags};
use crate::packet::options::{SackBlock, SackHead, TimestampsOption};
use crate::packet::rewrite::{self, Timestamps};
use crate::packet::seq;

/// Words of the longest TCP header.
pub const HEADER_WORDS: usize = 15;

/// A word of options without any effect (RFC 9293, 3.1).
const NOPS: u32 = 0x0101_0101;

/// A TCP header with its options, for the local socket. The rest of the array after the header is
/// zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct HeaderCopy(pub [u32; HEADER_WORDS]);

impl HeaderCopy {
    /// Turns the header into an acknowledgement without payload that the local socket accepts. The
    /// acknowledgement has the number that the socket expects (`rcv_nxt`), and acknowledges nothing
    /// beyond `own_end`, the end of what the socket was given to send. SACK blocks stay: without
    /// them the socket would recover from losses by timeout only. Timestamps are removed, if they
    /// stand where Linux writes them. They echo other timestamps than the socket gave its packets
    /// ([`freshen`]). And copies may overtake each other on their way to the socket, which would
    /// then refuse one as too old. (Linux takes segments without timestamps:
    /// `tcp_validate_incoming`.) `pseudo_sum` is that of a segment of this header alone. Host
    /// order.
    #[inline(always)]
    pub fn trim(&mut self, rcv_nxt: u32, own_end: u32, pseudo_sum: u64) {
        let (tcp, options) = self.0.split_at_mut(Tcp::LEN / 4);
        tcp[1] = rcv_nxt.to_be();
        tcp[2] = seq::earlier(u32::from_be(tcp[2]), own_end).to_be();
        let [offset, _, window @ ..] = tcp[3].to_ne_bytes();
        tcp[3] = u32::from_ne_bytes([offset, tcp_flags::ACK, window[0], window[1]]);
        // No checksum yet, and no urgent pointer.
        tcp[4] = 0;
        clip_sack(options, u32::from(offset >> 4) * 4, own_end);
        if options[0] == TimestampsOption::HEAD {
            options[..TimestampsOption::LEN / 4].fill(NOPS);
        }
        let sum = self.0.iter().fold(pseudo_sum, |sum, word| sum + u64::from(*word));
        self.0[4] = u32::from(checksum::finish(sum));
    }
}

/// Ends the SACK blocks at `own_end`. In unusual places they are left alone: the socket ignores a
/// block that goes beyond what it has sent.
#[inline(always)]
fn clip_sack(options: &mut [u32], header_len: u32, own_end: u32) {
    const AFTER_TIMESTAMPS: usize = TimestampsOption::LEN / 4;
    if options[0] == TimestampsOption::HEAD {
        clip_blocks::<AFTER_TIMESTAMPS>(options, header_len, own_end);
    } else {
        clip_blocks::<0>(options, header_len, own_end);
    }
}

#[inline(always)]
fn clip_blocks<const HEAD: usize>(options: &mut [u32], header_len: u32, own_end: u32) {
    let len = header_len.wrapping_sub((Tcp::LEN + HEAD * 4) as u32);
    let blocks = SackHead(options[HEAD]).blocks(len);
    for block in 0..SackHead::MAX_BLOCKS {
        let at = HEAD + 1 + 2 * block;
        if block as u32 >= blocks || at + 1 >= options.len() {
            break;
        }
        let mut sack = SackBlock { left: options[at], right: options[at + 1] };
        sack.clip(own_end);
        options[at + 1] = sack.right;
    }
}

/// The number for a RST to the peer from which `arriving` comes: the number that this peer expects.
/// The kernel sends the RST, with the number `own`, when it closes the local socket because the
/// process ends in the hand-over. (All numbers are host order.)
#[inline(always)]
pub fn reset_seq(own: u32, arriving: &SharedFlow, forwarded: &SharedFlow) -> u32 {
    let here = |number: u32| number.wrapping_add(forwarded.fixed.seq_delta.get());
    // Data that the other peer's socket received, but that this socket was not given, is lost. This
    // peer expects the number at which that data would start.
    if seq::before(own, here(forwarded.fixed.received.get())) {
        return own;
    }
    seq::later(seq::later(own, here(forwarded.live.seq_end.get())), arriving.live.ack_end.get())
}

/// The fields of a packet of the local socket as it leaves. Wire order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fresh {
    /// The socket's own number. But if the packet is a bare acknowledgement, and the socket has
    /// sent all of its bytes: the number after the last byte that was forwarded to the peer, unless
    /// that number is beyond the peer's window.
    pub seq: u32,
    /// The socket's own acknowledgement, or the last one that was forwarded to the peer if that one
    /// is later.
    pub ack: u32,
    /// What the other peer offers, in the units of this connection, less the bytes that `ack` has
    /// acknowledged and the other peer has not.
    pub window: u16,
    /// The TSval, if there are timestamps.
    pub ts_value: u32,
}

/// Brings a packet of the local socket with `payload` bytes up to date with what `flow` has
/// forwarded, or had said before, to its peer, from which `back` comes: nothing less is
/// acknowledged (Linux discards data with an acknowledgement that is a window old), and no more is
/// let in than the sender of `flow` can take. The socket has room of its own, but does not receive
/// any more.
///
/// Bytes leave with the floor of the timestamps, as all that is forwarded in the hand-over. An
/// acknowledgement when all has been sent is said in the name of the sender of `flow`: with its
/// latest number and timestamp.
#[inline(always)]
pub fn freshen(header: &Tcp, payload: u32, flow: &SharedFlow, back: &SharedFlow) -> Fresh {
    let seq = u32::from_be(header.seq);
    let is_bare = payload == 0 && header.flags & (tcp_flags::SYN | tcp_flags::FIN | tcp_flags::RST) == 0;
    // Before the number: the number that belongs to it is there first.
    let newest = Timestamps::newest(flow);
    let (seq, ts_value) = if is_bare && seq == back.live.own_end.get() {
        (latest_seq(seq, flow, back), newest)
    } else {
        (seq, flow.fixed.ts_floor.get())
    };
    let forwarded = flow.live.ack_end.get().wrapping_add(flow.fixed.ack_delta.get());
    let ack = seq::later(forwarded, u32::from_be(header.ack));
    // What the socket has acknowledged beyond that still has to go to the sender.
    let window = rewrite::window_less(flow.live.window.get(), ack.wrapping_sub(forwarded), &flow.fixed);
    Fresh { seq: seq.to_be(), ack: ack.to_be(), window: window.to_be(), ts_value: ts_value.to_be() }
}

/// What the sender of `flow` would send next, as its peer counts, or `own`: that peer discards what
/// lies beyond its window.
#[inline(always)]
fn latest_seq(own: u32, flow: &SharedFlow, back: &SharedFlow) -> u32 {
    let sent = flow.live.seq_end.get().wrapping_add(flow.fixed.seq_delta.get());
    let window = u32::from(back.live.window.get()) << (back.fixed.window_left.get() & 15);
    if seq::after(sent, back.live.ack_end.get().wrapping_add(window)) { own } else { seq::later(own, sent) }
}
