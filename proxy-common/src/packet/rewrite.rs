//! Translates the numbers of one TCP connection to those of the other.

use crate::flow::{SharedFixed, SharedFlow, state};
use crate::packet::checksum::Difference;
use crate::packet::headers::{Tcp, tcp_flags};
use crate::packet::seq::{self, after};
use crate::shared::Word;

/// What became of a TCP header.
#[derive(Debug, Clone, Copy)]
pub struct TcpChange {
    /// Without the options, which are not touched here.
    pub fields: Difference,
    /// Whether ECE or CWR was cleared.
    pub ecn_stripped: bool,
}

/// Ports, seq, ack, window and (on request) the ECN bits; not the checksum.
///
/// In a hand-over (by `record_state`) nothing below `received` is acknowledged
/// ([`SharedFixed::received`] of the opposite direction): that is what the local socket has
/// acknowledged already, and Linux discards data with an acknowledgement that is a window old.
#[inline(always)]
pub fn tcp(
    header: &mut Tcp,
    fixed: &SharedFixed,
    strip_ecn: bool,
    record_state: u32,
    received: u32,
) -> TcpChange {
    let old = *header;
    header.ports = fixed.to_ports.get();
    header.seq = u32::from_be(old.seq).wrapping_add(fixed.seq_delta.get()).to_be();
    let mut taken = 0;
    if old.flags & tcp_flags::ACK != 0 {
        let ack = u32::from_be(old.ack).wrapping_add(fixed.ack_delta.get());
        let raised = if record_state == state::HAND_OVER { seq::later(ack, received) } else { ack };
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

/// From the peer's scale to that of the outgoing connection (host order). Rounds down, as TCP
/// itself does, but never to nothing: see [`window_less`].
#[inline(always)]
pub fn window(window: u16, fixed: &SharedFixed) -> u16 {
    window_less(window, 0, fixed)
}

/// What is left of a window when other data takes some bytes of it.
///
/// A window of less than one unit of the outgoing scale becomes one unit. A zero window could last
/// for ever: a receiver that waits for the rest of a message, and has just enough room for it, does
/// not open its window further. A sender that is told one unit too much may send up to one unit
/// beyond the window. The receiver takes what fits and discards the rest, or (Linux since 6.17, if
/// something waits to be read) discards the whole segment; either way it answers with the window
/// that it has, and the sender repeats the rest when its timer says so, in the rhythm of a probe.
/// So nothing is lost. But it is slow, and a stream whose windows are always so small is not
/// spliced (`Reason::Window`).
#[inline(always)]
pub fn window_less(window: u16, bytes: u32, fixed: &SharedFixed) -> u16 {
    let left = (u32::from(window) << (fixed.window_left.get() & 15)).saturating_sub(bytes);
    let scaled = left >> (fixed.window_right.get() & 15);
    if scaled == 0 && left > 0 {
        return 1;
    }
    if scaled > 0xffff { 0xffff } else { scaled as u16 }
}

/// How the timestamps of one packet are translated.
///
/// A TSval leaves as `value + shift`, but no older than the *floor*. No packet that the proxy's own
/// socket sent by itself has a TSval above the floor. Therefore the outgoing TSvals never decrease
/// in the order in which the peer sent the packets, and are never below those before the splice,
/// however long a packet waits and whatever overtakes it. So no receiver refuses a segment (PAWS,
/// RFC 7323) that it would have accepted from the peer directly. In the hand-over every packet of
/// this direction leaves with the floor, also packets of the proxy's own socket, so their order
/// does not matter. After the hand-over the shift is chosen, once: the shift maps the latest TSval
/// seen to the floor. No clock is involved, since a clock would age packets by the time that they
/// wait here.
///
/// Plain words, all of them initialised: the program copies the value from its stack to a map, and
/// verifiers before Linux 6.3 refuse to read a byte of the stack that nothing was written to, as
/// those of padding or of a `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Timestamps {
    /// [`SharedFixed::ts_shift`], 0 while it is not known.
    shift: u32,
    /// [`SharedFixed::ts_floor`]
    floor: u32,
    /// The shift of the other direction.
    echo: u32,
    /// [`DirLive::ts_value`](crate::flow::DirLive::ts_value) of the other direction.
    echo_latest: u32,
}

impl Timestamps {
    /// How far below the floor a TSval is raised, in ticks: four minutes, if one is a millisecond.
    /// This must be longer than a packet can be under way, and much shorter than the time in which
    /// timestamps wrap around to the floor again.
    const REACH: u32 = 1 << 18;

    /// The translation for a packet of `flow`. `other` is the opposite direction.
    #[inline(always)]
    pub fn of(flow: &SharedFlow, other: &SharedFlow) -> Self {
        Self {
            shift: flow.fixed.ts_shift.get(),
            floor: flow.fixed.ts_floor.get(),
            echo: other.fixed.ts_shift.get(),
            echo_latest: other.live.ts_value.get(),
        }
    }

    /// Whether the shift is known.
    #[inline(always)]
    pub const fn is_known(&self) -> bool {
        self.shift != 0
    }

    /// The TSval that leaves (host order). While the shift is not known, the floor.
    #[inline(always)]
    pub const fn value(&self, value: u32) -> u32 {
        let shifted = value.wrapping_add(self.shift);
        let is_below = self.floor.wrapping_sub(shifted) < Self::REACH;
        if is_below || !self.is_known() { self.floor } else { shifted }
    }

    /// The TSecr that leaves (host order). While the other direction's shift is unknown, the latest
    /// TSval that came from there: the peer needs an echo after a repetition, to forget the
    /// time-out that it has doubled (RFC 6298, 5.7; Linux: `tcp_ack_update_rtt`). Zero, which Linux
    /// takes for none, if nothing has come from there.
    #[inline(always)]
    pub const fn echo(&self, echo: u32) -> u32 {
        if self.echo != 0 { echo.wrapping_sub(self.echo) } else { self.echo_latest }
    }

    /// For a believed packet of `flow` with this TSval that found the shift unknown. If the
    /// hand-over is over, the packet [chooses](Self::choose) the shift; otherwise the packet leaves
    /// with the floor. To be called before the packet is translated.
    ///
    /// The packet is noted first, and the state of the stream read after that. So if it finds the
    /// hand-over under way, the one that finds the hand-over's end knows of its TSval.
    #[inline(always)]
    pub fn settle(&mut self, flow: &SharedFlow, value: u32, record_state: impl FnOnce() -> u32) {
        Self::note(flow, value);
        if record_state() != state::HAND_OVER {
            self.choose(flow);
        }
    }

    /// Chooses the shift unless another CPU has: the latest TSval known becomes the floor. (A
    /// forged packet must not choose: the receiver would discard every later segment as old.)
    #[inline(always)]
    pub fn choose(&mut self, flow: &SharedFlow) {
        // A read with barriers: what is exchanged is the same.
        let latest = flow.live.ts_value.compare_exchange(0, 0);
        let shift = nonzero(self.floor.wrapping_sub(latest));
        let found = flow.fixed.ts_shift.compare_exchange(0, shift);
        self.shift = if found == 0 { shift } else { found };
    }

    /// Keeps the TSval of a believed packet of `flow` if it is the latest, before the packet
    /// leaves.
    #[inline(always)]
    pub fn note(flow: &SharedFlow, value: u32) {
        raise(&flow.live.ts_value, value);
    }

    /// Raises the floor of `flow` to the TSval of a packet of the own socket, before the packet
    /// leaves. To be called when there is a floor and the record is not active.
    #[inline(always)]
    pub fn raise_floor(flow: &SharedFlow, value: u32) {
        raise(&flow.fixed.ts_floor, value);
    }

    /// The TSval (host order) of what the proxy itself sends in the name of the peer that `flow`
    /// comes from: that of the latest packet, or the floor while the shift is not known.
    #[inline(always)]
    pub fn newest(flow: &SharedFlow) -> u32 {
        let to = Self {
            shift: flow.fixed.ts_shift.get(),
            floor: flow.fixed.ts_floor.get(),
            echo: 0,
            echo_latest: 0,
        };
        to.value(flow.live.ts_value.get())
    }
}

/// Sets a timestamp of a record that other CPUs set, too, if this one is later. Zero is none.
#[inline(always)]
fn raise(word: &Word<u32>, value: u32) {
    // The loop ends without a success only if that many other CPUs have set the word in between.
    const TRIES: usize = 4;
    let mut known = word.get();
    for _ in 0..TRIES {
        if known != 0 && !after(value, known) {
            return;
        }
        let found = word.compare_exchange(known, nonzero(value));
        if found == known {
            return;
        }
        known = found;
    }
}

/// The number, or 1 instead of 0, since zero means none.
#[inline(always)]
const fn nonzero(number: u32) -> u32 {
    if number == 0 { 1 } else { number }
}
