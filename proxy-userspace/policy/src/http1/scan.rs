//! Where request heads end in the bytes of a downstream connection. The same bytes give the same
//! answers however they are cut into segments.

use super::malformed::Malformed;

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
pub enum Scanned {
    /// More bytes are needed to tell.
    Incomplete,
    /// This many bytes of empty lines before a request line (RFC 9112, 2.2), to be skipped.
    Blank(usize),
    /// A whole request head of so many bytes: lines that end with CRLF, without NUL and without a
    /// further CR or LF, up to and including the empty line.
    Head(usize),
    /// Nothing after this point can be understood.
    Malformed(Malformed),
}

/// Looks for the end of one request head, and remembers how far it has looked.
#[derive(Debug, Clone, Copy)]
pub struct HeadScan {
    limits: Limits,
    scanned: usize,
    line_start: usize,
    lines: usize,
}

impl HeadScan {
    pub fn new(limits: Limits) -> Self {
        Self { limits, scanned: 0, line_start: 0, lines: 0 }
    }

    /// Looks at the unread bytes. The caller removes what was skipped or found from the front before
    /// the next call. After [`Scanned::Incomplete`] the caller calls again with the same bytes and
    /// more.
    pub fn next(&mut self, unread: &[u8]) -> Scanned {
        let bytes = &unread[..unread.len().min(self.limits.head_bytes)];
        while let Some(found) = memchr::memchr3(b'\r', b'\n', 0, &bytes[self.scanned..]) {
            let at = self.scanned + found;
            match (bytes[at], bytes.get(at + 1)) {
                (0, _) => return Scanned::Malformed(Malformed::Nul),
                (b'\n', _) => return Scanned::Malformed(Malformed::BareLf),
                (_, Some(b'\n')) => {}
                (_, Some(_)) => return Scanned::Malformed(Malformed::BareCr),
                (_, None) => {
                    self.scanned = at;
                    return self.incomplete(bytes.len());
                }
            }
            let empty = at == self.line_start;
            (self.scanned, self.line_start) = (at + 2, at + 2);
            match (empty, self.lines) {
                (true, lines) => {
                    *self = Self::new(self.limits);
                    return if lines == 0 { Scanned::Blank(at + 2) } else { Scanned::Head(at + 2) };
                }
                (false, lines) if lines > self.limits.headers => {
                    return Scanned::Malformed(Malformed::TooManyHeaders);
                }
                (false, _) => self.lines += 1,
            }
        }
        self.scanned = bytes.len();
        self.incomplete(bytes.len())
    }

    fn incomplete(&self, len: usize) -> Scanned {
        if len >= self.limits.head_bytes {
            Scanned::Malformed(Malformed::TooLong)
        } else {
            Scanned::Incomplete
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits { head_bytes: 256, headers: 4 };

    /// Feeds `bytes` in segments that end at `cuts`. Returns the heads, and why the scan stopped.
    fn scan(bytes: &[u8], cuts: &[usize]) -> (Vec<Vec<u8>>, Option<Malformed>) {
        let mut scan = HeadScan::new(LIMITS);
        let (mut heads, mut unread, mut fed) = (Vec::new(), Vec::new(), 0);
        for end in cuts.iter().copied().chain([bytes.len()]) {
            let end = end.clamp(fed, bytes.len());
            unread.extend_from_slice(&bytes[fed..end]);
            fed = end;
            loop {
                match scan.next(&unread) {
                    Scanned::Incomplete => break,
                    Scanned::Blank(len) => drop(unread.drain(..len)),
                    Scanned::Head(len) => heads.push(unread.drain(..len).collect()),
                    Scanned::Malformed(why) => return (heads, Some(why)),
                }
            }
        }
        (heads, None)
    }

    /// The same, read byte by byte: slow, and plain.
    fn plain(bytes: &[u8]) -> (Vec<Vec<u8>>, Option<Malformed>) {
        let (mut heads, mut head, mut line, mut lines) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for (at, &byte) in bytes.iter().enumerate() {
            if head.len() >= LIMITS.head_bytes {
                return (heads, Some(Malformed::TooLong));
            }
            head.push(byte);
            match byte {
                0 => return (heads, Some(Malformed::Nul)),
                b'\n' if line.last() != Some(&b'\r') => return (heads, Some(Malformed::BareLf)),
                b'\n' if line == b"\r" => {
                    if lines > 0 {
                        heads.push(std::mem::take(&mut head));
                    }
                    (head, line, lines) = (Vec::new(), Vec::new(), 0);
                }
                b'\n' => {
                    lines += 1;
                    line.clear();
                    if lines > LIMITS.headers + 1 {
                        return (heads, Some(Malformed::TooManyHeaders));
                    }
                }
                b'\r'
                    if head.len() < LIMITS.head_bytes
                        && bytes.get(at + 1).is_some_and(|&next| next != b'\n') =>
                {
                    return (heads, Some(Malformed::BareCr));
                }
                byte => line.push(byte),
            }
        }
        let long = head.len() >= LIMITS.head_bytes;
        (heads, long.then_some(Malformed::TooLong))
    }

    fn piece() -> impl Strategy<Value = Vec<u8>> {
        let known = prop::sample::select(vec![
            &b"GET / HTTP/1.1\r\nHost: t\r\n\r\n"[..],
            b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\n",
            b"\r\n",
            b"\n",
            b"\r",
            b"\0",
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
        fn the_scan_finds_what_a_plain_reader_finds_however_the_bytes_are_cut(
            pieces in prop::collection::vec(piece(), 0..8),
            mut cuts in prop::collection::vec(0usize..600, 0..12),
        ) {
            let bytes = pieces.concat();
            cuts.sort_unstable();
            let whole = plain(&bytes);
            prop_assert_eq!(&scan(&bytes, &[]), &whole);
            prop_assert_eq!(&scan(&bytes, &cuts), &whole);
            let each: Vec<usize> = (0..bytes.len()).collect();
            prop_assert_eq!(&scan(&bytes, &each), &whole);
        }
    }

    fn why(bytes: &str) -> Option<Malformed> {
        scan(bytes.as_bytes(), &[]).1
    }

    #[test]
    fn limits_hold_to_the_byte() {
        let of = |len: usize| format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "a".repeat(len - 23));
        assert_eq!(of(LIMITS.head_bytes).len(), LIMITS.head_bytes);
        assert_eq!(why(&of(LIMITS.head_bytes)), None);
        assert_eq!(why(&of(LIMITS.head_bytes + 1)), Some(Malformed::TooLong));
        assert_eq!(why(&"a".repeat(LIMITS.head_bytes)), Some(Malformed::TooLong));
        let of = |lines: usize| format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(lines));
        assert_eq!(why(&of(LIMITS.headers)), None);
        assert_eq!(why(&of(LIMITS.headers + 1)), Some(Malformed::TooManyHeaders));
    }

    #[test]
    fn heads_follow_each_other_and_empty_lines_are_skipped() {
        let get = "GET / HTTP/1.1\r\nHost: t\r\n\r\n";
        let (heads, why) = scan(format!("\r\n{get}\r\n\r\n{get}").as_bytes(), &[]);
        assert_eq!((heads, why), (vec![get.into(), get.into()], None));
    }
}
