//! What the old process continues to do after a takeover.

use std::thread;
use std::time::Duration;

use steer_tests::eventually::eventually;
use steer_tests::process::Process;
use steer_tests::require;
use steer_tests::topology::Topology;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;

use crate::bed::{Bed, HANG, runtime, v4};
use crate::load::{echo, finish, open};

/// With this, all streams are too young for a hand-over.
const RELAYED: &str = "splice: packet\npacket_splice: { linger: 1s, hand_over_after: 1h }\n";

/// Runs `work` with a relayed stream in the old process of a takeover.
fn with_left_stream(more: &str, work: impl FnOnce(&mut Bed<'_>, &mut Process, &Runtime, TcpStream) + Send) {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let mut bed = Bed::start(&topology, v4(), &format!("{RELAYED}{more}"));
    bed.with_endpoint(|bed| {
        let runtime = runtime();
        let front = bed.ends.front;
        // The stream is opened on a thread of the clients' namespace. Any thread can use it.
        let opened = topology.clients.run(|| {
            let inside = crate::bed::runtime();
            inside.block_on(async { open(front).await.unwrap().into_std().unwrap() })
        });
        let _entered = runtime.enter();
        let mut stream = TcpStream::from_std(opened.unwrap()).unwrap();
        runtime.block_on(echo(&mut stream, 1)).unwrap();
        let mut old = bed.steer.take_over().unwrap();
        runtime.block_on(echo(&mut stream, 2)).unwrap();
        assert!(bed.steer.flows().unwrap().is_empty());
        work(bed, &mut old, &runtime, stream);
    });
}

#[test]
fn a_relayed_stream_finishes_in_the_old_process() {
    with_left_stream("", |_, old, runtime, mut stream| {
        thread::sleep(Duration::from_secs(1));
        old.ensure_running().unwrap();
        runtime.block_on(echo(&mut stream, 3)).unwrap();
        runtime.block_on(finish(stream)).unwrap();
        assert!(old.wait(HANG).unwrap().success());
        assert!(old.stderr().unwrap().contains("all streams and connections have ended"));
    });
}

#[test]
fn what_is_left_after_the_limit_is_cut() {
    with_left_stream("drain_timeout: 1s\n", |_, old, runtime, mut stream| {
        assert!(old.wait(HANG).unwrap().success());
        let said = old.stderr().unwrap();
        assert!(said.contains("drain_timeout is over") && said.contains("streams=1"), "{said}");
        assert!(!matches!(runtime.block_on(stream.read(&mut [0])), Ok(1..)));
    });
}

#[test]
fn a_signal_cuts_the_rest_short() {
    with_left_stream("", |_, old, runtime, mut stream| {
        old.signal(libc::SIGTERM).unwrap();
        assert!(old.wait(HANG).unwrap().success());
        assert!(!matches!(runtime.block_on(stream.read(&mut [0])), Ok(1..)));
    });
}

/// The old process has a stream on a port that the new process would choose first.
#[test]
fn ports_of_the_old_process_are_passed_over() {
    let few =
        "splice: packet\npacket_splice: { linger: 1s, hand_over_after: 1h, source_ports: [5000-5003] }\n";
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let mut bed = Bed::start(&topology, v4(), few);
    bed.with_endpoint(|bed| {
        let front = bed.ends.front;
        let streams = |count: usize| {
            topology.clients.run(move || {
                runtime().block_on(async move {
                    let mut streams = Vec::new();
                    for _ in 0..count {
                        streams.push(open(front).await.unwrap().into_std().unwrap());
                    }
                    streams
                })
            })
        };
        let _old_ones = streams(3).unwrap();
        let _old = bed.steer.take_over().unwrap();
        let new_one = streams(1).unwrap();
        let used = || bed.steer.metric("steer_source_ports", &[("kind", "used")]).unwrap();
        eventually("the one port that is left", HANG, || Ok((used() >= 1.0).then_some(()))).unwrap();
        drop(new_one);
    });
}
