//! Linux before 6.6 has no tcx links, only filters. The kernel keeps filters when the process ends.
//! Here a Steer with fail points is told to attach filters. The other tests check what happens to
//! streams, with both links and filters.

use std::fs;
use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use steer_tests::eventually::eventually;
use steer_tests::require;
use steer_tests::steer::{Attach, binary_with_failpoints};
use steer_tests::topology::Topology;

use crate::bed::{Bed, HANG, endpoint, filters_of, tc};
use crate::leaving::{answer, expect_spliced, is_reset, open};

const STREAMS: usize = 5;

/// How many filters of Steer there are, and how many qdiscs for them.
fn filters(topology: &Topology) -> (usize, usize) {
    let count = ["clients", "endpoint0"].map(|device| filters_of(topology, device)).iter().sum();
    (count, tc(topology, &["qdisc", "show"]).matches("clsact").count())
}

/// Runs `work` while an endpoint answers. The endpoint keeps its connections until the end of
/// `work`.
pub(crate) fn with_endpoint(topology: &Topology, work: impl FnOnce()) {
    let listener = topology.endpoints[0].run(|| TcpListener::bind(endpoint()).unwrap()).unwrap();
    listener.set_nonblocking(true).unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut kept = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let Ok((mut socket, _)) = listener.accept() else {
                    thread::sleep(Duration::from_millis(2));
                    continue;
                };
                // A connection without a request: Steer only wanted to learn the MSS.
                if socket.peek(&mut [0]).unwrap_or(0) > 0 {
                    answer(&mut socket);
                    kept.push(socket);
                }
            }
        });
        let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        stop.store(true, Ordering::Relaxed);
        worked.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// Sends bytes that nobody forwards any more. Returns whether that brings a RST.
fn is_reset_when_it_speaks(mut stream: TcpStream) -> bool {
    stream.write_all(b"word").unwrap();
    is_reset(stream)
}

/// `None` if there is no Steer with fail points. Then the test is skipped.
fn start(topology: &Topology) -> Option<Bed<'_>> {
    if binary_with_failpoints().is_none() {
        require::skip("needs a steer with fail points: cargo xtask test builds it");
        return None;
    }
    Some(Bed::start_attaching(Attach::Filters, topology, &[]))
}

/// Removes the pins, as if the BPF file system had disappeared.
fn lose_pins(bed: &Bed<'_>) {
    fs::remove_dir_all(bed.pins()).unwrap();
}

#[test]
fn filters_without_pins_are_removed_and_new_streams_are_spliced() {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let Some(mut bed) = start(&topology) else { return };
    with_endpoint(&topology, || {
        let before = open(&topology, STREAMS);
        expect_spliced(&bed, STREAMS);
        assert_eq!(filters(&topology), (4, 2));
        // Filters of a living process are kept, with or without pins.
        lose_pins(&bed);
        assert!(bed.cli_text(&["cleanup"]).contains("nothing was left"));
        assert!(bed.cli_text(&["detach"]).contains("nothing was left"));
        assert_eq!(filters(&topology), (4, 2));
        bed.steer.stop(libc::SIGKILL).unwrap();
        assert_eq!(filters(&topology), (4, 2));

        bed.steer.start_again().unwrap();
        let said = bed.steer.said().unwrap();
        assert!(said.contains("removed the filters of a process that has died"), "{said}");
        assert_eq!(filters(&topology), (0, 0));
        assert!(before.into_iter().all(is_reset_when_it_speaks));
        // The new streams have the same source ports as the old ones.
        let after = open(&topology, STREAMS);
        expect_spliced(&bed, STREAMS);
        bed.steer.stop(libc::SIGKILL).unwrap();
        lose_pins(&bed);
        assert!(bed.cli_text(&["cleanup", "--dry-run"]).contains("on 2 interfaces: would be removed"));
        assert_eq!(filters(&topology), (4, 2));
        assert!(bed.cli_text(&["detach"]).contains("on 2 interfaces: removed"));
        assert_eq!(filters(&topology), (0, 0));
        assert!(after.into_iter().all(is_reset_when_it_speaks));
        assert!(bed.cli_text(&["cleanup"]).contains("nothing was left"));
    });
}

/// The filters of Steer on a device, by handle and priority, without the names of process and
/// program.
fn places(topology: &Topology, device: &str) -> Vec<String> {
    let shown = ["ingress", "egress"].map(|hook| tc(topology, &["filter", "show", "dev", device, hook]));
    let lines = shown.iter().flat_map(|shown| shown.lines().filter(|line| line.contains(" packet_")));
    lines.map(|line| line.split('/').next().unwrap().to_owned()).collect()
}

#[test]
fn a_process_takes_the_place_of_the_one_before_and_spares_what_is_not_its_own() {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let Some(mut bed) = start(&topology) else { return };
    // A qdisc that existed before stays, and so does a filter that is not Steer's.
    topology.proxy.tc(&["qdisc", "add", "dev", "clients", "clsact"]).unwrap();
    let foreign =
        ["filter", "add", "dev", "clients", "ingress", "prio", "60000", "bpf", "bytecode", "1,6 0 0 0,"];
    topology.proxy.tc(&foreign).unwrap();
    with_endpoint(&topology, || {
        let mut streams = open(&topology, STREAMS);
        expect_spliced(&bed, STREAMS);
        let first = ["clients", "endpoint0"].map(|device| places(&topology, device));
        assert!(first.iter().all(|places| places.len() == 2), "{first:?}");
        for (round, signal) in [libc::SIGKILL, libc::SIGTERM].into_iter().enumerate() {
            let shown = tc(&topology, &["filter", "show", "dev", "clients", "egress"]);
            bed.steer.stop(signal).unwrap();
            // The instance has streams, and another instance does not own them.
            let lives = format!("{} streams live", (round + 1) * STREAMS);
            assert!(bed.cli_text(&["cleanup"]).contains(&lives));
            let other = ["detach", "--instance", "another"];
            assert!(bed.cli_in(&topology, &other).contains("nothing was left"));
            bed.steer.start_again().unwrap();
            assert_eq!(["clients", "endpoint0"].map(|device| places(&topology, device)), first);
            assert_ne!(tc(&topology, &["filter", "show", "dev", "clients", "egress"]), shown);
            streams.extend(open(&topology, STREAMS));
            expect_spliced(&bed, streams.len());
        }
        bed.steer.stop(libc::SIGTERM).unwrap();
        assert_eq!(filters(&topology), (4, 2));
        assert!(bed.cli_text(&["detach"]).contains("reset 15 streams and left 2 interfaces"));
        assert!(streams.into_iter().all(is_reset));
    });
    assert_eq!(filters(&topology), (0, 1));
    assert!(tc(&topology, &["filter", "show", "dev", "clients", "ingress"]).contains("pref 60000"));
    assert!(!bed.pins().exists());
}

/// The old process attaches the filters again.
#[test]
fn a_stop_after_a_takeover_that_failed_leaves_nothing() {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let Some(mut bed) = start(&topology) else { return };
    bed.under_traffic(20, |bed, _| {
        let binary = bed.binary();
        let mut successor = bed.steer.successor(Some(("take_adopted", &binary))).unwrap();
        assert!(!successor.wait(HANG).unwrap().success(), "{}", successor.tail());
        let says = || Ok(bed.steer.said()?.contains("the other process has not taken over").then_some(()));
        eventually("word of the old process", HANG, says).unwrap();
        assert!(bed.cli_text(&["cleanup"]).contains("kept"));
    });
    bed.expect_no_stream();
    assert_eq!(filters(&topology), (4, 2));
    assert!(bed.steer.stop(libc::SIGTERM).unwrap().success());
    assert_eq!(filters(&topology), (0, 0));
    assert!(!bed.pins().exists());
}

#[test]
fn interfaces_that_disappeared_while_no_process_lived_do_no_harm() {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let Some(mut bed) = start(&topology) else { return };
    with_endpoint(&topology, || {
        let streams = open(&topology, STREAMS);
        expect_spliced(&bed, STREAMS);
        bed.steer.stop(libc::SIGKILL).unwrap();
        topology.proxy.ip(&["link", "del", "endpoint0"]).unwrap();
        bed.steer.start_again().unwrap();
        // One interface is gone, the other is unchanged.
        assert_eq!(filters(&topology), (2, 1));
        assert_eq!(fs::read_dir(bed.maps()).unwrap().filter(is_note).count(), 1);
        assert_eq!(bed.metric("steer_streams_adopted_total", &[]), STREAMS as f64);
        bed.steer.stop(libc::SIGTERM).unwrap();
        assert!(bed.cli_text(&["detach"]).contains("left 1 interfaces"));
        drop(streams);
    });
    assert_eq!(filters(&topology), (0, 0));
}

fn is_note(entry: &std::io::Result<fs::DirEntry>) -> bool {
    entry.as_ref().unwrap().file_name().to_str().unwrap().ends_with("-filters")
}
