//! Bodies: a [`BodyReader`] follows the framing that a body came in, a [`BodyWriter`] frames the
//! payload anew. Chunk extensions end here.

use std::io::Write as _;

use super::fields::{Fields, Spelling};
use super::malformed::Malformed;
use super::request::{BodyFraming, parse_fields};

/// Bytes of all trailer lines of a body, and of one chunk's extensions.
const MAX_TRAILERS: usize = 16 * 1024;
const MAX_EXTENSIONS: u32 = 16 * 1024;
/// 60 bits: no chunk is longer, and the arithmetic cannot overflow.
const MAX_CHUNK_DIGITS: u8 = 15;

/// Follows the framing of one body.
#[derive(Debug)]
pub struct BodyReader {
    state: State,
    /// The trailer lines so far, with their line ends.
    trailers: Vec<u8>,
}

/// What stands at the front of the unread bytes of a body: framing, then payload. Both 0: more bytes
/// are needed, or the body is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Piece {
    pub framing: usize,
    pub payload: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Done,
    /// Bytes still to come; never 0.
    Length(u64),
    UntilClose,
    Chunked(Chunk),
}

/// Position within a chunked body (RFC 9112, 7.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chunk {
    Size {
        value: u64,
        digits: u8,
    },
    Extension {
        value: u64,
        len: u32,
    },
    SizeLf {
        value: u64,
    },
    /// Bytes of the chunk still to come; never 0.
    Data(u64),
    DataCr,
    DataLf,
    /// At the start of a trailer line or of the empty line.
    Trailer,
    TrailerLine,
    TrailerLf,
    EndLf,
}

impl BodyReader {
    pub fn new(framing: BodyFraming) -> Self {
        let state = match framing {
            BodyFraming::None | BodyFraming::Length(0) => State::Done,
            BodyFraming::Length(length) => State::Length(length),
            BodyFraming::Chunked => State::Chunked(Chunk::Size { value: 0, digits: 0 }),
            BodyFraming::UntilClose => State::UntilClose,
        };
        Self { state, trailers: Vec::new() }
    }

    /// Whether all of the body has been read.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// The connection has ended. Returns whether the body is whole.
    pub fn end(&mut self) -> bool {
        if self.state == State::UntilClose {
            self.state = State::Done;
        }
        self.is_done()
    }

    /// Looks at the unread bytes, from which the caller removes the piece before the next call.
    ///
    /// # Errors
    /// Nothing after this point can be understood. What came before has been returned.
    pub fn next(&mut self, unread: &[u8]) -> Result<Piece, Malformed> {
        match self.state {
            State::Done => Ok(Piece::default()),
            State::UntilClose => Ok(Piece { framing: 0, payload: unread.len() }),
            State::Length(left) => {
                let payload = at_most(left, unread.len());
                let left = left - payload as u64;
                self.state = if left == 0 { State::Done } else { State::Length(left) };
                Ok(Piece { framing: 0, payload })
            }
            State::Chunked(chunk) => self.next_in_chunks(chunk, unread),
        }
    }

    fn next_in_chunks(&mut self, mut chunk: Chunk, unread: &[u8]) -> Result<Piece, Malformed> {
        let mut framing = 0;
        while let Some(&byte) = unread.get(framing) {
            if let Chunk::Data(left) = chunk {
                let payload = at_most(left, unread.len() - framing);
                let left = left - payload as u64;
                self.state = State::Chunked(if left == 0 { Chunk::DataCr } else { Chunk::Data(left) });
                return Ok(Piece { framing, payload });
            }
            if matches!(chunk, Chunk::Trailer | Chunk::TrailerLine | Chunk::TrailerLf) {
                if self.trailers.len() >= MAX_TRAILERS {
                    return Err(Malformed::Chunk);
                }
                self.trailers.push(byte);
            }
            framing += 1;
            let Some(next) = chunk.after(byte)? else {
                // The CR of the empty line is there already.
                self.trailers.push(b'\n');
                parse_fields(&self.trailers).map_err(|_why| Malformed::Chunk)?;
                self.state = State::Done;
                return Ok(Piece { framing, payload: 0 });
            };
            chunk = next;
        }
        self.state = State::Chunked(chunk);
        Ok(Piece { framing, payload: 0 })
    }

    /// The trailer lines of a body that is done.
    pub fn trailers(&self) -> Fields<'_> {
        parse_fields(&self.trailers).unwrap_or_default()
    }
}

fn at_most(left: u64, len: usize) -> usize {
    len.min(usize::try_from(left).unwrap_or(usize::MAX))
}

impl Chunk {
    /// The position after `byte`; `None` after the end of the body.
    fn after(self, byte: u8) -> Result<Option<Self>, Malformed> {
        Ok(Some(match (self, byte) {
            (Self::Size { value, digits }, _) if byte.is_ascii_hexdigit() && digits < MAX_CHUNK_DIGITS => {
                let digit = char::from(byte).to_digit(16).unwrap_or_default();
                Self::Size { value: value << 4 | u64::from(digit), digits: digits + 1 }
            }
            (Self::Size { value, digits: 1.. }, b'\r') => Self::SizeLf { value },
            (Self::Size { value, digits: 1.. }, b';') => Self::Extension { value, len: 0 },
            (Self::Extension { value, .. }, b'\r') => Self::SizeLf { value },
            (Self::SizeLf { value: 0 }, b'\n') => Self::Trailer,
            (Self::SizeLf { value }, b'\n') => Self::Data(value),
            (Self::DataCr, b'\r') => Self::DataLf,
            (Self::DataLf, b'\n') => Self::Size { value: 0, digits: 0 },
            (Self::Trailer, b'\r') => Self::EndLf,
            (Self::TrailerLine, b'\r') => Self::TrailerLf,
            (Self::TrailerLf, b'\n') => Self::Trailer,
            (Self::EndLf, b'\n') => return Ok(None),
            (Self::Extension { value, len }, b' '.. | b'\t') if byte != 0x7f && len < MAX_EXTENSIONS => {
                Self::Extension { value, len: len + 1 }
            }
            (Self::Trailer, b'!'..) if byte != 0x7f => Self::TrailerLine,
            (Self::TrailerLine, b' '.. | b'\t') if byte != 0x7f => Self::TrailerLine,
            _ => return Err(Malformed::Chunk),
        }))
    }
}

/// How a body is framed on its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyWriter {
    /// By its length, or by the end of the connection: nothing is added.
    Bare,
    Chunked,
}

impl BodyWriter {
    /// Writes some payload.
    pub fn write(self, payload: &[u8], out: &mut Vec<u8>) {
        match self {
            Self::Chunked if !payload.is_empty() => {
                // Writing to memory does not fail.
                write!(out, "{:x}\r\n", payload.len()).ok();
                out.extend_from_slice(payload);
                out.extend_from_slice(b"\r\n");
            }
            Self::Bare | Self::Chunked => out.extend_from_slice(payload),
        }
    }

    /// Writes what comes after all payload.
    pub fn finish(self, trailers: &Fields<'_>, spelling: Spelling, out: &mut Vec<u8>) {
        if self == Self::Chunked {
            out.extend_from_slice(b"0\r\n");
            trailers.write(spelling, out);
            out.extend_from_slice(b"\r\n");
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The payload, the trailers and what is left of `bytes`, which come in segments that end at
    /// `cuts`; or what was read before an error.
    fn read(
        framing: BodyFraming,
        bytes: &[u8],
        cuts: &[usize],
    ) -> (Vec<u8>, Result<(String, usize), Malformed>) {
        let mut reader = BodyReader::new(framing);
        let (mut payload, mut from) = (Vec::new(), 0);
        for end in cuts.iter().copied().chain([bytes.len()]) {
            while !reader.is_done() {
                let unread = &bytes[from.min(end)..end];
                match reader.next(unread) {
                    Ok(piece) if piece == Piece::default() => break,
                    Ok(piece) => {
                        from += piece.framing;
                        payload.extend_from_slice(&bytes[from..from + piece.payload]);
                        from += piece.payload;
                    }
                    Err(why) => return (payload, Err(why)),
                }
            }
        }
        let mut trailers = Vec::new();
        reader.trailers().write(Spelling::Preserved, &mut trailers);
        let whole = if reader.is_done() { "" } else { "cut" };
        (payload, Ok((String::from_utf8_lossy(&trailers).into_owned() + whole, bytes.len() - from)))
    }

    fn piece() -> impl Strategy<Value = Vec<u8>> {
        let known = prop::sample::select(vec![
            &b"5\r\nhello\r\n"[..],
            b"a;x=\"y\"\r\n0123456789\r\n",
            b"0\r\n\r\n",
            b"0\r\nTrailer: x\r\n\r\n",
            b"\r\n",
            b"\n",
            b"A: b\r\n",
        ]);
        prop_oneof![
            8 => known.prop_map(<[u8]>::to_vec),
            1 => prop::collection::vec(any::<u8>(), 0..8),
        ]
    }

    proptest! {
        #[test]
        fn segments_make_no_difference(
            pieces in prop::collection::vec(piece(), 0..8),
            mut cuts in prop::collection::vec(0usize..80, 0..12),
            length in 1u64..60,
        ) {
            let bytes = pieces.concat();
            cuts.iter_mut().for_each(|cut| *cut = (*cut).min(bytes.len()));
            cuts.sort_unstable();
            let each: Vec<usize> = (0..bytes.len()).collect();
            for framing in [BodyFraming::Chunked, BodyFraming::Length(length), BodyFraming::UntilClose] {
                let whole = read(framing, &bytes, &[]);
                prop_assert_eq!(&read(framing, &bytes, &cuts), &whole);
                prop_assert_eq!(&read(framing, &bytes, &each), &whole);
            }
        }

        #[test]
        fn what_is_written_is_read_again(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..6)) {
            let mut out = Vec::new();
            for piece in &pieces {
                BodyWriter::Chunked.write(piece, &mut out);
            }
            let mut trailers = Fields::default();
            trailers.push(b"X-A", &b"1"[..]);
            BodyWriter::Chunked.finish(&trailers, Spelling::Preserved, &mut out);
            out.extend_from_slice(b"GET");
            prop_assert_eq!(read(BodyFraming::Chunked, &out, &[]), (pieces.concat(), Ok(("X-A: 1\r\n".to_owned(), 3))));
        }
    }

    #[test]
    fn bad_chunks_are_refused_after_the_payload_before_them() {
        for (chunks, good) in [
            ("\r\n", ""),
            ("g\r\n", ""),
            (" 1\r\na\r\n", ""),
            ("+1\r\na\r\n", ""),
            ("0x1\r\na\r\n", ""),
            ("1\na\r\n", ""),
            ("1 \r\na\r\n", ""),
            ("1;\na\r\n", ""),
            ("1;\0\r\na\r\n", ""),
            ("1\r\rna\r\n", ""),
            ("1\r\nab\r\n", "a"),
            ("1\r\na\n", "a"),
            ("0\r\n\n", ""),
            ("0\r\nA: b\n\r\n", ""),
            ("0\r\n folded\r\n\r\n", ""),
            ("0\r\nno colon\r\n\r\n", ""),
            ("2\r\nab\r\n1000000000000000\r\n", "ab"),
        ] {
            let read = read(BodyFraming::Chunked, chunks.as_bytes(), &[]);
            assert_eq!(read, (good.into(), Err(Malformed::Chunk)), "{chunks:?}");
        }
    }

    #[test]
    fn trailers_and_extensions_are_bounded() {
        let trailers = |len: usize| format!("0\r\nA: {}\r\n\r\n", "b".repeat(len));
        assert!(read(BodyFraming::Chunked, trailers(MAX_TRAILERS - 100).as_bytes(), &[]).1.is_ok());
        assert!(read(BodyFraming::Chunked, trailers(MAX_TRAILERS).as_bytes(), &[]).1.is_err());
        let extension = |len: usize| format!("1;{}\r\na\r\n0\r\n\r\n", "b".repeat(len));
        assert!(read(BodyFraming::Chunked, extension(MAX_EXTENSIONS as usize).as_bytes(), &[]).1.is_ok());
        assert!(
            read(BodyFraming::Chunked, extension(MAX_EXTENSIONS as usize + 1).as_bytes(), &[]).1.is_err()
        );
    }

    #[test]
    fn a_body_until_the_close_is_whole_at_the_end_and_others_are_not() {
        assert!(BodyReader::new(BodyFraming::UntilClose).end());
        assert!(BodyReader::new(BodyFraming::None).end());
        assert!(!BodyReader::new(BodyFraming::Length(1)).end());
        assert!(!BodyReader::new(BodyFraming::Chunked).end());
    }
}
