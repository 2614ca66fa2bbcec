//! Before Linux 6.6 there are no links: a process that is killed leaves its filters. Here a steer with fail points is told to attach
//! such filters.

use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use steer_tests::require;
use steer_tests::steer::binary_with_failpoints;
use steer_tests::topology::Topology;

use crate::bed::{Bed, endpoint};
use crate::leaving::{answer, expect_spliced, is_reset, open};

const STREAMS: usize = 5;

/// How many filters of Steer there are, and how many qdiscs for them.
fn filters(topology: &Topology) -> (usize, usize) {
    let tc = |args: &[&str]| {
        let mut tc = Command::new("tc");
        tc.args(args);
        topology.proxy.enter(&mut tc).unwrap();
        String::from_utf8(tc.output().unwrap().stdout).unwrap()
    };
    let shown = ["clients", "endpoint0"]
        .into_iter()
        .flat_map(|device| ["ingress", "egress"].map(|hook| tc(&["filter", "show", "dev", device, hook])));
    let count = shown.filter(|shown| shown.contains(" packet_")).count();
    (count, tc(&["qdisc", "show"]).matches("clsact").count())
}

/// Runs `work` while an endpoint answers, which keeps its connections until then.
fn with_endpoint(topology: &Topology, work: impl FnOnce()) {
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
                // Steer may have asked for the MSS only.
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

/// Says something, which nobody forwards any more.
fn is_reset_when_it_speaks(mut stream: TcpStream) -> bool {
    stream.write_all(b"word").unwrap();
    is_reset(stream)
}

#[test]
fn what_a_killed_process_leaves_goes_and_new_streams_come_about() {
    if !require::root() {
        return;
    }
    let Some(binary) = binary_with_failpoints() else {
        require::skip("needs a steer with fail points: cargo xtask test builds it");
        return;
    };
    let topology = Topology::new(1).unwrap();
    let asks = ["env", "STEER_ALSO=attach filters"].map(str::to_owned);
    let mut bed = Bed::start_wrapped(&topology, asks.into());
    bed.steer.stop(libc::SIGTERM).unwrap();
    bed.steer.start_again_as(&binary).unwrap();
    assert!(bed.steer.said().unwrap().contains("they need Linux 6.6"));
    with_endpoint(&topology, || {
        let before = open(&topology, STREAMS);
        expect_spliced(&bed, STREAMS);
        assert_eq!(filters(&topology), (4, 2));
        // What a living process has is spared.
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
        // They have the same source ports.
        let after = open(&topology, STREAMS);
        expect_spliced(&bed, STREAMS);
        bed.steer.stop(libc::SIGKILL).unwrap();
        assert!(bed.cli_text(&["cleanup", "--dry-run"]).contains("on 2 interfaces: would be removed"));
        assert_eq!(filters(&topology), (4, 2));
        assert!(bed.cli_text(&["detach"]).contains("on 2 interfaces: removed"));
        assert_eq!(filters(&topology), (0, 0));
        assert!(after.into_iter().all(is_reset_when_it_speaks));
        assert!(bed.cli_text(&["cleanup"]).contains("nothing was left"));
    });
    // A qdisc that was there stays, and a stop takes the filters off.
    topology.proxy.tc(&["qdisc", "add", "dev", "clients", "clsact"]).unwrap();
    bed.steer.start_again().unwrap();
    with_endpoint(&topology, || {
        let streams = open(&topology, STREAMS);
        expect_spliced(&bed, STREAMS);
        bed.steer.stop(libc::SIGTERM).unwrap();
        assert!(streams.into_iter().all(is_reset));
    });
    assert_eq!(filters(&topology), (0, 1));
}
