//! One of the two processes dies during a takeover, and the other one serves.

use steer_tests::eventually::eventually;
use steer_tests::require;
use steer_tests::topology::Topology;

use crate::bed::{Bed, HANG, PACKET, SMALL, failpoints, runtime, v4};
use crate::load::{echo, finish, open};

/// Opens a new stream, which the serving process has to splice.
fn expect_service(bed: &Bed<'_>) {
    let (front, before) = (bed.ends.front, bed.spliced());
    let work = || {
        runtime().block_on(async {
            let mut stream = open(front).await.unwrap();
            for count in 0..10 {
                echo(&mut stream, count).await.unwrap();
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
            finish(stream).await.unwrap();
        });
    };
    bed.topology.clients.run(work).unwrap();
    assert!(bed.spliced() >= before.min(SMALL.streams as usize));
}

#[test]
fn the_new_process_dies_before_it_is_ready_and_the_old_one_goes_on() {
    if !require::root() {
        return;
    }
    let Some(binary) = failpoints() else { return };
    let topology = Topology::new(1).unwrap();
    let mut bed = Bed::start(&topology, v4(), PACKET);
    bed.under_load(SMALL, |bed, _| {
        bed.expect_spliced(SMALL.streams);
        for place in ["take_asked", "take_prepared", "take_yours", "take_adopted"] {
            let mut successor = bed.steer.successor(Some((place, &binary))).unwrap();
            assert!(!successor.wait(HANG).unwrap().success(), "{place}: {}", successor.tail());
            let says =
                || Ok(bed.steer.said()?.contains("the other process has not taken over").then_some(()));
            eventually("word of the old process", HANG, says).unwrap();
            bed.expect_spliced(SMALL.streams);
            expect_service(bed);
        }
        // Another process can take over afterwards.
        let mut old = bed.steer.take_over().unwrap();
        bed.expect_spliced(SMALL.streams);
        assert!(old.wait(HANG).unwrap().success(), "{}", old.tail());
    });
    bed.expect_no_stream();
}

#[test]
fn the_old_process_dies_in_the_middle_and_the_new_one_goes_on() {
    if !require::root() {
        return;
    }
    let Some(binary) = failpoints() else { return };
    let topology = Topology::new(1).unwrap();
    let mut bed = Bed::start(&topology, v4(), PACKET);
    // Requests and relayed streams of the old process die with it. So the load has only streams
    // that the kernel carries.
    let size = crate::load::Size { streams: 20, short_streams: 0, clients: 0 };
    bed.steer.stop(libc::SIGTERM).unwrap();
    bed.steer.start_again_to_die_at("give_paused", &binary).unwrap();
    bed.under_load(size, |bed, _| {
        bed.expect_spliced(size.streams);
        let mut old = bed.steer.take_over().unwrap();
        assert!(!old.wait(HANG).unwrap().success());
        bed.expect_spliced(size.streams);
        expect_service(bed);
    });
    bed.expect_no_stream();
}

#[test]
fn the_new_process_is_killed_while_the_old_one_drains_and_a_fresh_one_starts() {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let more = "drain_timeout: 30s\n";
    let mut bed = Bed::start(&topology, v4(), &format!("{PACKET}{more}"));
    let size = crate::load::Size { streams: 20, short_streams: 0, clients: 0 };
    bed.under_load(size, |bed, _| {
        bed.expect_spliced(size.streams);
        // An idle connection keeps the old process alive for a while.
        let front = bed.ends.front;
        let idle = bed.topology.clients.run(|| std::net::TcpStream::connect(front).unwrap()).unwrap();
        let accepted = || Ok((bed.steer.metric("steer_downstream_connections", &[])? >= 1.0).then_some(()));
        eventually("an idle connection", HANG, accepted).unwrap();
        let mut old = bed.steer.take_over().unwrap();
        old.ensure_running().unwrap();
        bed.steer.restart(libc::SIGKILL).unwrap();
        old.ensure_running().unwrap();
        bed.expect_spliced(size.streams);
        expect_service(bed);
        drop(idle);
        assert!(old.wait(HANG).unwrap().success(), "{}", old.tail());
        expect_service(bed);
    });
    bed.expect_no_stream();
}
