//! Ends that a peer announces: FINs in both orders, RSTs of every kind, and ends by the proxy
//! itself.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use crate::net::{Family, Net, Path, Setup, at_once, every_path, on};
use crate::stream::{HANG, Learned, Side, learned, learned_by_writing, reset, say};

#[test]
fn a_half_closed_stream_goes_on_the_other_way() {
    at_once_on_every_path(|net| {
        for side in Side::BOTH {
            let (mut first, mut second) = net.carried().from(side);
            first.write_all(b"my last word").unwrap();
            first.shutdown(Shutdown::Write).unwrap();
            let mut got = Vec::new();
            second.read_to_end(&mut got).unwrap();
            assert_eq!(got, b"my last word");
            for _ in 0..100 {
                say(&mut second, &mut first, &[7; 3000]);
            }
            drop(second);
            assert_eq!(learned(&mut first, HANG), Learned::Fin);
        }
        expect_ends(net, "finished", 2);
    });
}

#[test]
fn both_sides_may_close_at_once() {
    at_once_on_every_path(|net| {
        const STREAMS: usize = 20;
        for _ in 0..STREAMS {
            let stream = net.carried();
            let (mut client, mut backend) = stream.from(Side::Client);
            std::thread::scope(|scope| {
                scope.spawn(|| client.shutdown(Shutdown::Write).unwrap());
                backend.shutdown(Shutdown::Write).unwrap();
            });
            assert_eq!(learned(&mut client, HANG), Learned::Fin);
            assert_eq!(learned(&mut backend, HANG), Learned::Fin);
        }
        expect_ends(net, "finished", STREAMS as u64);
    });
}

#[test]
fn a_reset_is_learned_at_once() {
    at_once_on_every_path(|net| {
        for side in Side::BOTH {
            let (first, mut second) = net.carried().from(side);
            reset(first);
            assert_eq!(learned(&mut second, HANG), Learned::Reset, "quiet, {side:?}");

            let (first, mut second) = net.carried().from(side);
            unread(&first, &mut second);
            drop(first);
            assert_eq!(learned(&mut second, HANG), Learned::Reset, "unread data, {side:?}");

            let (first, mut second) = net.carried().from(side);
            first.shutdown(Shutdown::Write).unwrap();
            assert_eq!(learned(&mut second, HANG), Learned::Fin);
            reset(first);
            assert_eq!(learned_by_writing(&mut second, HANG), Learned::Reset, "half-closed, {side:?}");

            let (first, mut second) = net.carried().from(side);
            second.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
            // The write times out when the buffers are full.
            second.write_all(&vec![1; 64 << 20]).ok();
            reset(first);
            assert_eq!(learned_by_writing(&mut second, HANG), Learned::Reset, "in full flow, {side:?}");
        }
        expect_ends(net, "reset", 8);
    });
}

fn at_once_on_every_path(scenario: impl Fn(&mut Net<'_>) + Sync) {
    at_once(every_path(), |setup| on(setup, &scenario));
}

/// Sends data that nobody reads.
fn unread(first: &TcpStream, second: &mut TcpStream) {
    second.write_all(b"never read").unwrap();
    let peeked = first.peek(&mut [0]).unwrap();
    assert_eq!(peeked, 1);
}

/// (Streams that the kernel carries go on: see the suite `outlive`.)
#[test]
fn when_the_proxy_stops_relayed_streams_end() {
    on(Setup::new(Path::Relay, Family::V4), |net| {
        let streams: Vec<_> = (0..10).map(|_| net.carried()).collect();
        net.steer.process().signal(libc::SIGTERM).unwrap();
        for mut stream in streams {
            // When a process ends, the kernel closes sockets without unread data by a FIN.
            assert_eq!(learned(&mut stream.client, HANG), Learned::Fin);
            assert_eq!(learned(&mut stream.backend, HANG), Learned::Fin);
        }
        assert!(net.steer.process().wait(HANG).unwrap().success());
    });
}

/// A stream whose endpoint does not read stays in its hand-over, with sockets.
#[test]
fn when_the_proxy_stops_in_a_hand_over_both_sides_are_reset() {
    at_once(Family::BOTH, |family| {
        on(Setup::new(Path::Packet, family).with("hand_over_within: 1s"), |net| {
            let mut stream = (0..5)
                .find_map(|_| {
                    let mut stream = net.open();
                    stream.client.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
                    // Writes until the socket takes no more.
                    while stream.client.write(&[1; 65_536]).is_ok() {}
                    // Much longer than the hand-over of a stream that can be handed over.
                    std::thread::sleep(Duration::from_millis(1500));
                    let row = net.row(&stream).unwrap();
                    // The hand-over may have ended before the buffers were full.
                    (row["path"] == "packet" && !net.sockets_of(&stream).is_empty()).then_some(stream)
                })
                .expect("a stream in its hand-over");
            net.steer.process().signal(libc::SIGTERM).unwrap();
            assert_eq!(learned(&mut stream.client, HANG), Learned::Reset);
            assert_eq!(learned(&mut stream.backend, HANG), Learned::Reset);
            assert!(net.steer.process().wait(HANG).unwrap().success());
        });
    });
}

fn expect_ends(net: &Net<'_>, end: &str, streams: u64) {
    net.expect_nothing_left();
    assert_eq!(net.ended(end), streams, "{end}");
}
