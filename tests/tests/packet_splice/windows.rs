//! Peers with small receive windows, and a proxy whose own receive buffers may be so large that it
//! counts windows in units of several kilobytes.

use std::io::{Read as _, Write as _};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use socket2::SockRef;
use steer_tests::eventually::eventually;
use steer_tests::require;
use steer_tests::topology::Topology;

use crate::net::{Family, Net, Path, Setup, at_once};
use crate::stream::{HANG, Side, Stream};

/// Windows in bytes: of uIP, of small lwIPs, lwIP's default, that of an ESP32, and two that are
/// common without scaling.
const WINDOWS: [u32; 6] = [536, 1000, 2144, 5744, 16_384, 65_535];
/// Maxima of the proxy's `tcp_rmem`, in MiB. The units are 128 bytes (1,024 with a large
/// `rmem_max`), 8 KiB and 16 KiB.
const BUFFERS: [u32; 3] = [6, 256, 1024];
/// A receiver whose window is smaller than two segments acknowledges after 40 ms or more.
const MESSAGE_WITHIN: Duration = Duration::from_secs(2);
const BULK: usize = 20_000;

#[test]
fn small_windows_stall_nobody() {
    if !require::root() {
        return;
    }
    at_once([true, false], |scaling| {
        for buffers in BUFFERS {
            try_windows(buffers, scaling);
        }
    });
}

fn try_windows(buffers: u32, scaling: bool) {
    let topology = Topology::new(1).unwrap();
    let rmem = format!("4096 131072 {}", u64::from(buffers) << 20);
    topology.proxy.sysctl("net.ipv4.tcp_rmem", &rmem).unwrap();
    let relay = Setup::new(Path::Relay, Family::V4);
    for side in Side::BOTH {
        let host = [&topology.clients, &topology.endpoints[0]][side as usize];
        host.sysctl("net.ipv4.tcp_window_scaling", if scaling { "1" } else { "0" }).unwrap();
        let limits = WINDOWS.map(|window| {
            limit_windows(&topology, side, window);
            (window, run(&Net::start(&topology, relay.clone()), side).1)
        });
        let net = Net::start(&topology, Setup::new(Path::Packet, Family::V4));
        for (window, relayed) in limits {
            limit_windows(&topology, side, window);
            let (row, spliced) = run(&net, side);
            let what = format!(
                "{buffers} MiB, scaling {scaling}, {side:?}, {window} bytes: {} {}: {spliced:?}, relayed {relayed:?}",
                row["path"], row["reason"]
            );
            println!("{what}");
            // Any window of a client can be expressed exactly.
            assert!(side == Side::Backend || row["path"] == "packet", "{what}");
            // To a peer with a tiny window, TCP sends segments of half the window. The client's
            // segments are too large for that.
            assert!(row["path"] == "packet" || row["reason"] == "window" || row["reason"] == "mss", "{what}");
            assert!(spliced <= relayed * 2 + Duration::from_secs(1), "{what}");
        }
        limit_windows(&topology, side, 0);
        host.sysctl("net.ipv4.tcp_window_scaling", "1").unwrap();
    }
}

/// Limits the windows that the host of `side` offers to this many bytes. 0: no limit below its
/// buffers.
fn limit_windows(topology: &Topology, side: Side, window: u32) {
    let (host, link) = [(&topology.clients, 0), (&topology.endpoints[0], 1)][side as usize];
    let network = format!("10.71.{link}.0/24");
    let source = format!("10.71.{link}.2");
    let window = window.to_string();
    host.ip(&["route", "replace", &network, "dev", "eth0", "src", &source, "window", &window]).unwrap();
}

/// A stream whose peer at `side` has small windows: a message each way, and bulk to that peer.
/// Returns the stream's row, and how long the bulk took.
fn run(net: &Net<'_>, side: Side) -> (Value, Duration) {
    let mut stream = net.open();
    let row = decided(net, &stream);
    let took = stream.echo();
    assert!(took < MESSAGE_WITHIN, "{row}: a message each way took {took:?}");
    let (mut small, mut other) = stream.from(side);
    let begin = Instant::now();
    other.write_all(&[7; BULK]).unwrap();
    small.read_exact(&mut [0; BULK]).unwrap();
    (row, begin.elapsed())
}

/// The stream's row, once its path is decided.
fn decided(net: &Net<'_>, stream: &Stream) -> Value {
    let decided = || {
        let row = net.row(stream);
        Ok(row.filter(|row| {
            net.setup.path == Path::Relay || !row["reason"].is_null() || net.sockets_of(stream).is_empty()
        }))
    };
    eventually("stream whose path is decided", HANG, decided).unwrap()
}

/// The smallest buffers that Linux lets a program ask for, and a reader that lets them become full.
#[test]
fn the_smallest_receive_buffers_are_filled_and_emptied() {
    if !require::root() {
        return;
    }
    at_once([6_u32, 1024], |buffers| {
        let topology = Topology::new(1).unwrap();
        let rmem = format!("4096 131072 {}", u64::from(buffers) << 20);
        topology.proxy.sysctl("net.ipv4.tcp_rmem", &rmem).unwrap();
        let net = Net::start(&topology, Setup::new(Path::Packet, Family::V4));
        let mut stream = net.open_with(|socket| socket.set_recv_buffer_size(1).unwrap());
        assert!(SockRef::from(&stream.client).recv_buffer_size().unwrap() < 4096);
        net.expect_path(&stream, Path::Packet);
        stream.echo();
        for _ in 0..3 {
            let mut backend = stream.backend.try_clone().unwrap();
            let writes = thread::spawn(move || backend.write_all(&[7; BULK]));
            thread::sleep(Duration::from_millis(500));
            stream.client.read_exact(&mut [0; BULK]).unwrap();
            writes.join().unwrap().unwrap();
        }
    });
}
