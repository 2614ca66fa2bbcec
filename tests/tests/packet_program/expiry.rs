//! Streams that no process looks after, and the kernel's timer.

use std::time::Duration;

use aya::maps::MapError;
use proxy_common::expiry::{Expiry, GIVEN_UP_A_TICK, RECORDS_A_TICK};
use proxy_common::flow::{Direction, FlowRef, state};
use proxy_common::stat::Stat;
use steer_kernel::tcp::clock::monotonic_ns;
use steer_tests::eventually::eventually;

use crate::support::lab::{Hook, Input, Lab, RECORDS, Verdict, in_namespace, in_namespace_with};
use crate::support::session::{Family, Session};

/// Times of packets: long ago, and later than any clock during the test.
const OLD: u64 = 1;
const FRESH: u64 = u64::MAX;

/// No process lives, and every old stream is due.
const DUE: Expiry = Expiry { heartbeat_ns: 1, gone_after_ns: 1, orphan_timeout_ns: 1, linger_ns: 1 };

fn alive() -> Expiry {
    Expiry { heartbeat_ns: monotonic_ns(), gone_after_ns: 1 << 40, ..DUE }
}

fn session(family: Family, index: u32, record_state: u32, last_packet_ns: u64) -> Session {
    let mut session = Session::numbered(family, index);
    session.record.state = record_state;
    session.record.flows.iter_mut().for_each(|flow| flow.live.last_packet_ns = last_packet_ns);
    session
}

fn look(lab: &Lab) {
    let output = lab.run(Hook::Expire, &Input { frame: vec![0; 14], ..Input::default() });
    assert_eq!(output.verdict, Verdict::Accept, "the timer is started");
}

fn has_keys(lab: &Lab, session: &Session) -> [bool; 2] {
    Direction::BOTH.map(|direction| lab.has_key(session.key(direction)))
}

fn expired(lab: &Lab) -> u64 {
    lab.stats()[Stat::Aged.number() as usize]
}

#[test]
fn what_is_old_goes_when_no_process_lives() {
    const COUNTED: bool = true;
    let cases = [
        (state::SPLICED, COUNTED),
        (state::HAND_OVER, COUNTED),
        (state::FINISHED, !COUNTED),
        (state::RESET, !COUNTED),
        (state::DEAD, !COUNTED),
    ];
    in_namespace(|lab| {
        for (record_state, counts) in cases {
            for family in Family::BOTH {
                eprintln!("state {record_state}, {family:?}");
                let session = session(family, 3, record_state, OLD);
                lab.set_expiry(alive());
                lab.open(&session);
                let before = expired(lab);
                look(lab);
                assert_eq!((lab.record(3).state, has_keys(lab, &session)), (record_state, [true; 2]));

                lab.set_expiry(DUE);
                look(lab);
                assert_eq!(has_keys(lab, &session), [false; 2]);
                // The timer may have examined the record, too.
                assert!(matches!(lab.record(3).state, state::DEAD | state::OFF));
                look(lab);
                assert_eq!(lab.record(3).state, state::OFF);
                assert_eq!(expired(lab) - before, u64::from(counts));
            }
        }
    });
}

#[test]
fn a_stream_with_a_packet_in_either_direction_is_left_alone() {
    in_namespace(|lab| {
        for family in Family::BOTH {
            for direction in Direction::BOTH {
                lab.set_expiry(alive());
                let mut session = session(family, 3, state::SPLICED, OLD);
                session.flow(direction).live.last_packet_ns = FRESH;
                lab.open(&session);
                lab.set_expiry(DUE);
                (0..3).for_each(|_| look(lab));
                assert_eq!((lab.record(3).state, has_keys(lab, &session)), (state::SPLICED, [true; 2]));
            }
        }
    });
}

#[test]
fn the_key_of_another_stream_is_left_alone() {
    in_namespace(|lab| {
        for family in Family::BOTH {
            lab.set_expiry(alive());
            let old = session(family, 3, state::FINISHED, OLD);
            lab.open(&old);
            // A newer stream that has the tuple now.
            let next = Session { index: 4, ..old.clone() };
            lab.point_keys_at(&next, 4);
            let mut living = next.record;
            living.state = state::SPLICED;
            living.flows[0].live.last_packet_ns = FRESH;
            lab.set_record(4, &living);
            lab.set_expiry(DUE);
            (0..3).for_each(|_| look(lab));
            assert_eq!((lab.record(3).state, lab.record(4).state), (state::OFF, state::SPLICED));
            assert_eq!(has_keys(lab, &next), [true; 2]);
        }
    });
}

#[test]
fn a_full_table_of_living_streams_stays_as_it_is() {
    in_namespace(|lab| {
        lab.set_expiry(DUE);
        for family in Family::BOTH {
            lab.clear();
            let streams: Vec<_> = (0..RECORDS).map(|i| session(family, i, state::SPLICED, FRESH)).collect();
            streams.iter().for_each(|stream| lab.open(stream));
            for _ in 0..10 {
                look(lab);
                let one_more = session(family, RECORDS, state::SPLICED, FRESH).key(Direction::ToUpstream);
                let refused = lab.insert(one_more, FlowRef(0));
                assert!(matches!(refused, Err(MapError::SyscallError(_))), "{refused:?}");
            }
            for stream in &streams {
                assert_eq!(
                    (lab.record(stream.index).state, has_keys(lab, stream)),
                    (state::SPLICED, [true; 2])
                );
            }
        }
        assert_eq!(expired(lab), 0);
    });
}

#[test]
fn ticks_go_round_all_records() {
    in_namespace_with(2 * RECORDS_A_TICK + 2, |lab| {
        // Records at the borders of ticks, and more in a row than one tick expires.
        let mut places = vec![0, RECORDS_A_TICK - 1, RECORDS_A_TICK, 2 * RECORDS_A_TICK + 1];
        places.extend(10..20 + GIVEN_UP_A_TICK);
        let streams = open_old(lab, places);
        // Two full rounds, from whatever record they begin.
        (0..9).for_each(|_| look(lab));
        assert!(are_gone(lab, &streams));
        assert_eq!(expired(lab), streams.len() as u64);
    });
}

#[test]
fn the_timer_examines_records_too() {
    in_namespace(|lab| {
        lab.set_expiry(alive());
        look(lab);
        let streams = open_old(lab, 0..RECORDS);
        let gone = || Ok(are_gone(lab, &streams).then_some(()));
        eventually("expiry by the timer", Duration::from_secs(60), gone).unwrap();
        assert_eq!(expired(lab), u64::from(RECORDS));
    });
}

/// Opens old streams, which will all expire.
fn open_old(lab: &mut Lab, places: impl IntoIterator<Item = u32>) -> Vec<Session> {
    lab.set_expiry(alive());
    let streams = places.into_iter().map(|index| session(Family::V4, index, state::SPLICED, OLD));
    let streams: Vec<_> = streams.inspect(|stream| lab.open(stream)).collect();
    lab.set_expiry(DUE);
    streams
}

fn are_gone(lab: &Lab, streams: &[Session]) -> bool {
    let is_gone = |stream: &Session| {
        lab.record(stream.index).state == state::OFF && has_keys(lab, stream) == [false; 2]
    };
    streams.iter().all(is_gone)
}
