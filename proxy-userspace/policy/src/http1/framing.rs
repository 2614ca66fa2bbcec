//! Where requests begin and end in the bytes of a downstream connection. Pure: no I/O, no clock;
//! the same bytes give the same events however they are cut into segments.

use super::head::{self, BodyFraming, Head, Malformed};

/// Limits on a request head.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes, from the request line to the empty line.
    pub head_bytes: usize,
    /// Header lines.
    pub headers: usize,
}

/// What stands at the front of the unread bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// More bytes are needed to tell.
    Incomplete,
    /// This many bytes of empty lines before a request line (RFC 9112, 2.2), to be skipped.
    Blank(usize),
    /// A whole request head of `len` bytes.
    Head { len: usize, head: Head },
    /// This many bytes of the current request's body, chunk framing included.
    Body(usize),
    /// Nothing after this point can be understood.
    Malformed(Malformed),
}

/// Follows the framing of one connection's requests.
#[derive(Debug)]
pub struct Framing {
    limits: Limits,
    state: State,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Head(HeadScan),
    /// Bytes of a Content-Length body still to come; never 0.
    Length(u64),
    Chunked(Chunk),
    /// After [`Event::Malformed`].
    Broken(Malformed),
}

/// How many bytes of an incomplete head were examined.
#[derive(Debug, Clone, Copy, Default)]
struct HeadScan {
    scanned: usize,
    line_start: usize,
    lines: usize,
}

/// Position within a chunked body (RFC 9112, 7.1).
#[derive(Debug, Clone, Copy)]
enum Chunk {
    Size {
        value: u64,
        digits: u8,
    },
    Extension {
        value: u64,
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

/// 60 bits: no chunk is longer, and the arithmetic cannot overflow.
const MAX_CHUNK_DIGITS: u8 = 15;

impl Framing {
    pub fn new(limits: Limits) -> Self {
        Self { limits, state: State::Head(HeadScan::default()) }
    }

    /// Between requests, or within a request head.
    pub fn at_head(&self) -> bool {
        matches!(self.state, State::Head(_))
    }

    /// Looks at the unread bytes. The caller removes from the front what the event covers before
    /// the next call, and after [`Event::Incomplete`] calls again with the same bytes and more.
    pub fn next(&mut self, unread: &[u8]) -> Event {
        match self.state {
            State::Head(scan) => self.next_in_head(scan, unread),
            State::Length(left) => {
                let len = unread.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                match left - len as u64 {
                    0 => self.state = State::Head(HeadScan::default()),
                    left => self.state = State::Length(left),
                }
                if len == 0 { Event::Incomplete } else { Event::Body(len) }
            }
            State::Chunked(chunk) => self.next_in_chunks(chunk, unread),
            State::Broken(why) => Event::Malformed(why),
        }
    }

    fn malformed(&mut self, why: Malformed) -> Event {
        self.state = State::Broken(why);
        Event::Malformed(why)
    }

    fn next_in_head(&mut self, mut scan: HeadScan, unread: &[u8]) -> Event {
        let bytes = &unread[..unread.len().min(self.limits.head_bytes)];
        while let Some(found) = memchr::memchr3(b'\r', b'\n', 0, &bytes[scan.scanned..]) {
            let at = scan.scanned + found;
            match (bytes[at], bytes.get(at + 1)) {
                (0, _) => return self.malformed(Malformed::Nul),
                (b'\n', _) => return self.malformed(Malformed::BareLf),
                (_, Some(b'\n')) => {}
                (_, Some(_)) => return self.malformed(Malformed::BareCr),
                (_, None) => {
                    scan.scanned = at;
                    return self.incomplete_head(scan, bytes.len());
                }
            }
            let empty = at == scan.line_start;
            scan.scanned = at + 2;
            scan.line_start = at + 2;
            match (empty, scan.lines) {
                (true, 0) => {
                    self.state = State::Head(HeadScan::default());
                    return Event::Blank(at + 2);
                }
                (true, _) => return self.complete_head(&bytes[..at + 2]),
                (false, lines) if lines > self.limits.headers => {
                    return self.malformed(Malformed::TooManyHeaders);
                }
                (false, _) => scan.lines += 1,
            }
        }
        scan.scanned = bytes.len();
        self.incomplete_head(scan, bytes.len())
    }

    fn incomplete_head(&mut self, scan: HeadScan, len: usize) -> Event {
        if len >= self.limits.head_bytes {
            return self.malformed(Malformed::TooLong);
        }
        self.state = State::Head(scan);
        Event::Incomplete
    }

    fn complete_head(&mut self, bytes: &[u8]) -> Event {
        match head::check(bytes) {
            Ok(head) => {
                self.state = match head.body {
                    // Bytes after an upgrade have no framing: they follow the 101 unchanged.
                    _ if head.upgrade => State::Head(HeadScan::default()),
                    BodyFraming::None => State::Head(HeadScan::default()),
                    BodyFraming::Length(length) => State::Length(length),
                    BodyFraming::Chunked => State::Chunked(Chunk::Size { value: 0, digits: 0 }),
                };
                Event::Head { len: bytes.len(), head }
            }
            Err(why) => self.malformed(why),
        }
    }

    fn next_in_chunks(&mut self, mut chunk: Chunk, unread: &[u8]) -> Event {
        let mut at = 0;
        while let Some(&byte) = unread.get(at) {
            if let Chunk::Data(left) = chunk {
                let len = (unread.len() - at).min(usize::try_from(left).unwrap_or(usize::MAX));
                at += len;
                chunk = match left - len as u64 {
                    0 => Chunk::DataCr,
                    left => Chunk::Data(left),
                };
                continue;
            }
            match chunk.after(byte) {
                Ok(Some(next)) => chunk = next,
                Ok(None) => {
                    self.state = State::Head(HeadScan::default());
                    return Event::Body(at + 1);
                }
                // Bytes before the problem are reported first, so that the result does not depend
                // on segments.
                Err(why) if at == 0 => return self.malformed(why),
                Err(_) => break,
            }
            at += 1;
        }
        self.state = State::Chunked(chunk);
        if at == 0 { Event::Incomplete } else { Event::Body(at) }
    }
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
            (Self::Size { value, digits: 1.. }, b';') => Self::Extension { value },
            (Self::Extension { value }, b'\r') => Self::SizeLf { value },
            (Self::SizeLf { value: 0 }, b'\n') => Self::Trailer,
            (Self::SizeLf { value }, b'\n') => Self::Data(value),
            (Self::DataCr, b'\r') => Self::DataLf,
            (Self::DataLf, b'\n') => Self::Size { value: 0, digits: 0 },
            (Self::Trailer, b'\r') => Self::EndLf,
            (Self::TrailerLine, b'\r') => Self::TrailerLf,
            (Self::TrailerLf, b'\n') => Self::Trailer,
            (Self::EndLf, b'\n') => return Ok(None),
            (Self::Extension { value }, b' '.. | b'\t') if byte != 0x7f => Self::Extension { value },
            (Self::Trailer, b'!'..) if byte != 0x7f => Self::TrailerLine,
            (Self::TrailerLine, b' '.. | b'\t') if byte != 0x7f => Self::TrailerLine,
            _ => return Err(Malformed::Chunk),
        }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits { head_bytes: 256, headers: 4 };

    /// What was seen, with neighbouring pieces of a body joined.
    #[derive(Debug, Clone, PartialEq, Eq)]
    enum Seen {
        Head(Vec<u8>, Head),
        Body(Vec<u8>),
        Malformed(Malformed),
    }

    /// Feeds `bytes` in segments that end at `cuts`.
    fn scan(bytes: &[u8], cuts: &[usize]) -> Vec<Seen> {
        let mut framing = Framing::new(LIMITS);
        let mut seen = Vec::new();
        let mut unread = Vec::new();
        let mut fed = 0;
        for end in cuts.iter().copied().chain([bytes.len()]) {
            let end = end.clamp(fed, bytes.len());
            unread.extend_from_slice(&bytes[fed..end]);
            fed = end;
            loop {
                let len = match framing.next(&unread) {
                    Event::Incomplete => break,
                    Event::Blank(len) => len,
                    Event::Head { len, head } => {
                        seen.push(Seen::Head(unread[..len].to_vec(), head));
                        len
                    }
                    Event::Body(len) => {
                        match seen.last_mut() {
                            Some(Seen::Body(body)) => body.extend_from_slice(&unread[..len]),
                            _ => seen.push(Seen::Body(unread[..len].to_vec())),
                        }
                        len
                    }
                    Event::Malformed(why) => {
                        seen.push(Seen::Malformed(why));
                        return seen;
                    }
                };
                assert!(len > 0, "an event covers something");
                unread.drain(..len);
            }
        }
        seen
    }

    fn piece() -> impl Strategy<Value = Vec<u8>> {
        let known = prop::sample::select(vec![
            &b"GET / HTTP/1.1\r\nHost: t\r\n\r\n"[..],
            b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"5\r\nhello\r\n",
            b"a;x=\"y\"\r\n0123456789\r\n",
            b"0\r\n\r\n",
            b"0\r\nTrailer: x\r\n\r\n",
            b"GET / HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
            b"\r\n",
            b"\n",
            b"\r",
            b"\0",
            b"Content-Length: 3\r\n",
            b"A: b\r\n",
        ]);
        prop_oneof![
            8 => known.prop_map(<[u8]>::to_vec),
            1 => prop::collection::vec(any::<u8>(), 0..8),
            1 => prop::collection::vec(prop::sample::select(b"\r\n 0a:;".to_vec()), 0..300),
        ]
    }

    proptest! {
        #[test]
        fn segments_make_no_difference(
            pieces in prop::collection::vec(piece(), 0..8),
            mut cuts in prop::collection::vec(0usize..600, 0..12),
        ) {
            let bytes = pieces.concat();
            cuts.sort_unstable();
            let whole = scan(&bytes, &[]);
            prop_assert_eq!(&scan(&bytes, &cuts), &whole);
            let each: Vec<usize> = (0..bytes.len()).collect();
            prop_assert_eq!(&scan(&bytes, &each), &whole);
        }

        /// Heads and bodies that were passed are the input, in order and without gaps (but for
        /// empty lines), up to where it stopped making sense.
        #[test]
        fn nothing_is_lost_or_invented(pieces in prop::collection::vec(piece(), 0..8)) {
            let bytes = pieces.concat();
            let mut rest = &bytes[..];
            for seen in scan(&bytes, &[]) {
                let passed = match seen {
                    Seen::Head(head, _) => {
                        while let Some(after) = rest.strip_prefix(b"\r\n") {
                            rest = after;
                        }
                        head
                    }
                    Seen::Body(body) => body,
                    Seen::Malformed(_) => break,
                };
                prop_assert!(rest.starts_with(&passed));
                rest = &rest[passed.len()..];
            }
        }
    }

    proptest! {
        /// hyper parses with httparse: it must see the head end where the guard saw it, or refuse
        /// it.
        #[test]
        fn hyper_agrees_where_a_head_ends(
            mut bytes in prop::sample::select(vec![
                &b"GET /a HTTP/1.1\r\nHost: t\r\nA: b\r\n\r\nrest\r\n\r\n"[..],
                b"POST / HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc\r\n\r\n",
            ]).prop_map(<[u8]>::to_vec),
            changes in prop::collection::vec((0usize..64, prop::sample::select(b"\r\n \t:,;a0\0\x7f\xff".to_vec())), 0..4),
            insert in any::<bool>(),
        ) {
            for (at, byte) in changes {
                let at = at % bytes.len();
                if insert { bytes.insert(at, byte) } else { bytes[at] = byte }
            }
            let mut framing = Framing::new(LIMITS);
            if let Event::Head { len, .. } = framing.next(&bytes) {
                let mut headers = [httparse::EMPTY_HEADER; LIMITS.headers];
                match httparse::Request::new(&mut headers).parse(&bytes) {
                    Ok(status) => prop_assert_eq!(status, httparse::Status::Complete(len)),
                    Err(_refused) => {}
                }
            }
        }
    }

    fn kinds(bytes: &str) -> String {
        let name = |seen: &Seen| match seen {
            Seen::Head(..) => "head".to_owned(),
            Seen::Body(body) => format!("body {}", body.len()),
            Seen::Malformed(why) => why.into_str().to_owned(),
        };
        scan(bytes.as_bytes(), &[]).iter().map(name).collect::<Vec<_>>().join(", ")
    }

    #[test]
    fn requests_follow_each_other() {
        let get = "GET / HTTP/1.1\r\nHost: t\r\n\r\n";
        assert_eq!(kinds(&get.repeat(3)), "head, head, head");
        let post = "POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc";
        assert_eq!(kinds(&format!("\r\n{post}\r\n{get}")), "head, body 3, head");
        let chunked =
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n0\r\nX: y\r\n\r\n";
        assert_eq!(kinds(&format!("{chunked}{get}")), "head, body 23, head");
        // A body that was announced with an upgrade is not framed.
        let upgrade =
            "GET / HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 3\r\n\r\n";
        assert_eq!(kinds(&format!("{upgrade}{get}")), "head, head");
    }

    #[test]
    fn limits_hold_to_the_byte() {
        let of = |len: usize| format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "a".repeat(len - 23));
        assert_eq!(of(LIMITS.head_bytes).len(), LIMITS.head_bytes);
        assert_eq!(kinds(&of(LIMITS.head_bytes)), "head");
        assert_eq!(kinds(&of(LIMITS.head_bytes + 1)), "head_too_long");
        assert_eq!(kinds(&"a".repeat(LIMITS.head_bytes)), "head_too_long");
        let of = |lines: usize| format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(lines));
        assert_eq!(kinds(&of(LIMITS.headers)), "head");
        assert_eq!(kinds(&of(LIMITS.headers + 1)), "too_many_headers");
    }

    #[test]
    fn bad_chunks() {
        let head = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
        for (chunks, good) in [
            ("\r\n", 0),
            ("g\r\n", 0),
            (" 1\r\na\r\n", 0),
            ("+1\r\na\r\n", 0),
            ("0x1\r\na\r\n", 1),
            ("1\na\r\n", 1),
            ("1 \r\na\r\n", 1),
            ("1;\na\r\n", 2),
            ("1;\0\r\na\r\n", 2),
            ("1\r\rna\r\n", 2),
            ("1\r\nab\r\n", 4),
            ("1\r\na\n", 4),
            ("0\r\n\n", 3),
            ("0\r\nA: b\n\r\n", 7),
            ("0\r\n folded\r\n\r\n", 3),
            ("1000000000000000\r\n", 15),
        ] {
            let expected =
                if good == 0 { "head, chunk".to_owned() } else { format!("head, body {good}, chunk") };
            assert_eq!(kinds(&format!("{head}{chunks}")), expected, "{chunks:?}");
        }
    }
}
