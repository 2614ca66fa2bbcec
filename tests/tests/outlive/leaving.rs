//! What remains of a Steer that will not be started again.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::thread;

use steer_tests::eventually::eventually;
use steer_tests::require;
use steer_tests::steer::Attach;
use steer_tests::topology::Topology;

use crate::bed::{Bed, HANG, Kernel, endpoint, front, runtime};
use crate::death::ANSWER;
use crate::traffic;

/// The kernel gives out some of these ports by itself, so Steer has to reserve them.
const PORTS: &str = "source_ports: [20000-20999, 40000-40999]";

/// Opens streams without traffic, and returns the clients' sockets.
pub(crate) fn open(topology: &Topology, streams: usize) -> Vec<TcpStream> {
    let clients = || {
        runtime().block_on(async {
            let mut all = Vec::new();
            for _ in 0..streams {
                let stream = traffic::open(front()).await.unwrap().into_std().unwrap();
                stream.set_nonblocking(false).unwrap();
                all.push(stream);
            }
            all
        })
    };
    topology.clients.run(clients).unwrap()
}

/// Runs `work` while an endpoint answers. Returns for each connection whether it ended by a reset.
pub(crate) fn with_endpoint<T: Send>(
    topology: &Topology,
    streams: usize,
    work: impl FnOnce() -> T + Send,
) -> (T, Vec<bool>) {
    let listener = topology.endpoints[0].run(|| TcpListener::bind(endpoint()).unwrap()).unwrap();
    thread::scope(|scope| {
        let endpoint = scope.spawn(move || {
            let ends: Vec<_> = std::iter::from_fn(|| Some(listener.accept().unwrap().0))
                .filter_map(|mut socket| {
                    socket.set_read_timeout(Some(HANG)).unwrap();
                    // A connection without a request: Steer only wanted to learn the MSS.
                    (socket.peek(&mut [0]).unwrap_or(0) > 0).then(|| {
                        answer(&mut socket);
                        socket
                    })
                })
                .take(streams)
                .collect();
            ends.into_iter().map(is_reset).collect::<Vec<_>>()
        });
        let done = work();
        (done, endpoint.join().unwrap())
    })
}

pub(crate) fn answer(socket: &mut TcpStream) {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        socket.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    socket.write_all(ANSWER).unwrap();
}

pub(crate) fn is_reset(mut socket: TcpStream) -> bool {
    socket.set_read_timeout(Some(HANG)).unwrap();
    matches!(socket.read(&mut [0]), Err(error) if error.kind() == ErrorKind::ConnectionReset)
}

pub(crate) fn expect_spliced(bed: &Bed<'_>, streams: usize) {
    eventually("spliced streams", HANG, || Ok((bed.spliced() == streams).then_some(()))).unwrap();
}

#[test]
fn detach_resets_both_sides_and_leaves_nothing() {
    if !require::root() {
        return;
    }
    const STREAMS: usize = 30;
    let signals = |attach| [libc::SIGTERM, libc::SIGKILL].map(|signal| (attach, signal));
    for (attach, signal) in Attach::all().into_iter().flat_map(signals) {
        let topology = Topology::new(1).unwrap();
        let mut bed = Bed::start_attaching(attach, &topology, &[PORTS]);
        let pins = bed.pins();
        bed.steer.stop(libc::SIGTERM).unwrap();
        let before = Kernel::now(&topology, &pins);
        bed.steer.start_again().unwrap();
        let (clients, endpoints) = with_endpoint(&topology, STREAMS, || {
            let streams = open(&topology, STREAMS);
            expect_spliced(&bed, STREAMS);
            bed.steer.stop(signal).unwrap();
            assert_ne!(Kernel::now(&topology, &pins), before, "streams go on");
            let kept = bed.cli_text(&["cleanup"]);
            assert!(kept.contains("30 streams live") && kept.contains("steer detach"), "{kept}");
            assert!(bed.cli_text(&["detach", "--dry-run"]).contains("would reset 30 streams"));
            let said = bed.cli_text(&["detach", "--json"]);
            assert!(said.contains("\"streams\":30"), "{said}");
            streams.into_iter().map(is_reset).collect::<Vec<_>>()
        });
        assert_eq!((clients, endpoints), (vec![true; STREAMS], vec![true; STREAMS]));
        before.expect(&topology, &pins);
        assert!(bed.cli_text(&["detach"]).contains("nothing was left"));
    }
}

#[test]
fn a_stop_without_streams_leaves_nothing_and_cleanup_takes_what_a_crash_leaves() {
    if !require::root() {
        return;
    }
    Attach::all().into_iter().for_each(leaves_nothing);
}

fn leaves_nothing(attach: Attach) {
    let topology = Topology::new(1).unwrap();
    let mut bed = Bed::start_attaching(attach, &topology, &[PORTS]);
    let pins = bed.pins();
    assert!(pins.exists());
    bed.steer.stop(libc::SIGTERM).unwrap();
    let before = Kernel::now(&topology, &pins);
    bed.steer.start_again().unwrap();
    bed.under_traffic(10, |_, _| {});
    bed.expect_no_stream();
    bed.steer.stop(libc::SIGKILL).unwrap();
    assert_ne!(Kernel::now(&topology, &pins), before);
    assert!(bed.cli_text(&["cleanup", "--dry-run", "--json"]).contains("\"removed\":true"));
    assert_ne!(Kernel::now(&topology, &pins), before);
    bed.cli_text(&["cleanup"]);
    before.expect(&topology, &pins);
    // The next process knows what has to be restored.
    bed.steer.start_again().unwrap();
    bed.steer.restart(libc::SIGKILL).unwrap();
    bed.steer.stop(libc::SIGTERM).unwrap();
    before.expect(&topology, &pins);
    assert!(bed.cli_text(&["cleanup"]).contains("nothing was left"));
}

/// With the mounts of `ip netns exec`, for example, the pins may disappear when the process ends.
#[test]
fn a_stop_resets_streams_where_the_bpf_file_system_is_private() {
    if !require::root() {
        return;
    }
    const STREAMS: usize = 10;
    let topology = Topology::new(1).unwrap();
    let script = "while umount /sys/fs/bpf 2>/dev/null; do :; done; exec \"$@\"";
    let private = ["unshare", "--mount", "sh", "-c", script, "sh"].map(str::to_owned);
    let mut bed = Bed::start_wrapped(&topology, private.into());
    assert!(bed.steer.said().unwrap().contains("streams end with it"));
    assert!(!bed.pins().exists(), "the pins are visible outside the private mount");
    let (clients, endpoints) = with_endpoint(&topology, STREAMS, || {
        let streams = open(&topology, STREAMS);
        expect_spliced(&bed, STREAMS);
        bed.steer.stop(libc::SIGTERM).unwrap();
        streams.into_iter().map(is_reset).collect::<Vec<_>>()
    });
    assert_eq!((clients, endpoints), (vec![true; STREAMS], vec![true; STREAMS]));
}
