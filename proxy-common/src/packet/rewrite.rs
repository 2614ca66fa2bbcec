//! From the numbers of one TCP connection to those of the other.

use crate::flow::{DirFixed, Flow, state, ts_state};
use crate::packet::checksum::Difference;
use crate::packet::headers::{Tcp, tcp_flags};
use crate::packet::seq::{self, after};

/// What became of a TCP header.
#[derive(Debug, Clone, Copy)]
pub struct TcpChange {
    /// Without the options, which are not touched here.
    pub fields: Difference,
    pub ecn_stripped: bool,
}

/// Ports, seq, ack, window and (on request) the ECN bits; not the checksum.
///
/// In a hand-over (by `session_state`) nothing below `received` is acknowledged ([`DirFixed::received`] of the opposite
/// direction): that is what the local socket has acknowledged already, and Linux discards data with an acknowledgement that is
/// a window old.
#[inline(always)]
pub fn tcp(
    header: &mut Tcp,
    fixed: &DirFixed,
    strip_ecn: bool,
    session_state: u32,
    received: u32,
) -> TcpChange {
    let old = *header;
    header.ports = fixed.to_ports;
    header.seq = u32::from_be(old.seq).wrapping_add(fixed.seq_delta).to_be();
    let mut taken = 0;
    if old.flags & tcp_flags::ACK != 0 {
        let ack = u32::from_be(old.ack).wrapping_add(fixed.ack_delta);
        let raised = if session_state == state::HAND_OVER { seq::later(ack, received) } else { ack };
        taken = raised.wrapping_sub(ack);
        header.ack = raised.to_be();
    }
    if old.flags & tcp_flags::SYN == 0 {
        header.window = window_less(u16::from_be(old.window), taken, fixed).to_be();
    }
    const ECN: u8 = tcp_flags::ECE | tcp_flags::CWR;
    let ecn_stripped = strip_ecn && old.flags & ECN != 0;
    if ecn_stripped {
        header.flags &= !ECN;
    }

    let mut fields = Difference::default();
    fields.replace(old.ports, header.ports);
    fields.replace(old.seq, header.seq);
    fields.replace(old.ack, header.ack);
    fields.replace(flags_and_window(&old), flags_and_window(header));
    TcpChange { fields, ecn_stripped }
}

/// The word with the flags, the window in its second half.
#[inline(always)]
fn flags_and_window(header: &Tcp) -> u32 {
    u32::from(u16::from_ne_bytes([header.offset, header.flags])) + (u32::from(header.window) << 16)
}

/// From the peer's scale to that of the outgoing connection (host order). Rounds down, as TCP itself does, but never to
/// nothing: see [`window_less`].
#[inline(always)]
pub fn window(window: u16, fixed: &DirFixed) -> u16 {
    window_less(window, 0, fixed)
}

/// What is left of a window when bytes of it are taken by others.
///
/// What is less than one unit of the outgoing scale becomes one unit. As zero it could stay so for ever: a receiver that
/// waits for the rest of a message, for which it has just room, opens its window no further. A sender that is told too much
/// may send up to one unit beyond the window. The receiver takes what fits and discards the rest, or (Linux since 6.17, if
/// something waits to be read) discards the whole segment; either way it answers with the window that it has, and the
/// sender repeats the rest when its timer says so, in the rhythm of a probe. So nothing is lost. But it is slow, and a
/// stream whose windows are always so small is not spliced (`Reason::Window`).
#[inline(always)]
pub fn window_less(window: u16, bytes: u32, fixed: &DirFixed) -> u16 {
    let left = (u32::from(window) << (fixed.window_left & 15)).saturating_sub(bytes);
    let scaled = left >> (fixed.window_right & 15);
    if scaled == 0 && left > 0 {
        return 1;
    }
    if scaled > 0xffff { 0xffff } else { scaled as u16 }
}

/// How the timestamps of one packet are translated.
///
/// Plain words, all of them initialised: the program copies the value from its stack to a map, and verifiers before Linux
/// 6.3 refuse to read a byte of the stack that nothing was written to, as those of padding or of a `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Timestamps {
    /// 1: the TSval is `value + number`. 0: it is `number` itself.
    fixed: u32,
    number: u32,
    /// 1: `echo` is known. 0: the TSecr is zero.
    echo_known: u32,
    /// Subtracted from the TSecr.
    echo: u32,
}

impl Timestamps {
    /// Of a packet of `flow`, `other` being the opposite direction. Until a delta is fixed, packets are stamped with the
    /// clock of the proxy's own socket, so that its packets and the spliced ones follow one clock. `clock_ms` is
    /// CLOCK_MONOTONIC in milliseconds.
    #[inline(always)]
    pub fn of(flow: &Flow, other: &Flow, clock_ms: impl FnOnce() -> u32) -> Self {
        let fixed = flow.live.ts_state == ts_state::FIXED;
        let number = if fixed { flow.fixed.ts_delta } else { clock_ms().wrapping_add(flow.fixed.ts_offset) };
        let echo_known = u32::from(other.live.ts_state != ts_state::UNKNOWN);
        Self { fixed: u32::from(fixed), number, echo_known, echo: other.fixed.ts_delta }
    }

    /// The TSval that leaves (host order).
    #[inline(always)]
    pub fn value(&self, value: u32) -> u32 {
        if self.fixed == 1 { value.wrapping_add(self.number) } else { self.number }
    }

    /// The TSecr that leaves (host order). Zero, which Linux takes for none, while the other direction's delta is unknown.
    #[inline(always)]
    pub fn echo(&self, echo: u32) -> u32 {
        if self.echo_known == 1 { echo.wrapping_sub(self.echo) } else { 0 }
    }

    /// Keeps what a believed packet of `flow` with this TSval has shown, in this state of the session. (A forged one must
    /// not fix the delta: the receiver would discard every later segment as old.)
    ///
    /// Stamping makes a packet as new as its arrival, so what comes behind it must be translated as if it had come no less
    /// late. With the delta of a packet that was quicker (another CPU took it, and it was sent later), one that it has
    /// overtaken would be older than what the receiver has, and be discarded.
    #[inline(always)]
    pub fn note(&self, flow: &mut Flow, session_state: u32, value: u32) {
        flow.live.ts_value = value;
        if self.fixed == 0 {
            let delta = self.number.wrapping_sub(value);
            if flow.live.ts_state == ts_state::UNKNOWN || after(delta, flow.fixed.ts_delta) {
                flow.fixed.ts_delta = delta;
            }
            flow.live.ts_state =
                if session_state == state::HAND_OVER { ts_state::STAMPED } else { ts_state::FIXED };
        }
    }
}
