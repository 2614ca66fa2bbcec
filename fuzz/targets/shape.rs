//! The shape of a packet that is not plain, and the plain packet that is made of it. The model
//! reads single bytes. Both have to agree.
#![no_main]

use bytemuck::bytes_of;
use libfuzzer_sys::fuzz_target;
use proxy_common::packet::headers::{Ip, Ipv4, Ipv6};
use proxy_common::packet::shape::{Extension, Piece, Shape, ShapedIp};
use steer_fuzz::{sum, take};

/// The most extension headers that a packet may have before TCP.
const MAX_EXTENSIONS: usize = 5;
const TCP: u8 = 6;
const FRAGMENT: u8 = 44;

fn model_v4(header: &[u8]) -> Option<Shape> {
    let (version, words) = (header[0] >> 4, header[0] & 0xf);
    if version != 4 || words < 5 || header[9] != TCP {
        return None;
    }
    let place = u32::from(header[6] & 0x1f) << 8 | u32::from(header[7]);
    let id = u32::from(u16::from_ne_bytes([header[4], header[5]]));
    let piece = Piece { id, offset: place * 8, more: u32::from(header[6] >> 5 & 1) };
    Some(Shape { surplus: (u32::from(words) - 5) * 4, piece })
}

/// `kind` is the type of the header that begins `at` bytes after the IP header, after `seen`
/// others.
fn model_v6(after: &[u8], kind: u8, at: usize, seen: usize) -> Option<Shape> {
    let surplus = at as u32;
    if kind == TCP {
        return (seen <= MAX_EXTENSIONS).then_some(Shape { surplus, piece: Piece::WHOLE });
    }
    if seen > MAX_EXTENSIONS {
        return None;
    }
    let header = after.get(at..at + 8)?;
    let is_for_us = header[3] == 0;
    let len = match kind {
        0 | 60 => (usize::from(header[1]) + 1) * 8,
        43 if is_for_us => (usize::from(header[1]) + 1) * 8,
        FRAGMENT => {
            let place = u32::from(header[2]) << 8 | u32::from(header[3]);
            let id = u32::from_ne_bytes([header[4], header[5], header[6], header[7]]);
            let piece = Piece { id, offset: (place >> 3) * 8, more: place & 1 };
            if piece.offset > 0 || piece.more > 0 {
                return (header[0] == TCP).then_some(Shape { surplus, piece });
            }
            8
        }
        _ => return None,
    };
    model_v6(after, header[0], at + len, seen + 1)
}

/// Reads the shape as the BPF programs do. The number of steps is bounded.
fn shape<I: ShapedIp>(ip: &I, after: &[u8]) -> Option<Shape> {
    let mut reads = 0;
    let shape = ip.shape(|at| {
        reads += 1;
        take::<Extension>(&mut after.get(at as usize..)?)
    });
    assert!(reads <= MAX_EXTENSIONS + 1, "{reads} reads");
    assert!(shape.is_none() || ip.may_be_odd(), "may_be_odd is wrong");
    let is_plain = shape.is_some_and(|shape| shape.surplus == 0 && shape.piece.is_whole());
    assert!(is_plain || !ip.is_plain_tcp(), "plain, and of the shape {shape:?}");
    shape
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// `length` less `surplus`. A length field of zero stands for a length beyond 65535.
fn shorter(length: u16, surplus: u32) -> u16 {
    if length == 0 { 0 } else { length.wrapping_sub(surplus as u16) }
}

fn v4(header: Ipv4, new_id: u32) {
    let bytes = bytes_of(&header);
    let found = shape(&header, &[]);
    assert_eq!(found, model_v4(bytes), "(shape, model) of {bytes:02x?}");
    let Some(Shape { surplus, piece }) = found else { return };
    let mut plain = header.without(surplus, !piece.is_whole());
    let expect = |plain: &Ipv4, id: u16| {
        let mut expected = bytes.to_vec();
        expected[0] = 0x45;
        expected[2..4].copy_from_slice(&shorter(be16(bytes, 2), surplus).to_be_bytes());
        expected[4..6].copy_from_slice(&id.to_ne_bytes());
        expected[10..12].copy_from_slice(&bytes_of(plain)[10..12]);
        assert_eq!(bytes_of(plain), expected, "(made plain, expected)");
        assert_eq!(sum(&expected), 0, "the checksum of {expected:02x?}");
    };
    expect(&plain, header.identification);
    assert_eq!(plain.is_plain_tcp(), piece.is_whole());
    assert_eq!(shape(&plain, &[]), Some(Shape { surplus: 0, piece }), "made plain");
    assert_eq!(plain.piece_len(), u32::from(shorter(be16(bytes, 2), surplus)).wrapping_sub(20));
    plain.set_id(new_id);
    expect(&plain, new_id as u16);
}

fn v6(header: Ipv6, after: &[u8]) {
    let bytes = bytes_of(&header);
    let found = shape(&header, after);
    assert_eq!(found, model_v6(after, bytes[6], 0, 0), "(shape, model) of {bytes:02x?} {after:02x?}");
    let Some(Shape { surplus, piece }) = found else { return };
    let plain = header.without(surplus, !piece.is_whole());
    let mut expected = bytes.to_vec();
    let length = shorter(be16(bytes, 4), surplus);
    expected[4..6].copy_from_slice(&length.to_be_bytes());
    expected[6] = if piece.is_whole() { TCP } else { FRAGMENT };
    assert_eq!(bytes_of(&plain), expected, "(made plain, expected)");
    let rest = after.get(surplus as usize..).unwrap_or_default();
    assert_eq!(shape(&plain, rest), Some(Shape { surplus: 0, piece }), "made plain");
    if !piece.is_whole() {
        let written = Extension::of_piece(&piece);
        // The reserved bits become zero.
        assert_eq!(bytes_of(&written)[2..4], (be16(rest, 2) & 0xfff9).to_be_bytes());
        assert_eq!((written.next_header, written.id), (TCP, piece.id));
        assert_eq!(plain.piece_len(), u32::from(length).wrapping_sub(8));
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((version, mut rest)) = input.split_first() else { return };
    if version & 1 == 0 {
        if let (Some(header), Some(id)) = (take(&mut rest), take(&mut rest)) {
            v4(header, id);
        }
    } else if let Some(header) = take(&mut rest) {
        v6(header, rest);
    }
});
