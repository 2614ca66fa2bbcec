//! Packets of legal shapes that are not plain: what stands between the IP header and TCP, and
//! pieces of a packet.
//!
//! A packet is *plain* if TCP follows the IP header at once ([`Ip::is_plain_tcp`]). The programs
//! rewrite plain packets only, so other packets are made plain first: the programs remove the
//! headers and options between, as the local stack does, for which all of these were meant (RFC
//! 791, section 3.1; RFC 8200, section 4). A fragment is rewritten as it is. Any other packet is
//! left to the local stack, which answers with a RST that ends the stream.

use bytemuck::{Pod, Zeroable};

use super::checksum::{self, Difference};
use super::headers::{Ip, Ipv4, Ipv6, protocol};
use crate::flow::FlowRef;

/// Next-header values of IPv6 that do not name an upper layer.
mod next_header {
    pub(super) const HOP_BY_HOP: u8 = 0;
    pub(super) const ROUTING: u8 = 43;
    pub(super) const FRAGMENT: u8 = 44;
    pub(super) const DESTINATION: u8 = 60;
}

/// How many extension headers a packet may have. Senders send one or two.
const MAX_EXTENSIONS: usize = 5;

/// The first eight bytes of an extension header; all of a fragment header (RFC 8200, section 4.5).
/// Wire order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Extension {
    /// What follows this extension header.
    pub next_header: u8,
    /// In units of eight bytes, without the first; reserved in a fragment header.
    pub length: u8,
    /// Fragment: [`Piece::offset`], and the flag of [`Piece::more`]. Routing: type, and how many
    /// segments are left.
    pub place: u16,
    /// Fragment: identification.
    pub id: u32,
}

impl Extension {
    /// Bytes of this type, and of a fragment header: 8.
    pub const LEN: usize = size_of::<Self>();

    #[inline(always)]
    const fn len(&self) -> u32 {
        (self.length as u32 + 1) * 8
    }

    /// A fragment header before TCP.
    #[inline(always)]
    pub const fn of_piece(piece: &Piece) -> Self {
        let place = (piece.offset as u16 | piece.more as u16).to_be();
        Self { next_header: protocol::TCP, length: 0, place, id: piece.id }
    }
}

/// Where in its packet a fragment belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Identification, as it stands in the packet. (IPv4: in the first half of the word.)
    pub id: u32,
    /// Bytes before this piece; a multiple of eight.
    pub offset: u32,
    /// Whether more pieces follow: 1 or 0.
    pub more: u32,
}

impl Piece {
    /// A whole packet.
    pub const WHOLE: Self = Self { id: 0, offset: 0, more: 0 };

    /// A piece with this identification (as it stands in the packet) and this offset in bytes.
    #[inline(always)]
    const fn of(id: u32, offset: u32, more: bool) -> Self {
        Self { id, offset, more: more as u32 }
    }

    /// Whether this is the whole packet, and not a piece.
    #[inline(always)]
    pub const fn is_whole(&self) -> bool {
        self.offset == 0 && self.more == 0
    }

    /// Whether the piece begins with the TCP header.
    #[inline(always)]
    pub const fn is_first(&self) -> bool {
        self.offset == 0
    }
}

/// The shape of a packet that ends in TCP, or in a piece of it. All in bytes.
///
/// No `Option`: LLVM would copy what a `None` does not have, and verifiers before Linux 6.3 refuse
/// to read a byte of the stack that nothing was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// The headers or options that directly follow the IP header and can be removed.
    pub surplus: u32,
    /// Where the fragment belongs, or [`Piece::WHOLE`].
    pub piece: Piece,
}

/// What the programs need to know of the shapes of both versions of IP.
pub trait ShapedIp: Ip {
    /// Bytes of a fragment header, which stays in the packet.
    const PIECE_LEN: u32;

    /// Whether a packet with this header may belong to a TCP connection without being plain: a
    /// quick answer for all other packets.
    fn may_be_odd(&self) -> bool;

    /// The shape of the packet. `None`: the packet is not TCP, or has a shape that is left alone.
    /// `read` returns the bytes at the given distance after the IP header.
    fn shape(&self, read: impl FnMut(u32) -> Option<Extension>) -> Option<Shape>;

    /// The header of the same packet without the `surplus` bytes that directly followed it. With
    /// `is_piece` a fragment header (of [`Self::PIECE_LEN`]) follows then, else TCP.
    #[must_use]
    fn without(&self, surplus: u32, is_piece: bool) -> Self;

    /// How many bytes a piece without surplus has after the IP header and the fragment header.
    fn piece_len(&self) -> u32;

    /// Gives a piece another identification (as [`Piece::id`]), if this header has the
    /// identification.
    fn set_id(&mut self, id: u32);

    /// Source and destination as in [`PieceKey`].
    fn addresses(&self) -> ([u32; 4], [u32; 4]);
}

impl ShapedIp for Ipv4 {
    const PIECE_LEN: u32 = 0;

    #[inline(always)]
    fn may_be_odd(&self) -> bool {
        self.protocol == protocol::TCP && self.version_and_length >> 4 == 4
    }

    #[inline(always)]
    fn shape(&self, _read: impl FnMut(u32) -> Option<Extension>) -> Option<Shape> {
        const MORE: u16 = 0x2000;
        const OFFSET: u16 = 0x1fff;
        let words = u32::from(self.version_and_length & 0xf);
        if !self.may_be_odd() || words < 5 {
            return None;
        }
        let place = u16::from_be(self.fragment);
        let piece = Piece::of(self.identification.into(), u32::from(place & OFFSET) * 8, place & MORE != 0);
        Some(Shape { surplus: words * 4 - Self::LEN as u32, piece })
    }

    #[inline(always)]
    fn without(&self, surplus: u32, _is_piece: bool) -> Self {
        let mut header = *self;
        header.version_and_length = 0x45;
        header.total_length = shorter(self.total_length, surplus);
        header.check = 0;
        header.check = checksum::finish(header.sum());
        header
    }

    #[inline(always)]
    fn piece_len(&self) -> u32 {
        u32::from(u16::from_be(self.total_length)).wrapping_sub(u32::from(self.version_and_length & 0xf) * 4)
    }

    #[inline(always)]
    fn set_id(&mut self, id: u32) {
        let mut change = Difference::default();
        change.replace(self.identification.into(), id & 0xffff);
        self.identification = id as u16;
        self.check = change.apply(self.check);
    }

    #[inline(always)]
    fn addresses(&self) -> ([u32; 4], [u32; 4]) {
        ([self.source, 0, 0, 0], [self.destination, 0, 0, 0])
    }
}

impl Ipv4 {
    /// The sum of all words, as they stand in the packet.
    #[inline(always)]
    fn sum(&self) -> u64 {
        let word = |low: u8, high: u8| u64::from(u16::from_ne_bytes([low, high]));
        word(self.version_and_length, self.traffic_class)
            + u64::from(self.total_length)
            + u64::from(self.identification)
            + u64::from(self.fragment)
            + word(self.ttl, self.protocol)
            + u64::from(self.check)
            + u64::from(self.source)
            + u64::from(self.destination)
    }
}

impl ShapedIp for Ipv6 {
    const PIECE_LEN: u32 = Extension::LEN as u32;

    #[inline(always)]
    fn may_be_odd(&self) -> bool {
        use next_header::{DESTINATION, FRAGMENT, HOP_BY_HOP, ROUTING};
        matches!(self.next_header, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION | protocol::TCP)
    }

    #[inline(always)]
    fn shape(&self, mut read: impl FnMut(u32) -> Option<Extension>) -> Option<Shape> {
        let (mut kind, mut surplus) = (self.next_header, 0);
        // One more round, for TCP.
        for _ in 0..MAX_EXTENSIONS + 1 {
            if kind == protocol::TCP {
                return Some(Shape { surplus, piece: Piece::WHOLE });
            }
            let extension = read(surplus)?;
            match kind {
                next_header::HOP_BY_HOP | next_header::DESTINATION => {}
                // If segments are left, the packet is not for this host.
                next_header::ROUTING if extension.place.to_be() & 0xff == 0 => {}
                next_header::FRAGMENT => {
                    let place = u32::from(u16::from_be(extension.place));
                    let piece = Piece::of(extension.id, place & 0xfff8, place & 1 != 0);
                    if !piece.is_whole() {
                        // What follows the fragment header in the first piece cannot be taken out.
                        let is_tcp = extension.next_header == protocol::TCP;
                        return if is_tcp { Some(Shape { surplus, piece }) } else { None };
                    }
                    surplus += Extension::LEN as u32;
                    kind = extension.next_header;
                    continue;
                }
                _ => return None,
            }
            surplus += extension.len();
            kind = extension.next_header;
        }
        None
    }

    #[inline(always)]
    fn without(&self, surplus: u32, is_piece: bool) -> Self {
        let next_header = if is_piece { next_header::FRAGMENT } else { protocol::TCP };
        Self { payload_length: shorter(self.payload_length, surplus), next_header, ..*self }
    }

    #[inline(always)]
    fn piece_len(&self) -> u32 {
        u32::from(u16::from_be(self.payload_length)).wrapping_sub(Self::PIECE_LEN)
    }

    #[inline(always)]
    fn set_id(&mut self, _id: u32) {}

    #[inline(always)]
    fn addresses(&self) -> ([u32; 4], [u32; 4]) {
        (self.source, self.destination)
    }
}

/// A length (wire) less some bytes. Zero stays zero, since it stands for a length that does not fit
/// into the field (BIG TCP).
#[inline(always)]
fn shorter(length: u16, bytes: u32) -> u16 {
    match u16::from_be(length) {
        0 => 0,
        length => length.wrapping_sub(bytes as u16).to_be(),
    }
}

/// What identifies the pieces of one packet; all wire order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct PieceKey {
    /// Address of the sender; IPv4 in the first word, and zeros.
    pub source: [u32; 4],
    /// Address of the receiver; IPv4 in the first word, and zeros.
    pub destination: [u32; 4],
    /// [`Piece::id`].
    pub id: u32,
}

/// What the first piece of a packet says about the other pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct FirstPiece {
    /// The flow of the packet, or [`Self::NOT_YET`].
    pub flow: FlowRef,
    /// [`Piece::id`] with which the pieces leave: two clients may choose the same one, and their
    /// pieces leave with the same source address.
    pub id: u32,
    /// Host order: the sequence number that the first byte of the TCP header would have if the
    /// header were payload.
    pub base: u32,
    /// [`crate::flow::Record::generation`] of the flow's stream, since another stream may have the
    /// record by now.
    pub generation: u32,
    /// 1: the packet is the peer's, as far as can be told. 0: the packet changes nothing in the
    /// record.
    pub believed: u32,
    /// The TCP header's, as in [`super::life::Segment`].
    pub flags: u32,
}

impl FirstPiece {
    /// Value of `flow`: a later piece has come, and the first has not come yet.
    pub const NOT_YET: FlowRef = FlowRef(u32::MAX);

    /// The entry for a later piece that came before the first piece.
    #[must_use]
    pub fn not_yet() -> Self {
        Self { flow: Self::NOT_YET, ..Self::zeroed() }
    }
}

#[cfg(test)]
mod tests;
