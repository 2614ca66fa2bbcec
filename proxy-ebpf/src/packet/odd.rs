//! Packets that are not plain: makes them plain, or carries the pieces of one, as
//! [`proxy_common::packet::shape`] says.

use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_NET;
use aya_ebpf::bindings::{BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_ADJ_ROOM_NO_CSUM_RESET, BPF_F_RECOMPUTE_CSUM};
use aya_ebpf::helpers::bpf_get_prandom_u32;
use aya_ebpf::programs::TcContext;
use proxy_common::flow::{FlowRef, event, flags, output, state};
use proxy_common::packet::headers::{Ethernet, Tcp, tcp_flags};
use proxy_common::packet::life::{self, Segment};
use proxy_common::packet::shape::{Extension, FirstPiece, Piece, PieceKey, Shape, ShapedIp};
use proxy_common::stat::Stat;

use crate::maps::STEER_PIECES;
use crate::packet::access::{self, tcp_offset};
use crate::packet::flows::{Flows, RecordHandle};
use crate::packet::forward;
use crate::packet::stats::{count, report};
use crate::packet::verdict::Verdict;

/// What became of an odd packet, in one register. The upper half says what the lower half is: if
/// the upper half is 0, the lower half is a [`Verdict`].
#[derive(Clone, Copy)]
pub(super) struct Made(u64);

impl Made {
    /// The packet is plain now.
    pub(super) const PLAIN: Self = Self(1 << 32);
    const FIRST_PIECE: u64 = 2 << 32;
    const HAS_FIN: u64 = 4 << 32;
    const LEFT_ALONE: Self = Self::end(Verdict::Pass);

    /// The packet is done. [`Self::as_verdict`] has the possible verdicts.
    #[inline(always)]
    const fn end(verdict: Verdict) -> Self {
        Self(verdict as u64)
    }

    /// The packet is plain, but was the first piece of one: its fragment header (IPv6), with this
    /// identification, and its FIN, if it had one, have to be [put back](put_back).
    #[inline(always)]
    const fn first_piece(id: u32, has_fin: bool) -> Self {
        Self(Self::FIRST_PIECE | if has_fin { Self::HAS_FIN } else { 0 } | id as u64)
    }

    #[inline(always)]
    pub(super) const fn as_verdict(self) -> Option<Verdict> {
        const PIECE: u64 = Verdict::Piece as u64;
        const NOT_REWRITTEN: u64 = Verdict::NotRewritten as u64;
        match self.0 {
            PIECE => Some(Verdict::Piece),
            NOT_REWRITTEN => Some(Verdict::NotRewritten),
            ..=0xffff_ffff => Some(Verdict::Pass),
            _ => None,
        }
    }

    #[inline(always)]
    pub(super) const fn is_first_piece(self) -> bool {
        self.0 & Self::FIRST_PIECE != 0
    }
}

/// Looks past options and extension headers for a living stream's packet, and makes it plain. A
/// function of its own in the program, for its own stack.
#[inline(never)]
pub(super) fn packet<I: Flows + ShapedIp>(ctx: &TcContext) -> Made {
    make::<I>(ctx).unwrap_or(Made::LEFT_ALONE)
}

/// `None`: the packet is left alone.
#[inline(always)]
fn make<I: Flows + ShapedIp>(ctx: &TcContext) -> Option<Made> {
    let ip: I = ctx.load(Ethernet::LEN).ok()?;
    let after_ip = Ethernet::LEN + I::LEN;
    let shape = ip.shape(|bytes| ctx.load(after_ip + bytes as usize).ok())?;
    let Shape { surplus, piece } = shape;
    if !piece.is_whole() {
        return if piece.is_first() {
            first::<I>(ctx, &ip, surplus, &piece)
        } else {
            later::<I>(ctx, &ip, surplus, &piece)
        };
    }
    if surplus == 0 {
        return None;
    }
    forwarded_flow::<I>(ctx, &ip, after_ip + surplus as usize)?;
    take_out(ctx, &ip, surplus, false)?;
    count(Stat::MadePlain);
    Some(Made::PLAIN)
}

/// The flow of the packet whose TCP header begins at `offset`, if the packets of its stream are
/// forwarded.
#[inline(always)]
fn forwarded_flow<I: Flows>(ctx: &TcContext, ip: &I, offset: usize) -> Option<FlowRef> {
    let flow = I::find(&ip.key(ctx.load(offset).ok()?))?;
    is_active(flow).then_some(flow)
}

#[inline(always)]
fn is_active(flow: FlowRef) -> bool {
    let Some(record) = RecordHandle::of(flow) else { return false };
    let given_up = record.flags() & flags::GIVEN_UP != 0;
    match record.state() {
        state::OFF | state::DEAD => false,
        state::RESET => !given_up,
        _ => true,
    }
}

/// Removes the `surplus` bytes after the IP header, and corrects the header. `None`: the kernel
/// refused, perhaps in the middle. The local stack notices a packet that is left unusable: the
/// checksum of its IP header is wrong, or the TCP header is missing.
#[inline(always)]
fn take_out<I: ShapedIp>(ctx: &TcContext, ip: &I, surplus: u32, is_piece: bool) -> Option<I> {
    let plain = ip.without(surplus, is_piece);
    if surplus > 0 {
        resize(ctx, -(surplus as i32))?;
        ctx.store(Ethernet::LEN, &plain, BPF_F_RECOMPUTE_CSUM.into()).ok()?;
    }
    Some(plain)
}

/// Changes the room after the IP header by so many bytes. Segments of a super-packet keep their
/// size.
#[inline(always)]
fn resize(ctx: &TcContext, bytes: i32) -> Option<()> {
    let flags = u64::from(BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET);
    ctx.adjust_room(bytes, BPF_ADJ_ROOM_NET, flags).ok()
}

/// The first piece of a packet: it has the TCP header, and tells to which flow the other pieces
/// belong.
#[inline(always)]
fn first<I: Flows + ShapedIp>(ctx: &TcContext, ip: &I, surplus: u32, piece: &Piece) -> Option<Made> {
    let key = key(ip, piece);
    let offset = Ethernet::LEN + I::LEN + (surplus + I::PIECE_LEN) as usize;
    let Some(flow) = forwarded_flow::<I>(ctx, ip, offset).filter(|flow| takes_pieces(*flow)) else {
        // A packet of another flow may have had the same identification before.
        STEER_PIECES.remove(key).ok();
        return None;
    };
    let tcp: Tcp = ctx.load(offset).ok()?;
    if came_too_late(&key, flow, u32::from_be(tcp.seq)) {
        return None;
    }
    let mut plain = take_out(ctx, ip, surplus, true)?;
    let segment = Segment::new(&tcp, plain.piece_len())?;
    let told = tell(flow, &key, &segment, tcp.header_len())?;
    STEER_PIECES.insert(key, told, 0).ok()?;
    count(Stat::Fragment);
    if I::PIECE_LEN == 0 {
        plain.set_id(told.id);
        ctx.store(Ethernet::LEN, &plain, BPF_F_RECOMPUTE_CSUM.into()).ok()?;
    } else {
        take_out(ctx, &plain, I::PIECE_LEN, false)?;
    }
    // More bytes follow this piece, and the FIN follows them: it counts with the last piece.
    let has_fin = tcp.flags & tcp_flags::FIN != 0;
    if has_fin {
        set_flags::<I>(ctx, tcp.flags & !tcp_flags::FIN)?;
    }
    Some(Made::first_piece(told.id, has_fin))
}

/// Sets the TCP flags of a plain packet; not the checksum.
#[inline(always)]
fn set_flags<I: ShapedIp>(ctx: &TcContext, flags: u8) -> Option<()> {
    ctx.store(tcp_offset::<I>() + core::mem::offset_of!(Tcp, flags), &flags, 0).ok()
}

/// What the first piece of a packet tells of the others; its part of the packet is `segment`.
#[inline(always)]
fn tell(flow: FlowRef, key: &PieceKey, segment: &Segment, header_len: u32) -> Option<FirstPiece> {
    let record = RecordHandle::of(flow)?;
    let (base, generation) = (segment.seq.wrapping_sub(header_len), record.generation());
    // The first piece may arrive twice, with other pieces in between. Both times the packet gets
    // the same identification. SAFETY: the value is copied at once, and an element is freed after
    // the programs that see it.
    let same = unsafe { STEER_PIECES.get(key) }
        .filter(|told| told.flow == flow && told.generation == generation && told.base == base);
    let id = match same {
        Some(told) => told.id,
        // SAFETY: the helper has no conditions.
        None => unsafe { bpf_get_prandom_u32() },
    };
    let believed = life::is_believed(record.state(), segment, record.arriving(), record.other());
    Some(FirstPiece { flow, id, base, generation, believed: believed.into(), flags: segment.flags.into() })
}

/// Whether the pieces of a packet get to the other peer. Packets between two peers on this host
/// arrive only whole. For a whole packet the local stack looks for the socket before it asks for
/// the route. For a piece the stack asks for the route first, and discards the piece, since packets
/// with such addresses do not come from outside. Pieces do not change their IP version, either.
/// Therefore the local stack ends the stream instead.
#[inline(always)]
fn takes_pieces(flow: FlowRef) -> bool {
    RecordHandle::of(flow).is_some_and(|record| record.arriving().fixed.output.get() == output::NEIGHBOUR)
}

#[inline(always)]
fn key<I: ShapedIp>(ip: &I, piece: &Piece) -> PieceKey {
    let (source, destination) = ip.addresses();
    PieceKey { source, destination, id: piece.id }
}

/// Whether pieces of the packet came before the first piece and went to the local stack, for the
/// second time with this sequence number. The first time, the packet is lost, and the sender
/// repeats the packet. If the pieces come in this order again, they always will, and no packet
/// would ever arrive. So the local stack gets all pieces together, and ends the stream.
#[inline(always)]
fn came_too_late(key: &PieceKey, flow: FlowRef, seq: u32) -> bool {
    // SAFETY: the value is copied at once, and an element is freed after the programs that see it.
    let early = unsafe { STEER_PIECES.get(key) }.is_some_and(|first| first.flow == FirstPiece::NOT_YET);
    if !early {
        return false;
    }
    // No packet's key: the first word of an address is not the number of a flow in a key without a
    // destination.
    let of_flow = PieceKey { source: [flow.0, 0, 0, 0], destination: [0; 4], id: 0 };
    // SAFETY: as above.
    let again = unsafe { STEER_PIECES.get(of_flow) }.is_some_and(|before| before.base == seq);
    STEER_PIECES.insert(of_flow, FirstPiece { flow, base: seq, ..FirstPiece::not_yet() }, 0).ok();
    again
}

/// A later piece: no TCP header, only addresses.
#[inline(always)]
fn later<I: Flows + ShapedIp>(ctx: &TcContext, ip: &I, surplus: u32, piece: &Piece) -> Option<Made> {
    let key = key(ip, piece);
    // SAFETY: as above.
    let Some(first) =
        unsafe { STEER_PIECES.get(key) }.copied().filter(|first| first.flow != FirstPiece::NOT_YET)
    else {
        count(Stat::FragmentEarly);
        STEER_PIECES.insert(key, FirstPiece::not_yet(), 0).ok();
        return None;
    };
    let record = RecordHandle::of(first.flow).filter(|record| record.generation() == first.generation)?;
    if !is_active(first.flow) {
        return None;
    }
    if !access::is_for_us(ctx) && !access::untag(ctx) {
        return None;
    }
    let mut plain = take_out(ctx, ip, surplus, true)?;
    let flow = record.arriving();
    flow.live.packets.set(flow.live.packets.get().wrapping_add(1));
    if piece.more == 0 && first.believed == 1 {
        let end = first.base.wrapping_add(piece.offset).wrapping_add(plain.piece_len());
        if life::last_piece(&flow.live, end, first.flags as u8) {
            report(&record, event::FIN);
        }
    }
    plain.readdress(
        &flow.fixed.to_source,
        &flow.fixed.to_destination,
        record.flags() & flags::STRIP_ECN != 0,
    );
    plain.set_id(first.id);
    if rename::<I>(ctx, first.id).is_none()
        || ctx.store(Ethernet::LEN, &plain, BPF_F_RECOMPUTE_CSUM.into()).is_err()
    {
        return Some(Made::end(Verdict::NotRewritten));
    }
    // A piece is never left to the local stack to deliver: see `takes_pieces`.
    Some(Made::end(forward::leave(ctx, &flow.fixed, Verdict::Piece, Verdict::Pass)))
}

/// Gives a piece another identification, if it stands in a fragment header (which then follows the
/// IP header).
#[inline(always)]
fn rename<I: ShapedIp>(ctx: &TcContext, id: u32) -> Option<()> {
    if I::PIECE_LEN == 0 {
        return Some(());
    }
    let at = tcp_offset::<I>() + core::mem::offset_of!(Extension, id);
    ctx.store(at, &id, BPF_F_RECOMPUTE_CSUM.into()).ok()
}

/// Puts back what was removed from the first piece of a packet to make the piece plain. 0: the
/// kernel refused in the middle, and the packet is unusable.
#[inline(never)]
pub(super) fn put_back<I: ShapedIp>(ctx: &TcContext, made: Made) -> i32 {
    let piece = Piece { id: made.0 as u32, offset: 0, more: 1 };
    let put = || {
        if made.0 & Made::HAS_FIN != 0 {
            let tcp: Tcp = ctx.load(tcp_offset::<I>()).ok()?;
            set_flags::<I>(ctx, tcp.flags | tcp_flags::FIN)?;
        }
        if I::PIECE_LEN == 0 {
            return Some(());
        }
        let ip: I = ctx.load(Ethernet::LEN).ok()?;
        resize(ctx, I::PIECE_LEN as i32)?;
        let ip = ip.without(I::PIECE_LEN.wrapping_neg(), true);
        ctx.store(Ethernet::LEN, &ip, BPF_F_RECOMPUTE_CSUM.into()).ok()?;
        let header = Extension::of_piece(&piece);
        ctx.store(tcp_offset::<I>(), &header, BPF_F_RECOMPUTE_CSUM.into()).ok()
    };
    if put().is_some() { 1 } else { 0 }
}
