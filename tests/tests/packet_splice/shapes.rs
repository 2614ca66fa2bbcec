//! Legal shapes of a TCP packet, made from plain Ethernet frames.

use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, RngExt as _};

const ETHERNET: usize = 14;
const TCP: u8 = 6;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;
const HOP_BY_HOP: u8 = 0;
/// Linux accepts no smaller piece of an IPv6 packet, except for the last.
const IPV6_PIECE: usize = 1280 - 48;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    Plain,
    /// Any shape that can be spliced, and changes that do not change a packet's meaning: lifetimes,
    /// marks, the order of options.
    Any,
    // The shapes below cannot be spliced.
    /// The first piece does not hold the whole TCP header (IPv4).
    TinyPieces,
    /// The last piece comes first.
    Backwards,
    /// More extension headers than any host sends (IPv6).
    ManyHeaders,
    /// Each piece has its own extension header (IPv6).
    HeaderInPieces,
}

impl Shape {
    pub(crate) const ALL: [Self; 6] =
        [Self::Plain, Self::Any, Self::TinyPieces, Self::Backwards, Self::ManyHeaders, Self::HeaderInPieces];
}

/// The frames that replace `frame`, and whether they are of another shape.
pub(crate) fn bend(shape: Shape, frame: Vec<u8>, random: &mut StdRng) -> (Vec<Vec<u8>>, bool) {
    const SYN: u8 = 2;
    let Some(tcp) = tcp(&frame) else { return (vec![frame], false) };
    let mut frame = frame;
    // The sender leaves the checksum to a device, so it is not complete yet.
    sum_up(&mut frame, tcp);
    if shape == Shape::Plain || frame[tcp + 13] & SYN != 0 {
        return (vec![frame], false);
    }
    let is_v4 = is_v4(&frame);
    let size = if is_v4 { 600 } else { IPV6_PIECE };
    let id = random.random();
    let bent = match shape {
        Shape::Plain => vec![frame.clone()],
        Shape::Any => any(&frame, random),
        Shape::TinyPieces => pieces(&frame, 24, id),
        Shape::Backwards => pieces(&frame, size, id).into_iter().rev().collect(),
        Shape::ManyHeaders => vec![with_extra(&frame, DESTINATION, &chain(&[DESTINATION; 7], TCP))],
        Shape::HeaderInPieces => {
            let longer = with_extra(&frame, DESTINATION, &chain(&[DESTINATION], TCP));
            pieces(&longer, size, id)
        }
    };
    let is_bent = bent != [frame];
    (bent, is_bent)
}

fn any(plain: &[u8], random: &mut StdRng) -> Vec<Vec<u8>> {
    let mut frame = plain.to_vec();
    let is_v4 = is_v4(&frame);
    if random.random_ratio(1, 2) {
        move_timestamps(&mut frame);
    }
    let ip = &mut frame[ETHERNET..];
    if is_v4 {
        // DSCP, lifetime, and for whole packets any identification.
        ip[1] = random.random::<u8>() & 0xfc;
        ip[8] = random.random_range(1..=255);
        random.fill_bytes(&mut ip[4..6]);
    } else {
        random.fill_bytes(&mut ip[2..4]);
        ip[7] = random.random_range(1..=255);
    }
    sum_up_ip(&mut frame);
    let mut frames = if random.random_ratio(1, 3) {
        // Pieces after the first may overtake each other, and any piece may come twice.
        let smallest = if is_v4 { 64 } else { IPV6_PIECE };
        let size = random.random_range(smallest..=1232.max(smallest)) & !7;
        let mut frames = pieces(&frame, size, random.random());
        frames[1..].shuffle(random);
        frames
    } else {
        vec![frame]
    };
    if random.random_ratio(1, 2) {
        for frame in &mut frames {
            let (first, extra) = extra(is_v4, next_header(frame), random);
            *frame = with_extra(frame, first, &extra);
        }
    }
    if random.random_ratio(1, 8) {
        frames.extend_from_within(..);
    }
    if random.random_ratio(1, 3) {
        let priority = random.random_range(0..8_u8) << 5;
        for frame in &mut frames {
            frame.splice(12..12, [0x81, 0, priority, 0]);
        }
    }
    frames
}

/// Something to insert between the IP header and the header of kind `next`.
fn extra(is_v4: bool, next: u8, random: &mut StdRng) -> (u8, Vec<u8>) {
    if is_v4 {
        let options: [&[u8]; 5] = [
            &[1, 1, 1, 0],
            // Router alert, an empty record of a route, a time stamp, an obsolete stream
            // identifier.
            &[148, 4, 0, 0],
            &[7, 7, 4, 0, 0, 0, 0, 0],
            &[68, 12, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[136, 4, 0, 1, 1, 1, 1, 1],
        ];
        return (TCP, options[random.random_range(0..options.len())].to_vec());
    }
    let chains: [&[u8]; 4] =
        [&[HOP_BY_HOP], &[DESTINATION], &[HOP_BY_HOP, DESTINATION], &[DESTINATION, DESTINATION]];
    let kinds = chains[random.random_range(0..chains.len())];
    (kinds[0], chain(kinds, next))
}

/// Extension headers of these kinds with only padding, followed by `next`.
fn chain(kinds: &[u8], next: u8) -> Vec<u8> {
    let following = kinds[1..].iter().chain([&next]);
    following.flat_map(|next| [*next, 0, 1, 4, 0, 0, 0, 0]).collect()
}

fn is_v4(frame: &[u8]) -> bool {
    frame[12..14] == [8, 0]
}

/// The offset of TCP, if the frame is plain.
fn tcp(frame: &[u8]) -> Option<usize> {
    match frame.get(12..21)? {
        [8, 0, 0x45, ..] if frame[23] == TCP => Some(34),
        [0x86, 0xdd, _, _, _, _, _, _, TCP] => Some(54),
        _ => None,
    }
}

/// The kind of the header after the IPv6 header.
fn next_header(frame: &[u8]) -> u8 {
    frame[ETHERNET + 6]
}

/// Moves timestamps from the place where Linux puts them (after two NOPs) to the place before the
/// NOPs. Checksums stay correct, because bytes at even places stay at even places.
fn move_timestamps(frame: &mut [u8]) {
    let at = if is_v4(frame) { 54 } else { 74 };
    if frame.get(at..at + 4) == Some(&[1, 1, 8, 10]) {
        frame[at..at + 12].rotate_left(2);
    }
}

/// Inserts bytes after the IP header, and corrects the header. (IPv6: the bytes begin with a header
/// of kind `first`.)
fn with_extra(frame: &[u8], first: u8, extra: &[u8]) -> Vec<u8> {
    let at = ETHERNET + if is_v4(frame) { 20 } else { 40 };
    let mut odd = [&frame[..at], extra, &frame[at..]].concat();
    let ip = &mut odd[ETHERNET..];
    if is_v4(frame) {
        ip[0] += (extra.len() / 4) as u8;
        add(ip, 2, extra.len());
    } else {
        ip[6] = first;
        add(ip, 4, extra.len());
    }
    sum_up_ip(&mut odd);
    odd
}

fn add(ip: &mut [u8], at: usize, bytes: usize) {
    let length = u16::from_be_bytes([ip[at], ip[at + 1]]) + bytes as u16;
    ip[at..at + 2].copy_from_slice(&length.to_be_bytes());
}

/// The pieces of a packet. All but the last have `size` bytes (a multiple of eight). A short packet
/// stays whole.
fn pieces(frame: &[u8], size: usize, id: u32) -> Vec<Vec<u8>> {
    let is_v4 = is_v4(frame);
    let header = if is_v4 { 20 } else { 40 };
    let length = u16::from_be_bytes(frame[if is_v4 { 16..18 } else { 18..20 }].try_into().unwrap());
    let end = ETHERNET + usize::from(length) + if is_v4 { 0 } else { header };
    let (head, segment) = frame[..end].split_at(ETHERNET + header);
    if segment.len() <= size {
        return vec![frame.to_vec()];
    }
    let count = segment.len().div_ceil(size);
    let piece = |(index, part): (usize, &[u8])| {
        let (offset, more) = (index * size, index + 1 < count);
        let mut piece = [head, part].concat();
        let ip = &mut piece[ETHERNET..];
        if is_v4 {
            let place = (offset / 8) as u16 | if more { 0x2000 } else { 0 };
            ip[2..4].copy_from_slice(&(20 + part.len() as u16).to_be_bytes());
            ip[4..6].copy_from_slice(&(id as u16).to_be_bytes());
            ip[6..8].copy_from_slice(&place.to_be_bytes());
            sum_up_ip(&mut piece);
            return piece;
        }
        ip[4..6].copy_from_slice(&(part.len() as u16).to_be_bytes());
        let place = (offset as u16 | u16::from(more)).to_be_bytes();
        let header = [&[ip[6], 0], &place[..], &id.to_be_bytes()].concat();
        with_extra(&piece, FRAGMENT, &header)
    };
    segment.chunks(size).enumerate().map(piece).collect()
}

/// Corrects the checksum of an IPv4 header.
fn sum_up_ip(frame: &mut [u8]) {
    if is_v4(frame) {
        let ip = &mut frame[ETHERNET..];
        let len = usize::from(ip[0] & 0xf) * 4;
        ip[10..12].fill(0);
        let sum = checksum(&[&ip[..len]]);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
    }
}

/// Corrects the checksum of a plain frame's TCP segment.
fn sum_up(frame: &mut [u8], tcp: usize) {
    let length = u16::from_be_bytes([frame[tcp - 18], frame[tcp - 17]]);
    let (end, addresses) = match tcp {
        34 => (ETHERNET + usize::from(length), 26..34),
        _ => (54 + usize::from(u16::from_be_bytes([frame[18], frame[19]])), 22..54),
    };
    frame[tcp + 16..tcp + 18].fill(0);
    let pseudo = [0, TCP, ((end - tcp) >> 8) as u8, (end - tcp) as u8];
    let sum = checksum(&[&frame[addresses], &pseudo, &frame[tcp..end]]);
    frame[tcp + 16..tcp + 18].copy_from_slice(&sum.to_be_bytes());
}

/// The checksum of RFC 1071. All parts except the last have an even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let sum: u32 =
        words.map(|word| u32::from(u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)]))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !(((sum & 0xffff) + (sum >> 16)) as u16)
}
