//! Streams continue while the process is killed or stopped, and started again.

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use aya::programs::{ProgramInfo, SchedClassifier};
use steer_tests::require;
use steer_tests::steer::Attach;
use steer_tests::topology::Topology;

use crate::bed::{Bed, front, runtime};
use crate::latency::Echoes;
use crate::probes::{Outcome, Probes};
use crate::traffic::{self, Traffic};

/// The long form has 5,000 streams and takes two minutes.
fn size() -> (u32, Duration) {
    if require::long() { (5000, Duration::from_secs(120)) } else { (250, Duration::from_secs(8)) }
}

/// How long each process lives. The time after its adoption of streams is compared with the rest.
const LIFE: Duration = Duration::from_secs(3);

fn again_and_again(attach: Attach, signal: libc::c_int) {
    if !require::root() {
        return;
    }
    let (streams, duration) = size();
    let topology = Topology::new(1).unwrap();
    let mut bed = Bed::start_attaching(attach, &topology, &[]);
    bed.under_traffic(streams, |bed, traffic| {
        let stop = AtomicBool::new(false);
        let probes = thread::scope(|scope| {
            let probes = scope.spawn(|| topology.clients.run(|| Probes::run(front(), &stop)));
            let restarted =
                catch_unwind(AssertUnwindSafe(|| restarts(bed, traffic, (signal, streams, duration))));
            // Stops the probes also after a panic, since nothing else does.
            stop.store(true, Ordering::Relaxed);
            let probes = probes.join().unwrap().unwrap();
            restarted.unwrap_or_else(|panic| resume_unwind(panic));
            probes
        });
        eprintln!("{probes}");
        assert!(probes.count(Outcome::Answered) > 0);
        // New streams go to the process that lives now.
        let fresh = topology.clients.run(|| runtime().block_on(traffic::open(front()))).unwrap();
        drop(fresh.unwrap());
    });
    bed.expect_no_stream();
}

fn restarts(bed: &mut Bed<'_>, traffic: &Traffic, (signal, streams, duration): (libc::c_int, u32, Duration)) {
    let begin = Instant::now();
    let (mut times, mut ready) = (0, Vec::new());
    let mut echoes = Echoes::default();
    traffic.take_echoes();
    while begin.elapsed() < duration {
        let down = Instant::now();
        bed.steer.restart(signal).unwrap();
        ready.push(down.elapsed());
        times += 1;
        for metric in ["steer_packet_streams", "steer_source_ports"] {
            assert_eq!(bed.metric(metric, &[("kind", "used")]), f64::from(streams), "{metric}");
        }
        assert_eq!(bed.metric("steer_streams", &[("path", "packet")]), f64::from(streams));
        thread::sleep(LIFE.min(duration / 4).saturating_sub(down.elapsed()));
        echoes.add(down, &traffic.take_echoes());
    }
    ready.sort_unstable();
    eprintln!(
        "{times} restarts of {streams} streams, ready after {:?} (median), {:?} (longest)\n{echoes}",
        ready[ready.len() / 2],
        ready[ready.len() - 1]
    );
    let row = &bed.rows()[0];
    assert_eq!((&row["cluster"], &row["path"]), (&"sio".into(), &"packet".into()));
    assert_eq!(row["endpoint"], crate::bed::endpoint().to_string());
    assert!(row["age_seconds"].as_f64().unwrap() >= begin.elapsed().as_secs_f64(), "{row}");
}

#[test]
fn a_killed_process_loses_no_stream_and_no_byte() {
    for attach in Attach::all() {
        again_and_again(attach, libc::SIGKILL);
    }
}

#[test]
fn a_stopped_process_loses_no_stream_and_no_byte() {
    again_and_again(Attach::Links, libc::SIGTERM);
}

/// No process lives for a long time, and the streams are closed in this time.
#[test]
fn streams_end_while_no_process_lives() {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let mut bed = Bed::start(&topology, &[]);
    bed.under_traffic(100, |bed, _| {
        bed.steer.stop(libc::SIGKILL).unwrap();
        thread::sleep(Duration::from_secs(2));
    });
    bed.steer.start_again().unwrap();
    bed.expect_no_stream();
    assert_eq!(bed.metric("steer_streams_adopted_total", &[]), 0.0, "the streams had ended before");
    bed.under_traffic(10, |_, _| {});
    bed.expect_no_stream();
}

/// It takes the kernel long to verify new programs.
#[test]
fn a_process_of_the_same_build_uses_the_programs_that_are_there() {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let mut bed = Bed::start(&topology, &[]);
    bed.under_traffic(20, |bed, _| {
        let first = programs(&bed.maps());
        assert_eq!(first.len(), 2);
        bed.steer.restart(libc::SIGKILL).unwrap();
        assert_eq!(programs(&bed.maps()), first);
        // A process uses both pinned programs again, or neither.
        let (path, _) = first.first_key_value().unwrap();
        fs::remove_file(path).unwrap();
        bed.steer.restart(libc::SIGKILL).unwrap();
        let second = programs(&bed.maps());
        assert!(second.keys().eq(first.keys()), "{second:?}");
        assert!(second.values().all(|id| first.values().all(|old| old != id)), "{first:?} {second:?}");
        // A process that uses other maps.
        let other = Topology::new(1).unwrap();
        let others = Bed::start(&other, &[]);
        for (mine, foreign) in second.keys().zip(programs(&others.maps()).keys()) {
            fs::remove_file(mine).unwrap();
            SchedClassifier::from_pin(foreign).unwrap().pin(mine).unwrap();
        }
        bed.steer.restart(libc::SIGKILL).unwrap();
        let third = programs(&bed.maps());
        assert!(third.values().all(|id| !programs(&others.maps()).values().any(|theirs| theirs == id)));
    });
    bed.expect_no_stream();
}

/// The programs that are pinned there, with their numbers in the kernel.
fn programs(maps: &Path) -> BTreeMap<PathBuf, u32> {
    let paths = fs::read_dir(maps).unwrap().map(|entry| entry.unwrap().path());
    let is_program = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with("program-");
    paths.filter(is_program).map(|path| (path.clone(), ProgramInfo::from_pin(path).unwrap().id())).collect()
}
