//! The framing of requests. The result does not depend on how the bytes are cut into pieces. An
//! accepted head has one meaning.
#![no_main]

use libfuzzer_sys::fuzz_target;
use steer_policy::http1::framing::{Event, Framing, Limits};
use steer_policy::http1::head::{self, BodyFraming, Head, Malformed};

const HEADERS: usize = 8;
const LIMITS: Limits = Limits { head_bytes: 512, headers: HEADERS };

/// What the scanner reported. Pieces of a body that follow each other are joined.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Head(Vec<u8>, Head),
    Body(Vec<u8>),
    Malformed(Malformed),
}

/// Gives the scanner `pieces` one after the other, as they would arrive.
fn scan<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Seen> {
    let mut framing = Framing::new(LIMITS);
    let (mut seen, mut unread) = (Vec::new(), Vec::new());
    for piece in pieces {
        unread.extend_from_slice(piece);
        loop {
            let len = match framing.next(&unread) {
                Event::Incomplete => break,
                Event::Malformed(why) => {
                    seen.push(Seen::Malformed(why));
                    return seen;
                }
                Event::Blank(len) | Event::Head { len, .. } | Event::Body(len)
                    if !(1..=unread.len()).contains(&len) =>
                {
                    panic!("an event covers {len} of {} bytes", unread.len())
                }
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
            };
            unread.drain(..len);
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

/// hyper reads heads with httparse. If httparse accepts this head, both parsers have to find the
/// same end and the same meaning.
fn agrees_with_httparse(bytes: &[u8], head: &Head) {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(status) => assert_eq!(
            status,
            httparse::Status::Complete(bytes.len()),
            "httparse finds another end of the head"
        ),
        Err(_refused) => return,
    }
    let is_http_11 = request.version == Some(1);
    let values = |name: &str| -> Vec<String> {
        let named = request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case(name));
        named
            .map(|header| String::from_utf8_lossy(header.value).trim_matches([' ', '\t']).to_owned())
            .collect()
    };
    let body = match (&values("content-length")[..], &values("transfer-encoding")[..]) {
        ([], []) => BodyFraming::None,
        ([length], []) => match length.parse() {
            Ok(0) => BodyFraming::None,
            Ok(length) => BodyFraming::Length(length),
            Err(error) => panic!("accepted the length {length:?}: {error}"),
        },
        ([], [encoding]) if is_http_11 && encoding.eq_ignore_ascii_case("chunked") => BodyFraming::Chunked,
        both => panic!("accepted {both:?}"),
    };
    assert_eq!(head.body, body, "(framing, httparse)");
    assert!(values("host").len() <= 1, "accepted two hosts");
    let connection = values("connection").join(",").to_ascii_lowercase();
    let asks = connection.split(',').any(|token| token.trim_matches([' ', '\t']) == "upgrade");
    let to_websocket =
        matches!(&values("upgrade")[..], [protocol] if protocol.eq_ignore_ascii_case("websocket"));
    assert_eq!(head.upgrade, is_http_11 && asks && to_websocket, "(framing, httparse) upgrade");
}

/// A body is never longer than its head says. It is shorter only if the input ends within the body.
fn bodies_are_as_announced(seen: &[Seen]) {
    for (index, item) in seen.iter().enumerate() {
        let Seen::Head(bytes, head) = item else { continue };
        let body = match seen.get(index + 1) {
            Some(Seen::Body(body)) => body.len() as u64,
            _ => 0,
        };
        let is_last = seen.len() <= index + 1 + usize::from(body > 0);
        match head.body {
            BodyFraming::Length(length) if !head.upgrade => {
                assert!(body == length || body < length && is_last, "{body} of {length} bytes");
            }
            BodyFraming::Chunked if !head.upgrade => {}
            _ => assert_eq!(body, 0, "a body after {bytes:?}"),
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let Some(pieces) = cut(input) else { return };
    let bytes = pieces.concat();
    let seen = scan([&bytes[..]]);
    assert_eq!(scan(pieces), seen, "(in pieces, in one)");
    assert_eq!(scan(bytes.chunks(1)), seen, "(byte by byte, in one)");
    bodies_are_as_announced(&seen);
    for item in &seen {
        let Seen::Head(bytes, head) = item else { continue };
        agrees_with_httparse(bytes, head);
        let bare = head::check(&head::without_body_headers(bytes));
        assert_eq!(
            bare,
            Ok(Head { body: BodyFraming::None, ..*head }),
            "the head without the headers about its body"
        );
    }
});
