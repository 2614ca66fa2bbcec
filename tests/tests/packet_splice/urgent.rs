//! Urgent bytes, at any moment of a hand-over. A read stops before an urgent byte. The bytes after
//! it must still arrive.

use std::fs;
use std::io::{Read as _, Write as _};
use std::thread;
use std::time::{Duration, Instant};

use socket2::SockRef;
use steer_tests::eventually::eventually;
use steer_tests::require;

use crate::net::{GONE_WITHIN, Net, Path, every_path, on};
use crate::stream::{HANG, Side, Stream};

/// The delay of the later bytes after the 101, in milliseconds: before, during and after the
/// hand-over.
const DELAYS: std::ops::Range<u64> = 0..60;

#[test]
fn urgent_bytes_arrive_in_their_place() {
    let streams = if require::long() { 1000 } else { 60 };
    every_path().for_each(|setup| on(setup, |net| send_urgent_bytes(net, streams)));
}

fn send_urgent_bytes(net: &Net<'_>, streams: u64) {
    // For the first stream, Steer opens descriptors that it keeps.
    drop(net.carried());
    net.expect_nothing_left();
    let descriptors = descriptors(net);
    let sent: Vec<_> = (0..streams)
        .map(|index| {
            let stream = net.open();
            thread::spawn(move || send_one(stream, index))
        })
        .collect();
    let mut streams: Vec<_> = sent.into_iter().map(|sent| sent.join().unwrap()).collect();
    let path = net.setup.path.as_str();
    let carried = || {
        let rows = net.steer.flows()?;
        Ok(rows.iter().all(|row| row["path"] == path).then_some(rows.len()))
    };
    assert_eq!(eventually("path of all streams", HANG, carried).unwrap(), streams.len());
    for stream in &mut streams {
        stream.echo();
    }
    if net.setup.path == Path::Packet {
        let handed_over = |how| net.steer.metric("steer_hand_overs_total", &[("how", how)]).unwrap();
        let all = 1.0 + streams.len() as f64;
        let complete = || Ok((handed_over("quiet") + handed_over("busy") == all).then_some(()));
        eventually("end of all hand-overs", HANG, complete).unwrap();
        assert_eq!(handed_over("failed") + handed_over("expired"), 0.0);
    }
    drop(streams);
    net.expect_nothing_left();
    let begin = Instant::now();
    while self::descriptors(net) > descriptors {
        assert!(begin.elapsed() < GONE_WITHIN, "{descriptors} descriptors became {}", self::descriptors(net));
        thread::sleep(Duration::from_millis(50));
    }
}

/// Sends `abc` at once, and an urgent `X` and `def` later. The panic message names the stream.
fn send_one(stream: Stream, index: u64) -> Stream {
    let side = Side::BOTH[(index % 2) as usize];
    let delay = DELAYS.start + index / 2 % (DELAYS.end - DELAYS.start);
    let (mut from, mut to) = match side {
        Side::Client => (&stream.client, &stream.backend),
        Side::Backend => (&stream.backend, &stream.client),
    };
    SockRef::from(to).set_out_of_band_inline(true).unwrap();
    from.write_all(b"abc").unwrap();
    thread::sleep(Duration::from_millis(delay));
    SockRef::from(from).send_out_of_band(b"X").unwrap();
    from.write_all(b"def").unwrap();
    let mut got = Vec::new();
    while got.len() < 7 {
        let mut buffer = [0; 7];
        match to.read(&mut buffer) {
            Ok(read @ 1..) => got.extend_from_slice(&buffer[..read]),
            other => panic!("{side:?}, {delay} ms: {other:?} within {HANG:?} after {got:?}"),
        }
    }
    assert_eq!(got, b"abcXdef", "{side:?}, {delay} ms");
    stream
}

fn descriptors(net: &Net<'_>) -> usize {
    fs::read_dir(format!("/proc/{}/fd", net.steer.pid())).unwrap().count()
}
