//! The part of `WebSocket` framing (RFC 6455) that the load and the endpoint need: heads, masks,
//! and where the frames of a byte stream begin and end. Payload is never copied.

use std::ops::Range;

use anyhow::{Result, ensure};

/// The `sec-websocket-key` that every client sends, and the matching answer: the example of RFC
/// 6455 1.3. With one fixed key neither side has to compute a SHA-1. Proxies do not notice.
pub(crate) const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
pub(crate) const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// The endpoint's answer to the upgrade.
pub(crate) const SWITCHING: &str = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\
     sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

pub(crate) const BINARY: u8 = 2;
const PING: u8 = 9;
const PONG: u8 = 10;

/// The longest head: two bytes, a length of 64 bits, a mask.
pub(crate) const MAX_HEAD: usize = 14;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Head {
    /// Whether this frame ends the message.
    pub(crate) fin: bool,
    pub(crate) opcode: u8,
    /// The mask of a client's payload.
    pub(crate) mask: Option<[u8; 4]>,
    /// The length of the payload, in bytes.
    pub(crate) length: u64,
}

impl Head {
    /// The head of a message in one frame.
    pub(crate) fn message(length: usize, mask: Option<[u8; 4]>) -> Self {
        Self { fin: true, opcode: BINARY, mask, length: length as u64 }
    }

    /// The head at the start of `bytes`, and its size. `None` if `bytes` end within the head.
    ///
    /// # Errors
    /// When the head has a reserved bit or a reserved opcode.
    fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>> {
        let [first, second, rest @ ..] = bytes else { return Ok(None) };
        let (opcode, short) = (first & 0xf, second & 0x7f);
        ensure!(first & 0x70 == 0, "a frame has reserved bits: {first:#x}");
        ensure!(matches!(opcode, 0..=2 | 8..=PONG), "a frame has the opcode {opcode}");
        let (length, rest) = match short {
            126 => match rest.split_first_chunk() {
                Some((length, rest)) => (u64::from(u16::from_be_bytes(*length)), rest),
                None => return Ok(None),
            },
            127 => match rest.split_first_chunk() {
                Some((length, rest)) => (u64::from_be_bytes(*length), rest),
                None => return Ok(None),
            },
            short => (u64::from(short), rest),
        };
        let (mask, rest) = match (second & 0x80, rest.split_first_chunk()) {
            (0, _) => (None, rest),
            (_, Some((mask, rest))) => (Some(*mask), rest),
            (_, None) => return Ok(None),
        };
        let head = Self { fin: first & 0x80 != 0, opcode, mask, length };
        Ok(Some((head, bytes.len() - rest.len())))
    }

    /// Writes the head to the start of `to`, which has room for [`MAX_HEAD`] bytes, and returns its
    /// size.
    pub(crate) fn put(&self, to: &mut [u8]) -> usize {
        to[0] = u8::from(self.fin) << 7 | self.opcode;
        let masked = u8::from(self.mask.is_some()) << 7;
        let mut size = match self.length {
            short @ 0..126 => {
                to[1] = masked | short as u8;
                2
            }
            medium @ 126..0x1_0000 => {
                to[1] = masked | 126;
                to[2..4].copy_from_slice(&(medium as u16).to_be_bytes());
                4
            }
            long => {
                to[1] = masked | 127;
                to[2..10].copy_from_slice(&long.to_be_bytes());
                10
            }
        };
        if let Some(mask) = self.mask {
            to[size..size + 4].copy_from_slice(&mask);
            size += 4;
        }
        size
    }

    /// The head of the answer to this frame: the same head without a mask, but a pong for a ping.
    pub(crate) fn echo(&self) -> Self {
        let opcode = if self.opcode == PING { PONG } else { self.opcode };
        Self { opcode, mask: None, ..*self }
    }
}

/// A message in one frame: the head and the payload. The payload is masked if there is a mask.
pub(crate) fn message(payload: &[u8], mask: Option<[u8; 4]>) -> Vec<u8> {
    let mut frame = vec![0; MAX_HEAD];
    let size = Head::message(payload.len(), mask).put(&mut frame);
    frame.truncate(size);
    frame.extend_from_slice(payload);
    if let Some(mask) = mask {
        apply(mask, 0, &mut frame[size..]);
    }
    frame
}

/// Masks or unmasks a part of a payload. The part begins `offset` bytes after the payload's start.
pub(crate) fn apply(mask: [u8; 4], offset: u64, payload: &mut [u8]) {
    let mut mask = mask;
    mask.rotate_left((offset % 4) as usize);
    let [a, b, c, d] = mask;
    let eight = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let mut chunks = payload.chunks_exact_mut(8);
    for chunk in &mut chunks {
        let masked = u64::from_ne_bytes((&*chunk).try_into().expect("chunks of eight bytes")) ^ eight;
        chunk.copy_from_slice(&masked.to_ne_bytes());
    }
    for (byte, mask) in chunks.into_remainder().iter_mut().zip(mask.into_iter().cycle()) {
        *byte ^= mask;
    }
}

/// Finds the frames of one direction in its bytes. The bytes may come in pieces of any size.
#[derive(Debug)]
pub(crate) struct Frames {
    /// Whether the frames come from a client.
    masked: bool,
    /// The start of a head whose end has not come yet.
    partial: [u8; MAX_HEAD],
    partial_size: usize,
    current: Option<Head>,
    /// How many bytes of the current payload have come.
    offset: u64,
    /// The first bytes of the current payload, as they came.
    start: [u8; 8],
}

/// A part of the payload of a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) head: Head,
    /// How many bytes of the payload came before this part.
    pub(crate) offset: u64,
    /// The place of this part in the bytes that were given.
    pub(crate) payload: Range<usize>,
    /// Whether the frame ends with this part.
    pub(crate) last: bool,
    /// With `last`: the first bytes of the payload, still masked. Bytes that the payload does not
    /// have are zero.
    pub(crate) start: [u8; 8],
}

impl Frames {
    pub(crate) fn from_client() -> Self {
        Self::new(true)
    }

    pub(crate) fn from_endpoint() -> Self {
        Self::new(false)
    }

    fn new(masked: bool) -> Self {
        Self { masked, partial: [0; MAX_HEAD], partial_size: 0, current: None, offset: 0, start: [0; 8] }
    }

    /// The next part within `bytes[at.start..at.end]`. Moves `at.start` to the end of the part.
    /// `None` when more bytes are needed. A frame without payload has one empty part.
    ///
    /// # Errors
    /// When there is no valid head where one should be.
    pub(crate) fn next(&mut self, bytes: &[u8], at: &mut Range<usize>) -> Result<Option<Part>> {
        let head = match self.current {
            Some(_) if Range::is_empty(at) => return Ok(None),
            Some(head) => head,
            None => match self.head(&bytes[at.clone()])? {
                Some((head, size)) => {
                    at.start += size;
                    if Range::is_empty(at) && head.length > 0 {
                        self.current = Some(head);
                        return Ok(None);
                    }
                    head
                }
                None => {
                    at.start = at.end;
                    return Ok(None);
                }
            },
        };
        let left = usize::try_from(head.length - self.offset).unwrap_or(usize::MAX);
        let payload = at.start..at.start + left.min(at.len());
        at.start = payload.end;
        let offset = self.offset;
        self.offset += payload.len() as u64;
        if let Some(to) = self.start.get_mut(offset as usize..) {
            let size = to.len().min(payload.len());
            to[..size].copy_from_slice(&bytes[payload.start..][..size]);
        }
        let last = self.offset == head.length;
        self.current = if last { None } else { Some(head) };
        Ok(Some(Part { head, offset, payload, last, start: self.start }))
    }

    /// The head that begins with the kept bytes of the last call and continues in `bytes`. Also
    /// returns the size of its part in `bytes`.
    fn head(&mut self, bytes: &[u8]) -> Result<Option<(Head, usize)>> {
        let found = if self.partial_size == 0 {
            Head::parse(bytes)?
        } else {
            let room = &mut self.partial[self.partial_size..];
            let size = room.len().min(bytes.len());
            room[..size].copy_from_slice(&bytes[..size]);
            let found = Head::parse(&self.partial[..self.partial_size + size])?;
            found.map(|(head, size)| (head, size - self.partial_size))
        };
        if let Some((head, _)) = found {
            ensure!(head.mask.is_some() == self.masked, "a frame has the mask {:?}", head.mask);
            (self.partial_size, self.offset, self.start) = (0, 0, [0; 8]);
        } else {
            // An incomplete head is shorter than the longest head, so there is room.
            if self.partial_size == 0 {
                self.partial[..bytes.len()].copy_from_slice(bytes);
            }
            self.partial_size += bytes.len();
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MASK: [u8; 4] = [1, 2, 3, 0x80];

    fn payload(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at % 251) as u8).collect()
    }

    /// The payloads that `Frames` finds when the bytes come in pieces of `piece` bytes, and the
    /// first bytes of each payload.
    fn payloads(bytes: &[u8], piece: usize, mut frames: Frames) -> Vec<(Vec<u8>, [u8; 8])> {
        let (mut all, mut current) = (Vec::new(), Vec::new());
        for piece in bytes.chunks(piece) {
            let mut at = 0..piece.len();
            while let Some(part) = frames.next(piece, &mut at).expect("valid frames") {
                assert_eq!(part.offset, current.len() as u64);
                assert!(
                    part.last || !part.payload.is_empty(),
                    "an empty part that is not the frame's only one"
                );
                let mut payload = piece[part.payload].to_vec();
                if let Some(mask) = part.head.mask {
                    apply(mask, part.offset, &mut payload);
                }
                current.extend(payload);
                if part.last {
                    all.push((std::mem::take(&mut current), part.start));
                }
            }
            assert!(at.is_empty());
        }
        all
    }

    #[test]
    fn finds_frames_of_all_sizes_in_pieces_of_any_size() {
        let lengths = [0, 1, 7, 8, 125, 126, 127, 4096, 0xffff, 0x1_0000, 0, 3];
        for mask in [None, Some(MASK)] {
            let bytes: Vec<u8> = lengths.iter().flat_map(|&it| message(&payload(it), mask)).collect();
            for piece in [1, 2, 3, 5, 13, 14, 15, 64, 1000, 0x1_0000, usize::MAX] {
                let found = payloads(&bytes, piece, Frames::new(mask.is_some()));
                assert_eq!(found.len(), lengths.len());
                for ((found, mut start), length) in found.into_iter().zip(lengths) {
                    assert_eq!(found, payload(length));
                    let known = length.min(8);
                    apply(mask.unwrap_or_default(), 0, &mut start[..known]);
                    assert_eq!(start[..known], payload(known));
                    assert_eq!(start[known..], [0; 8][known..]);
                }
            }
        }
    }

    #[test]
    fn frames_are_as_the_rfc_shows_them() {
        // The examples of RFC 6455 5.7, but with the opcode for binary instead of text.
        assert_eq!(message(b"Hello", None), b"\x82\x05Hello");
        let masked = message(b"Hello", Some([0x37, 0xfa, 0x21, 0x3d]));
        assert_eq!(masked, b"\x82\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58");
        assert_eq!(message(&[0; 256], None)[..4], [0x82, 0x7e, 1, 0]);
        assert_eq!(message(&[0; 0x1_0000], None)[..10], [0x82, 0x7f, 0, 0, 0, 0, 0, 1, 0, 0]);
    }

    #[test]
    fn refuses_bytes_that_are_not_a_frame() {
        let refused = |bytes: &[u8], mut frames: Frames| frames.next(bytes, &mut (0..bytes.len())).is_err();
        assert!(refused(b"HTTP/1.1 200 OK", Frames::from_endpoint()), "reserved bits");
        assert!(refused(&[0x83, 0], Frames::from_endpoint()), "a reserved opcode was accepted");
        assert!(refused(b"\x82\x05Hello", Frames::from_client()), "no mask");
        assert!(refused(&message(b"Hello", Some(MASK)), Frames::from_endpoint()), "a mask");
    }

    #[test]
    fn a_ping_is_answered_by_a_pong() {
        let ping = Head { fin: true, opcode: PING, mask: Some(MASK), length: 3 };
        assert_eq!(ping.echo(), Head { opcode: PONG, mask: None, ..ping });
    }
}
