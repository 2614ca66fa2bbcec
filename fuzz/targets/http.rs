//! Requests and responses as bytes. The result does not depend on how the bytes are cut into pieces.
//! An accepted head has one meaning, which a second parser shares, and what Steer writes of it is
//! read again as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use steer_policy::http1::body::{BodyReader, BodyWriter, Piece};
use steer_policy::http1::fields::{Fields, Spelling};
use steer_policy::http1::malformed::Malformed;
use steer_policy::http1::request::{BodyFraming, RequestHead};
use steer_policy::http1::response::ResponseHead;
use steer_policy::http1::scan::{HeadScan, Limits, Scanned};

const HEADERS: usize = 8;
const LIMITS: Limits = Limits { head_bytes: 512, headers: HEADERS };

/// What was understood. Payload of one body is joined.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Head(Vec<u8>),
    Body { payload: Vec<u8>, trailers: Vec<u8>, whole: bool },
    Malformed(Malformed),
}

/// Reads requests from `pieces`, which arrive one after the other.
fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Seen> {
    let mut scan = HeadScan::new(LIMITS);
    let mut body: Option<BodyReader> = None;
    let (mut seen, mut unread) = (Vec::new(), Vec::new());
    for piece in pieces {
        unread.extend_from_slice(piece);
        loop {
            let Some(reader) = &mut body else {
                match scan.next(&unread) {
                    Scanned::Incomplete => break,
                    Scanned::Blank(len) => drop(unread.drain(..len)),
                    Scanned::Head(len) => {
                        let bytes: Vec<u8> = unread.drain(..len).collect();
                        match RequestHead::parse(&bytes) {
                            Ok(head) => body = Some(BodyReader::new(head.body)),
                            Err(why) => {
                                seen.push(Seen::Malformed(why));
                                return seen;
                            }
                        }
                        seen.push(Seen::Head(bytes));
                        seen.push(Seen::Body { payload: Vec::new(), trailers: Vec::new(), whole: false });
                    }
                    Scanned::Malformed(why) => {
                        seen.push(Seen::Malformed(why));
                        return seen;
                    }
                }
                continue;
            };
            match reader.next(&unread) {
                Err(why) => {
                    seen.push(Seen::Malformed(why));
                    return seen;
                }
                Ok(piece) => {
                    let end = piece.framing + piece.payload;
                    let Some(Seen::Body { payload, trailers, whole }) = seen.last_mut() else {
                        panic!("a body without a head")
                    };
                    payload.extend_from_slice(&unread[piece.framing..end]);
                    unread.drain(..end);
                    if reader.is_done() {
                        *whole = true;
                        reader.trailers().write(Spelling::Preserved, trailers);
                        body = None;
                    } else if piece == Piece::default() {
                        break;
                    }
                }
            }
        }
    }
    seen
}

/// Cuts the input into pieces. The lower four bits of the first byte are the number of cuts. One
/// byte for each cut follows: the distance from the cut before. The rest is what arrives.
fn cut(input: &[u8]) -> Option<Vec<&[u8]>> {
    let (count, rest) = input.split_first()?;
    let (distances, mut rest) = rest.split_at_checked(usize::from(count & 0xf))?;
    let mut pieces = Vec::new();
    for distance in distances {
        let (piece, after) = rest.split_at(rest.len().min(usize::from(*distance)));
        pieces.push(piece);
        rest = after;
    }
    pieces.push(rest);
    Some(pieces)
}

fn lines<'h>(head: &'h RequestHead<'_>) -> Vec<(&'h [u8], &'h [u8])> {
    head.fields.iter().map(|field| (field.name, &*field.value)).collect()
}

/// A whole parser of another crate finds the same end and the same lines, or refuses the head.
fn agrees_with_httparse(bytes: &[u8], head: &RequestHead<'_>) {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(status) => {
            assert_eq!(
                status,
                httparse::Status::Complete(bytes.len()),
                "httparse finds another end of the head"
            );
        }
        Err(_refused) => return,
    }
    assert_eq!(request.method, Some(head.method));
    assert_eq!(request.path.map(str::as_bytes), Some(&*head.target));
    let theirs: Vec<_> = request.headers.iter().map(|line| (line.name.as_bytes(), line.value)).collect();
    assert_eq!(lines(head), theirs, "(Steer, httparse)");
    let values = |name: &str| -> Vec<String> {
        let named = request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case(name));
        named.map(|header| String::from_utf8_lossy(header.value).into_owned()).collect()
    };
    let body = match (&values("content-length")[..], &values("transfer-encoding")[..]) {
        ([], []) => BodyFraming::None,
        ([length], []) => match length.parse() {
            Ok(0) => BodyFraming::None,
            Ok(length) => BodyFraming::Length(length),
            Err(error) => panic!("accepted the length {length:?}: {error}"),
        },
        ([], [encoding]) if request.version == Some(1) && encoding.eq_ignore_ascii_case("chunked") => {
            BodyFraming::Chunked
        }
        both => panic!("accepted {both:?}"),
    };
    assert_eq!(head.body, body, "(Steer, httparse)");
    assert!(values("host").len() <= 1, "accepted two hosts");
}

/// What is written of a head is a head, with the same lines.
fn is_read_again(head: &RequestHead<'_>) {
    let mut out = Vec::new();
    head.write(Spelling::Preserved, &mut out);
    let limits = Limits { head_bytes: 2 * LIMITS.head_bytes, headers: HEADERS };
    assert_eq!(HeadScan::new(limits).next(&out), Scanned::Head(out.len()), "what is written is one head");
    let again = RequestHead::parse(&out).expect("what is written is a head");
    assert_eq!((again.method, &again.target), (head.method, &head.target));
    assert_eq!(lines(&again), lines(head));
}

/// What is written of a chunked body is read as the same payload, and nothing is left.
fn body_is_read_again(payload: &[u8]) {
    let mut out = Vec::new();
    BodyWriter::Chunked.write(payload, &mut out);
    BodyWriter::Chunked.finish(&Fields::default(), Spelling::LowerCase, &mut out);
    let (mut reader, mut rest, mut again) = (BodyReader::new(BodyFraming::Chunked), &out[..], Vec::new());
    while !reader.is_done() {
        let piece = reader.next(rest).expect("what is written is a chunked body");
        assert_ne!(piece, Piece::default(), "what is written is whole");
        again.extend_from_slice(&rest[piece.framing..][..piece.payload]);
        rest = &rest[piece.framing + piece.payload..];
    }
    assert_eq!((&again[..], rest), (payload, &b""[..]));
}

/// A response head is found at the same place however much follows, and its body has one framing.
fn response(bytes: &[u8]) {
    let Ok(Some((len, head))) = ResponseHead::parse(bytes) else { return };
    assert_eq!(ResponseHead::parse(&bytes[..len]), Ok(Some((len, head.clone()))));
    for end in 0..len {
        assert!(!matches!(ResponseHead::parse(&bytes[..end]), Ok(Some(_))), "a shorter head at {end}");
    }
    let _framing = (head.body(false), head.body(true), head.keeps_alive());
}

fuzz_target!(|input: &[u8]| {
    let Some(pieces) = cut(input) else { return };
    let bytes = pieces.concat();
    let seen = read([&bytes[..]]);
    assert_eq!(read(pieces), seen, "(in pieces, in one)");
    assert_eq!(read(bytes.chunks(1)), seen, "(byte by byte, in one)");
    for item in &seen {
        match item {
            Seen::Head(bytes) => {
                let head = RequestHead::parse(bytes).expect("the head was read before");
                agrees_with_httparse(bytes, &head);
                is_read_again(&head);
            }
            Seen::Body { payload, .. } => body_is_read_again(payload),
            Seen::Malformed(_) => {}
        }
    }
    response(&bytes);
});
