//! Peers that vanish without closing their connection.

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use steer_tests::eventually::eventually;
use steer_tests::sockets;

use crate::net::{Family, Net, Path, Setup, at_once, on};
use crate::stream::{HANG, Learned, Side, learned, learned_by_writing, say};

/// A peer is given up after four seconds of silence.
const PROBED: &str = "keepalive: { time: 1s, interval: 1s, probes: 3 }";
/// Four seconds, and time for a busy machine.
const GIVEN_UP_WITHIN: Duration = Duration::from_secs(9);

/// How a host vanishes.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// Its cable is pulled.
    Unplugged,
    /// The proxy's interface towards the host disappears, too.
    Removed,
}

fn take_away(net: &Net<'_>, side: Side, way: Way) {
    let host = match side {
        Side::Client => &net.topology.clients,
        Side::Backend => &net.topology.endpoints[0],
    };
    match way {
        Way::Unplugged => host.ip(&["link", "set", "eth0", "down"]).unwrap(),
        Way::Removed => host.ip(&["link", "delete", "eth0"]).unwrap(),
    }
}

fn each_case(keepalive: &str, case: impl Fn(&Net<'_>, Side, Way) + Sync) {
    for family in Family::BOTH {
        let all = Side::BOTH.into_iter().flat_map(|side| [(side, Way::Unplugged), (side, Way::Removed)]);
        at_once(all, |(side, way)| {
            on(Setup::new(Path::Packet, family).with(keepalive), |net| case(net, side, way));
        });
    }
}

#[test]
fn a_peer_that_vanished_is_probed_and_the_other_one_reset() {
    each_case(PROBED, |net, side, way| {
        let (_gone, mut other) = net.carried().from(side);
        let (_also_gone, mut busy) = net.carried().from(side);
        take_away(net, side, way);
        busy.write_all(b"into the void").unwrap();
        assert_eq!(learned(&mut other, GIVEN_UP_WITHIN), Learned::Reset, "{side:?}, {way:?}, idle");
        assert_eq!(learned(&mut busy, GIVEN_UP_WITHIN), Learned::Reset, "{side:?}, {way:?}, sending");
        net.expect_nothing_left();
        assert_eq!(net.ended("reset"), 2);
    });
}

#[test]
fn peers_that_are_only_silent_are_left_alone() {
    at_once(Family::BOTH, |family| {
        on(Setup::new(Path::Packet, family).with(PROBED), |net| {
            let mut streams: Vec<_> = (0..5).map(|_| net.carried()).collect();
            let before = net.packets("spliced");
            thread::sleep(Duration::from_secs(6));
            assert!(net.packets("spliced") > before, "no probe was answered");
            for stream in &mut streams {
                stream.echo();
            }
            drop(streams);
            net.expect_nothing_left();
            assert_eq!(net.ended("finished"), 5);
        });
    });
}

/// A hand-over lasts as long as a peer has not read the bytes before it. It ends when that peer is
/// gone.
#[test]
fn a_hand_over_waits_for_a_peer_that_lives() {
    let all = Side::BOTH.into_iter().flat_map(|side| [(side, false), (side, true)]);
    at_once(all, |(side, vanishes)| {
        on(Setup::new(Path::Packet, Family::V4).with(PROBED), |net| {
            let stream = net.open();
            let tuples = stream.proxy_tuples();
            let has_sockets = || {
                let all = net.topology.proxy.run(sockets::tcp).unwrap().unwrap();
                all.iter().filter(|one| tuples.contains(&(one.local, one.remote))).count()
            };
            let handed_over = |how| net.steer.metric("steer_hand_overs_total", &[("how", how)]).unwrap();
            let (mut reader, mut writer) = stream.from(side);
            let written = write_until_full(&mut writer);
            thread::sleep(Duration::from_secs(6));
            assert_eq!((has_sockets(), handed_over("failed")), (2, 0.0), "the hand-over ended: {side:?}");
            if vanishes {
                take_away(net, side, Way::Unplugged);
                assert_eq!(learned(&mut writer, GIVEN_UP_WITHIN), Learned::Reset, "{side:?}");
                net.expect_nothing_left();
                assert_eq!((handed_over("failed"), net.ended("reset")), (1.0, 1));
            } else {
                io::copy(&mut (&reader).take(written), &mut io::sink()).unwrap();
                let spliced = || Ok((has_sockets() == 0).then_some(()));
                eventually("an end of the hand-over", HANG, spliced).unwrap();
                say(&mut reader, &mut writer, b"all of it");
                say(&mut writer, &mut reader, b"well then");
                assert_eq!(handed_over("busy"), 1.0);
            }
        });
    });
}

/// Writes until the socket has taken nothing for half a second. Returns the number of bytes.
fn write_until_full(socket: &mut TcpStream) -> u64 {
    socket.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut written = 0;
    while let Ok(more) = socket.write(&[7; 65536]) {
        written += more as u64;
    }
    socket.set_write_timeout(Some(HANG)).unwrap();
    written
}

/// The other peer answers a peer's keepalives, as long as it lives.
#[test]
fn keepalives_of_the_peers_pass_from_end_to_end() {
    each_case("keepalive: { time: 60s, interval: 15s, probes: 4 }", |net, side, way| {
        let mut stream = net.carried();
        let keepalive = TcpKeepalive::new()
            .with_time(Duration::from_secs(1))
            .with_interval(Duration::from_secs(1))
            .with_retries(3);
        for socket in [&stream.client, &stream.backend] {
            SockRef::from(socket).set_tcp_keepalive(&keepalive).unwrap();
        }
        let before = net.packets("spliced");
        // Two probes of each side, with their answers.
        let passed = || Ok((net.packets("spliced") - before >= 8).then_some(()));
        eventually("keepalives that pass", HANG, passed).unwrap();
        stream.echo();

        let (gone, mut other) = stream.from(side);
        take_away(net, side, way);
        assert_eq!(learned(&mut other, GIVEN_UP_WITHIN), Learned::TimedOut, "{side:?}, {way:?}");
        drop(gone);
    });
}

/// The peer's host comes back without any state of the stream, and answers with a RST when bytes
/// arrive.
#[test]
fn a_peer_that_lost_its_state_says_so_when_it_is_written_to() {
    at_once(Family::BOTH, |family| {
        on(Setup::new(Path::Packet, family), |net| {
            for side in Side::BOTH {
                let (first, mut second) = net.carried().from(side);
                crate::stream::forget(first);
                assert_eq!(learned_by_writing(&mut second, GIVEN_UP_WITHIN), Learned::Reset, "{side:?}");
            }
            net.expect_nothing_left();
        });
    });
}
