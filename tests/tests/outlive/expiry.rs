//! No process looks after the streams, and some of their peers have vanished.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use aya::maps::{Array, HashMap, Map, MapData};
use proxy_common::abi;
use proxy_common::flow::{FlowKey4, FlowRef, Record, state};
use steer_tests::eventually::eventually;
use steer_tests::require;
use steer_tests::steer::Attach;
use steer_tests::topology::Topology;

use crate::bed::{Bed, HANG, front, runtime};
use crate::traffic;

const LIVING: u32 = 20;
const SILENT: u32 = 10;
const TOO_MANY: u32 = 5;

/// Opens streams without traffic, and returns the clients' sockets.
fn open(topology: &Topology, streams: u32) -> Vec<TcpStream> {
    let one = || runtime().block_on(async { traffic::open(front()).await.unwrap().into_std().unwrap() });
    topology.clients.run(|| (0..streams).map(|_| one()).collect()).unwrap()
}

fn pinned(maps: &Path, name: &str) -> Map {
    Map::from_map_data(MapData::from_pin(maps.join(name)).unwrap()).unwrap()
}

/// How many keys there are, and how many records are in use.
fn kept(maps: &Path) -> (usize, usize) {
    let flows: HashMap<_, FlowKey4, FlowRef> = pinned(maps, abi::MAP_FLOWS4).try_into().unwrap();
    let records: Array<_, [u8; size_of::<Record>()]> = pinned(maps, abi::MAP_CONNS).try_into().unwrap();
    let is_used = |record: &[u8; size_of::<Record>()]| {
        bytemuck::pod_read_unaligned::<Record>(record).state != state::OFF
    };
    (flows.keys().count(), records.iter().filter(|record| is_used(record.as_ref().unwrap())).count())
}

fn expect_kept(maps: &Path, streams: u32) {
    let expected = (2 * streams as usize, streams as usize);
    let only = || Ok((kept(maps) == expected).then_some(()));
    eventually("the end of silent streams", HANG, only)
        .unwrap_or_else(|error| panic!("{error}: {:?}", kept(maps)));
}

/// A client that was silent for long sends bytes. Returns whether it learns that its stream has
/// ended.
fn learns_of_its_end(mut client: TcpStream) -> bool {
    client.set_nonblocking(false).unwrap();
    client.set_read_timeout(Some(HANG)).unwrap();
    let written = client.write_all(b"is anybody there?");
    let read = written.and_then(|()| client.read(&mut [0]));
    matches!(read, Err(error) if error.kind() == ErrorKind::ConnectionReset)
}

#[test]
fn silent_streams_are_given_up_while_no_process_lives_and_no_others() {
    if !require::root() {
        return;
    }
    Attach::all().into_iter().for_each(silent_streams_are_given_up);
}

fn silent_streams_are_given_up(attach: Attach) {
    let topology = Topology::new(1).unwrap();
    let room = format!("max_streams: {}", LIVING + SILENT);
    let mut bed = Bed::start_attaching(attach, &topology, &[&room, "orphan_timeout: 3s"]);
    let maps = bed.maps();
    bed.under_traffic(LIVING, |bed, _| {
        let silent = open(&topology, SILENT);
        let spliced = || Ok((bed.spliced() == (LIVING + SILENT) as usize).then_some(()));
        eventually("silent streams on the packet path", HANG, spliced).unwrap();
        // Longer than streams may be silent while no process lives.
        thread::sleep(Duration::from_secs(4));
        let relayed = open(&topology, TOO_MANY);
        let fallbacks = || bed.metric("steer_splice_fallback_total", &[("reason", "map_full")]);
        eventually("relayed streams", HANG, || Ok((fallbacks() == f64::from(TOO_MANY)).then_some(())))
            .unwrap();
        expect_kept(&maps, LIVING + SILENT);

        bed.steer.stop(libc::SIGKILL).unwrap();
        drop(relayed);
        expect_kept(&maps, LIVING);
        // Time for some more ticks of the timer.
        thread::sleep(Duration::from_secs(2));
        expect_kept(&maps, LIVING);
        assert!(silent.into_iter().all(learns_of_its_end));

        bed.steer.start_again().unwrap();
        assert_eq!(bed.metric("steer_streams_adopted_total", &[]), f64::from(LIVING));
        assert_eq!(bed.metric("steer_packet_total", &[("what", "aged")]), f64::from(SILENT));
        for name in ["steer_packet_streams", "steer_source_ports"] {
            assert_eq!(bed.metric(name, &[("kind", "used")]), f64::from(LIVING), "{name}");
        }
        // The records and ports of the old streams are free.
        let again = open(&topology, SILENT);
        eventually("new streams on the packet path", HANG, || {
            Ok((bed.spliced() == (LIVING + SILENT) as usize).then_some(()))
        })
        .unwrap();
        drop(again);
    });
    bed.expect_no_stream();
}

#[test]
fn nothing_is_kept_for_hosts_that_vanished() {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let mut bed = Bed::start(&topology, &["max_streams: 64", "orphan_timeout: 3s"]);
    let maps = bed.maps();
    bed.under_traffic(0, |bed, _| {
        let _gone = open(&topology, SILENT);
        eventually("streams on the packet path", HANG, || {
            Ok((bed.spliced() == SILENT as usize).then_some(()))
        })
        .unwrap();
        for host in [&topology.clients, &topology.endpoints[0]] {
            host.ip(&["link", "set", "eth0", "down"]).unwrap();
        }
        bed.steer.stop(libc::SIGKILL).unwrap();
        expect_kept(&maps, 0);
    });
    bed.steer.start_again().unwrap();
    assert_eq!(bed.metric("steer_streams_adopted_total", &[]), 0.0);
    bed.steer.stop(libc::SIGTERM).unwrap();
    assert!(!bed.pins().exists());
}
