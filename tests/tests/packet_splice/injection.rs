//! Forged packets with the right addresses and ports. Only the exact sequence number ends a stream.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use steer_kernel::tcp::repair;
use steer_tests::netns::NetNs;

use crate::forge::{ACK, FIN, Forger, PSH, RST, SYN, Segment};
use crate::net::{Family, Net, Path, Setup, on};
use crate::stream::{HANG, Learned, Side, Stream, learned, learned_by_writing};

const FORGERIES: usize = 100_000;
/// The longest time of an echo under attack. The attack keeps the machine's processors busy.
const ECHO_WITHIN: Duration = Duration::from_secs(1);

/// One direction of a stream, as somebody on the path could see it.
#[derive(Debug, Clone, Copy)]
struct Target {
    from: SocketAddr,
    to: SocketAddr,
    /// The sequence number that the sender of this direction would send next, and the one that it
    /// expects next.
    seq: u32,
    ack: u32,
}

/// Both directions of a quiet stream, the one towards the backend first.
fn targets(stream: &Stream) -> [Target; 2] {
    let target = |socket: &std::net::TcpStream, from, to| Target {
        from,
        to,
        seq: repair::select_send_queue(socket).and_then(|()| repair::write_seq(socket)).unwrap(),
        ack: repair::rcv_nxt(socket).unwrap(),
    };
    [
        target(&stream.client, stream.client_address, stream.front),
        target(&stream.backend, stream.endpoint, stream.source),
    ]
}

/// How many packets of each kind were sent.
#[derive(Debug, Default)]
struct Sent {
    resets: u64,
    others: u64,
}

/// A segment that cannot end the stream: of any kind, with any numbers except the right ones.
fn forged(random: &mut SmallRng, target: Target) -> Segment {
    const KINDS: [u8; 8] = [RST, RST | ACK, FIN | ACK, FIN | PSH | ACK, PSH | ACK, ACK, SYN, SYN | ACK];
    let flags = KINDS[random.random_range(0..KINDS.len())];
    let far = random.random_range(1 << 24..u32::MAX - (1 << 24));
    let seq = match random.random_range(0..4) {
        // In the window, but not exact. Only for kinds that the receiver must not accept then.
        0 if flags & (RST | SYN) != 0 => random.random_range(1..30_000),
        _ => far,
    };
    let payload = if flags & PSH != 0 { vec![b'!'; random.random_range(1..1000)] } else { Vec::new() };
    Segment {
        from: target.from,
        to: target.to,
        seq: target.seq.wrapping_add(seq),
        ack: target.ack.wrapping_add(random.random_range(1 << 24..u32::MAX - (1 << 24))),
        flags,
        window: [0, 1, 1000, 65535][random.random_range(0..4)],
        timestamps: random.random_bool(0.5).then(|| (random.random(), random.random())),
        payload,
    }
}

/// Sends forgeries from these hosts, towards the backend and towards the client, while echoes go
/// on. Returns what was sent and the slowest echo.
fn attack(stream: &mut Stream, hosts: [&NetNs; 2]) -> (Sent, Duration) {
    let targets = targets(stream);
    let forgers = hosts.map(|host| Forger::new(host, stream.front));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let attacker = scope.spawn(|| {
            let mut random = SmallRng::seed_from_u64(3);
            let mut sent = Sent::default();
            for round in 0..FORGERIES {
                let segment = forged(&mut random, targets[round % 2]);
                *if segment.flags & RST == 0 { &mut sent.others } else { &mut sent.resets } += 1;
                forgers[round % 2].send(&segment);
                if round % 100 == 0 {
                    // Gives the receiver's queue time to drain.
                    thread::sleep(Duration::from_micros(500));
                }
            }
            over.store(true, Ordering::Relaxed);
            sent
        });
        let mut slowest = Duration::ZERO;
        while !over.load(Ordering::Relaxed) {
            slowest = slowest.max(stream.echo());
        }
        (attacker.join().unwrap(), slowest)
    })
}

fn own_hosts<'n>(net: &Net<'n>) -> [&'n NetNs; 2] {
    [&net.topology.clients, &net.topology.endpoints[0]]
}

fn on_both_families(scenario: impl Fn(&mut Net<'_>)) {
    for family in [Family::V4, Family::V6] {
        on(Setup::new(Path::Packet, family), &scenario);
    }
}

#[test]
fn forgeries_from_a_spliced_interface_disturb_nothing() {
    on_both_families(|net| {
        let mut stream = net.carried();
        let before = ["implausible", "rst_unproven"].map(|what| net.packets(what));
        let begin = Instant::now();
        let (sent, slowest) = attack(&mut stream, own_hosts(net));
        let after = ["implausible", "rst_unproven"].map(|what| net.packets(what));
        let [implausible, unproven] = [after[0] - before[0], after[1] - before[1]];
        eprintln!(
            "{sent:?} in {:?}: {implausible} implausible, {unproven} unproven resets, slowest echo {slowest:?}",
            begin.elapsed()
        );
        assert!(slowest < ECHO_WITHIN, "{slowest:?}");
        assert!(unproven >= sent.resets * 9 / 10 && implausible >= sent.others * 9 / 10);
        expect_alive(net, &mut stream);
    });
}

/// The forger is on another network of the proxy, to which no stream goes. Its packets arrive on an
/// interface that may not have the program. They must not make the proxy's own stack answer for the
/// stream.
#[test]
fn forgeries_from_elsewhere_disturb_nothing() {
    on_both_families(|net| {
        for setting in ["all", "endpoint1"] {
            net.topology.proxy.sysctl(&format!("net.ipv4.conf.{setting}.rp_filter"), "0").unwrap();
        }
        let elsewhere = &net.topology.endpoints[1];
        for (network, gateway) in [("10.71.0.0/16", "10.71.2.1"), ("fd71::/32", "fd71:0:0:2::1")] {
            elsewhere.ip(&["route", "add", network, "via", gateway]).unwrap();
        }
        let mut stream = net.carried();
        let (sent, slowest) = attack(&mut stream, [elsewhere; 2]);
        eprintln!("{sent:?}: slowest echo {slowest:?}, {} resets held back", net.packets("drop_stack_rst"));
        assert!(slowest < ECHO_WITHIN, "{slowest:?}");
        expect_alive(net, &mut stream);
    });
}

fn expect_alive(net: &Net<'_>, stream: &mut Stream) {
    stream.echo();
    stream.bulk(4 << 20);
    net.expect_path(stream, Path::Packet);
    assert_eq!(net.row(stream).unwrap()["path"], "packet");
    assert_eq!(net.steer.metric("steer_streams_closed_total", &[]).unwrap(), 0.0);
}

/// With the exact number, which the forgeries do not have, one packet ends the stream.
#[test]
fn a_reset_with_the_exact_number_ends_the_stream() {
    on_both_families(|net| {
        for (direction, side) in [(0, Side::Client), (1, Side::Backend)] {
            let stream = net.carried();
            let target = targets(&stream)[direction];
            let Target { from, to, seq, ack } = target;
            let exact =
                Segment { from, to, seq, ack, flags: RST, window: 0, timestamps: None, payload: Vec::new() };
            let forger = Forger::new(own_hosts(net)[direction], stream.front);
            let (mut forged_for, mut other) = stream.from(side);
            forger.send(&exact);
            assert_eq!(learned(&mut other, HANG), Learned::Reset);
            assert_eq!(learned_by_writing(&mut forged_for, HANG), Learned::Reset);
        }
        net.expect_nothing_left();
        assert_eq!(net.ended("reset"), 2);
    });
}
