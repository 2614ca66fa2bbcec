//! The process dies at each step of a hand-over, with streams of all kinds around it.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use aya::maps::{Array, Map, MapData};
use proxy_common::abi;
use proxy_common::flow::{Direction, Record, state};
use steer_kernel::bpf::packet::Ends;
use steer_tests::eventually::eventually;
use steer_tests::require;
use steer_tests::steer::{Attach, binary_with_failpoints};
use steer_tests::topology::Topology;
use tokio::runtime::{Builder, Runtime};

use crate::bed::{Bed, ENDPOINT_PORT, FRONT_PORT, HANG};
use crate::death::AT_ONCE;
use crate::pairs::{End, Kind, Pair, Pairs};

/// The steps of a hand-over in order. docs/splice.md says where each part of a stream is at each
/// step. If the process dies at one of these steps, the stream is reset on both sides, ...
const RESET: [&str; 7] = ["begun", "rested", "installed", "marked", "activated", "settled", "drained"];
/// ... and at one of these steps the stream goes on.
const INTACT: [&str; 4] = ["spliced", "closing", "closed", "kept"];

/// Few records, so that they are quickly read. More than all streams of a step, because a process
/// that dies at once frees no record.
const RECORDS: u32 = 4096;
/// How long streams that go on are watched after a death.
const WATCHED: Duration = Duration::from_millis(100);

/// When the next process is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Restart {
    AtOnce,
    /// Two seconds after the death.
    Later,
    /// After all streams have ended.
    Never,
}

/// Which streams are open.
#[derive(Debug, Clone, Copy)]
enum Round {
    Alone(Kind, Family),
    /// One stream of each kind and family. One of them is at the step, the others are at any step.
    All,
}

impl Round {
    /// The round for kill `number` at `step`.
    fn of(step: &str, number: usize) -> Self {
        let turns = Kind::ALL.len() + 2;
        let Some(kind) = Kind::ALL.get(number % turns) else { return Self::All };
        // A stream whose endpoint does nothing does not reach the later steps.
        let is_reached = RESET[..6].contains(&step);
        let kind = if *kind == Kind::Stuck && !is_reached { Kind::Flow } else { *kind };
        Self::Alone(kind, Family::BOTH[number / turns % 2])
    }

    fn streams(self) -> Vec<(Kind, Family)> {
        match self {
            Self::Alone(kind, family) => vec![(kind, family)],
            Self::All => {
                Kind::ALL.into_iter().flat_map(|kind| Family::BOTH.map(|family| (kind, family))).collect()
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    const BOTH: [Self; 2] = [Self::V4, Self::V6];

    fn front(self) -> SocketAddr {
        match self {
            Self::V4 => (Topology::PROXY, FRONT_PORT).into(),
            Self::V6 => (Topology::PROXY6, FRONT_PORT).into(),
        }
    }

    fn endpoint(self) -> SocketAddr {
        match self {
            Self::V4 => (Topology::endpoint(0), ENDPOINT_PORT).into(),
            Self::V6 => (Topology::endpoint6(0), ENDPOINT_PORT).into(),
        }
    }
}

fn config() -> String {
    let mut config =
        format!("splice: packet\npacket_splice: {{ linger: 1s, max_streams: {RECORDS} }}\nlisteners:\n");
    for family in Family::BOTH {
        config += &format!(
            "- address: \"{}\"\n  routes:\n  - match: {{ prefix: / }}\n    cluster: {family:?}\n    \
             hash_policy: [header: {{ header_name: x-forwarded-for }}]\n    upgrade_configs: [websocket]\n",
            family.front()
        );
    }
    config += "clusters:\n";
    for family in Family::BOTH {
        config += &format!(
            "- name: {family:?}\n  lb_policy: ring_hash\n  endpoints: [\"{}\"]\n",
            family.endpoint()
        );
    }
    config
}

/// What happened to the streams of all kills at one step.
#[derive(Debug, Default)]
struct Tally {
    kills: u32,
    intact: u32,
    ended: u32,
    slowest: Duration,
}

struct Mortal<'n> {
    bed: Bed<'n>,
    binary: PathBuf,
    pairs: Pairs,
    /// Both peers have to learn of the end within this time.
    notice: Duration,
    _runtime: Runtime,
}

impl<'n> Mortal<'n> {
    fn new(attach: Attach, topology: &'n Topology, binary: &Path, notice: Duration) -> Self {
        let mut bed = Bed::start_with(attach, topology, &config());
        bed.steer.stop(libc::SIGTERM).unwrap();
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let pairs = Pairs::new(runtime.handle());
        for family in Family::BOTH {
            let listener = || TcpListener::bind(family.endpoint()).unwrap();
            pairs.serve(topology.endpoints[0].run(listener).unwrap());
        }
        Self { bed, binary: binary.to_owned(), pairs, notice, _runtime: runtime }
    }

    /// Starts a process and opens streams. Returns the streams when the process has died at `step`.
    fn kill(&mut self, step: &str, round: Round) -> (Vec<Arc<Pair>>, Instant) {
        let kinds = round.streams();
        let connect = || {
            // The process may die before the last connection.
            let connected = kinds.iter().map(|(_, family)| TcpStream::connect(family.front()).ok());
            connected.collect::<Vec<_>>()
        };
        let sockets = self.bed.topology.clients.run(connect).unwrap();
        let opened = kinds.iter().zip(sockets).filter_map(|((kind, _), socket)| Some((*kind, socket?)));
        let pairs = opened.map(|(kind, socket)| self.pairs.open(kind, socket)).collect();
        let begin = Instant::now();
        while self.bed.steer.process().ensure_running().is_ok() {
            assert!(begin.elapsed() < HANG, "{step}, {round:?}: the process does not die at the step");
            thread::sleep(Duration::from_micros(500));
        }
        (pairs, Instant::now())
    }

    /// The states of the records in use, by the addresses of their clients.
    fn states(&self) -> HashMap<SocketAddr, u32> {
        let map = MapData::from_pin(self.bed.maps().join(abi::MAP_CONNS)).unwrap();
        let records: Array<_, [u8; size_of::<Record>()]> =
            Array::try_from(Map::from_map_data(map).unwrap()).unwrap();
        let records = records.iter().map(|record| bytemuck::pod_read_unaligned::<Record>(&record.unwrap()));
        let used = records.filter(|record| record.state != state::OFF);
        used.map(|record| (Ends::of(&record, Direction::ToUpstream).peer, record.state)).collect()
    }

    /// Waits until both ends know that the stream has ended. Returns how the worse of them learned
    /// of the end, and how late.
    fn ended(&self, pair: &Pair, died: Instant, what: &str) -> (End, Duration) {
        let known = eventually("the end at both ends", HANG, || {
            let mut ends = Vec::new();
            for (name, side) in pair.begun() {
                let Some((end, at)) = side.ended() else { return Ok(None) };
                ends.push((name, end, at.saturating_duration_since(died)));
            }
            Ok(Some(ends))
        });
        let ends = known.unwrap_or_else(|error| panic!("{what}: {error:#}"));
        let slowest = ends.iter().map(|(_, _, late)| *late).max().unwrap_or_default();
        assert!(slowest < self.notice, "{what}: {ends:?}");
        let finished = ends.iter().find(|(_, end, _)| *end != End::Reset);
        (finished.map_or(End::Reset, |(_, end, _)| *end), slowest)
    }

    /// Kills the running process at `step`. The process after it dies at `next`.
    fn round(&mut self, step: &str, number: usize, next: Option<&str>, restart: Restart, tally: &mut Tally) {
        let round = Round::of(step, number);
        let (pairs, died) = self.kill(step, round);
        let states = self.states();
        if restart == Restart::AtOnce {
            self.start(next);
        }
        let mut living = Vec::new();
        tally.kills += 1;
        for pair in &pairs {
            let state = states.get(&pair.address).copied();
            if state == Some(state::SPLICED) {
                living.push(Arc::clone(pair));
                continue;
            }
            let what = format!("{step}, {round:?}, {:?} of {}, state {state:?}", pair.kind, pair.address);
            let (end, slowest) = self.ended(pair, died, &what);
            // A stream without a 101 was not a stream yet.
            assert!(end == End::Reset || !pair.is_open(), "{what}: {end:?}");
            tally.ended += 1;
            tally.slowest = tally.slowest.max(slowest);
        }
        let expected = if INTACT.contains(&step) { !living.is_empty() } else { living.len() < pairs.len() };
        assert!(expected, "{step}, {round:?}: {} of {} live", living.len(), pairs.len());
        tally.intact += living.len() as u32;
        if restart == Restart::Later {
            thread::sleep(Duration::from_secs(2).saturating_sub(died.elapsed()));
            self.start(next);
        }
        thread::sleep(WATCHED.saturating_sub(died.elapsed()));
        if restart != Restart::Never {
            self.expect_adopted(&living, step);
        }
        self.expect_intact(&living, &format!("{step}, {round:?}"));
        if restart == Restart::Never {
            self.start(next);
        }
        self.pairs.forget(&pairs);
    }

    fn start(&mut self, next: Option<&str>) {
        match next {
            Some(step) => self.bed.steer.start_again_to_die_at(step, &self.binary),
            None => self.bed.steer.start_again(),
        }
        .unwrap();
    }

    fn expect_adopted(&self, living: &[Arc<Pair>], step: &str) {
        let rows = self.bed.rows();
        for pair in living {
            let address = pair.address.to_string();
            assert!(
                rows.iter().any(|row| row["client"] == address),
                "{step}: {address} is not among {rows:?}"
            );
        }
    }

    fn expect_intact(&self, living: &[Arc<Pair>], what: &str) {
        living.iter().for_each(|pair| pair.stop());
        for pair in living {
            let known = eventually("end of a stream", HANG, || Ok(pair.is_intact())).unwrap();
            assert!(known, "{what}: {pair:?}");
            assert_eq!(pair.wrong(), None, "{what}");
        }
    }

    /// Kills at each of `steps`, `times` times.
    fn kill_all(mut self, steps: &[&str], times: usize) {
        self.start(steps.first().copied());
        for (index, step) in steps.iter().enumerate() {
            let mut tally = Tally::default();
            for time in 0..times {
                let next = if time + 1 < times { Some(step) } else { steps.get(index + 1) };
                let restart = match (index + time) % 16 {
                    7 if require::long() => Restart::Later,
                    number if number % 3 == 1 => Restart::Never,
                    _ => Restart::AtOnce,
                };
                // In the short form, each step has other streams.
                let number = if require::long() { time } else { index + 6 * time };
                self.round(step, number, next.copied(), restart, &mut tally);
            }
            eprintln!("{step}: {tally:?}");
            if require::long() && times > 2 {
                self.bed.expect_no_stream();
            }
        }
        self.bed.expect_no_stream();
        self.bed.steer.stop(libc::SIGTERM).unwrap();
        assert!(!self.bed.pins().exists());
    }
}

/// The steps that were asked for, and how often.
fn asked() -> (Vec<&'static str>, usize) {
    let all = RESET.into_iter().chain(INTACT);
    let chosen = std::env::var("STEER_DEATH_STEPS").ok();
    let is_chosen =
        |step: &&str| chosen.as_ref().is_none_or(|chosen| chosen.split(',').any(|one| one == *step));
    let times = std::env::var("STEER_DEATH_KILLS").ok().map(|times| times.parse().unwrap());
    (all.filter(is_chosen).collect(), times.unwrap_or(if require::long() { 200 } else { 2 }))
}

#[test]
fn at_every_step_of_a_hand_over_a_death_is_survived_or_learned_at_once() {
    if !require::root() {
        return;
    }
    let Some(binary) = binary_with_failpoints() else {
        return require::skip(
            "needs `cargo build -p steer --features failpoints --target-dir target/failpoints`",
        );
    };
    let (steps, times) = asked();
    for attach in Attach::all() {
        // How programs are attached makes a difference only for the next process.
        let times = if attach == Attach::Filters && !require::long() { 1 } else { times };
        let topology = Topology::new(1).unwrap();
        Mortal::new(attach, &topology, &binary, AT_ONCE).kill_all(&steps, times);
    }
}
