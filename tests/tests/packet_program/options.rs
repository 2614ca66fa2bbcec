//! TCP options: usual layouts, unusual ones, and layouts that cannot be translated.

use proxy_common::flow::{Direction, flags};
use proxy_common::stat::Stat;

use crate::support::lab::{Hook, Input, in_namespace};
use crate::support::packet::{Packet, options};
use crate::support::session::{Family, Session, TS_FLOOR, TS_SHIFTS};
use crate::table::{Expect, Row, SPLICED, check};

const SLOW: &[Stat] = &[Stat::Spliced, Stat::OptionsSlow];
const BLANKED: &[Stat] = &[Stat::Spliced, Stat::OptionsSlow, Stat::OptionsBlanked];

/// `number` blocks after the acknowledged bytes. The last one wraps.
fn blocks(packet: &Packet, number: u32) -> Vec<(u32, u32)> {
    let at = |offset: u32| packet.ack.wrapping_add(offset);
    (0..number)
        .map(|i| {
            if i == 3 { (at(0x7000_0000), at(0xf000_0000)) } else { (at(1000 * i + 500), at(1000 * i + 900)) }
        })
        .collect()
}

#[test]
fn usual_layouts() {
    in_namespace(|lab| check(lab, USUAL));
}

const USUAL: &[Row] = &[
    Row {
        name: "timestamps",
        packet: |p, _| p.options = options::timestamps(1_000_000, 2_000_000),
        ..SPLICED
    },
    Row {
        name: "timestamps that wrap",
        packet: |p, _| p.options = options::timestamps(0x1000_0000, 0x2000_0000),
        ..SPLICED
    },
    Row {
        name: "the largest timestamps, with data",
        packet: |p, _| {
            p.options = options::timestamps(u32::MAX, u32::MAX);
            p.payload = vec![1; 99];
        },
        ..SPLICED
    },
    Row {
        name: "timestamps and one block",
        packet: |p, _| p.options = [options::timestamps(1, 2), options::sack(&blocks(p, 1))].concat(),
        ..SPLICED
    },
    Row {
        name: "timestamps and two blocks",
        packet: |p, _| p.options = [options::timestamps(1, 2), options::sack(&blocks(p, 2))].concat(),
        ..SPLICED
    },
    Row {
        name: "timestamps and three blocks",
        packet: |p, _| p.options = [options::timestamps(1, 2), options::sack(&blocks(p, 3))].concat(),
        ..SPLICED
    },
    Row { name: "one block", packet: |p, _| p.options = options::sack(&blocks(p, 1)), ..SPLICED },
    Row { name: "two blocks", packet: |p, _| p.options = options::sack(&blocks(p, 2)), ..SPLICED },
    Row { name: "three blocks", packet: |p, _| p.options = options::sack(&blocks(p, 3)), ..SPLICED },
    Row { name: "four blocks", packet: |p, _| p.options = options::sack(&blocks(p, 4)), ..SPLICED },
    Row {
        name: "four blocks and data",
        packet: |p, _| {
            p.options = options::sack(&blocks(p, 4));
            p.payload = vec![8; 1401];
        },
        ..SPLICED
    },
];

#[test]
fn unusual_layouts_are_translated_too() {
    in_namespace(|lab| check(lab, UNUSUAL));
}

const UNUSUAL: &[Row] = &[
    Row {
        name: "timestamps first",
        packet: |p, _| p.options = [options::bare_timestamps(7, 8), vec![1, 1]].concat(),
        counts: SLOW,
        ..SPLICED
    },
    Row {
        name: "timestamps in the middle",
        packet: |p, _| p.options = [vec![1], options::bare_timestamps(7, 8), vec![1]].concat(),
        counts: SLOW,
        ..SPLICED
    },
    Row {
        name: "timestamps, then the end",
        packet: |p, _| p.options = [options::bare_timestamps(7, 8), vec![0, 0]].concat(),
        counts: SLOW,
        ..SPLICED
    },
    Row {
        name: "a block first",
        packet: |p, _| p.options = [options::bare_sack(&blocks(p, 1)), vec![1, 1]].concat(),
        counts: SLOW,
        ..SPLICED
    },
    Row {
        name: "blocks before timestamps",
        packet: |p, _| {
            p.options = [options::bare_sack(&blocks(p, 2)), options::bare_timestamps(7, 8)].concat()
        },
        counts: SLOW,
        ..SPLICED
    },
    Row {
        name: "blocks, then usual timestamps",
        packet: |p, _| p.options = [options::sack(&blocks(p, 1)), options::timestamps(7, 8)].concat(),
        counts: SLOW,
        ..SPLICED
    },
    Row {
        name: "usual timestamps, then a block at the end",
        packet: |p, _| {
            p.options = [options::timestamps(7, 8), options::bare_sack(&blocks(p, 1)), vec![1, 1]].concat()
        },
        counts: SLOW,
        ..SPLICED
    },
    Row {
        name: "usual timestamps, then padding",
        packet: |p, _| p.options = [options::timestamps(7, 8), vec![1; 4]].concat(),
        counts: SLOW,
        ..SPLICED
    },
    Row {
        name: "a block, then more",
        packet: |p, _| p.options = [options::sack(&blocks(p, 1)), vec![1; 4]].concat(),
        counts: SLOW,
        ..SPLICED
    },
    Row {
        name: "three blocks before timestamps",
        packet: |p, _| {
            p.options =
                [options::bare_sack(&blocks(p, 3)), options::bare_timestamps(7, 8), vec![1, 1, 1, 1]].concat()
        },
        counts: SLOW,
        ..SPLICED
    },
    Row { name: "padding only", packet: |p, _| p.options = vec![1; 40], counts: SLOW, ..SPLICED },
    Row { name: "the end at once", packet: |p, _| p.options = vec![0; 8], counts: SLOW, ..SPLICED },
];

#[test]
fn what_cannot_be_translated_is_overwritten() {
    in_namespace(|lab| check(lab, OVERWRITTEN));
}

/// In rows whose packets have no readable timestamps, the record's TSval does not change.
const OVERWRITTEN: &[Row] = &[
    Row {
        name: "an unknown option",
        packet: |p, _| p.options = vec![254, 4, 1, 2],
        expect: Expect::Rewritten(|p| p.options = vec![1; 4]),
        counts: BLANKED,
        ..SPLICED
    },
    Row {
        name: "multipath TCP after usual timestamps",
        packet: |p, _| p.options = [options::timestamps(7, 8), vec![30, 4, 1, 2]].concat(),
        expect: Expect::Rewritten(|p| p.options[12..].fill(1)),
        counts: BLANKED,
        ..SPLICED
    },
    Row {
        name: "a signature",
        packet: |p, _| p.options = [vec![1, 1, 19, 18], vec![0xaa; 16]].concat(),
        expect: Expect::Rewritten(|p| p.options = vec![1; 20]),
        counts: BLANKED,
        ..SPLICED
    },
    Row {
        name: "a length beyond the header",
        packet: |p, _| p.options = vec![1, 253, 40, 7],
        expect: Expect::Rewritten(|p| p.options = vec![1; 4]),
        counts: BLANKED,
        ..SPLICED
    },
];

#[test]
fn malformed_and_unwanted_numbers_are_overwritten() {
    in_namespace(|lab| {
        // The options, the flags of the session, and the options that must leave.
        let timestamps = options::timestamps(7, 8);
        let sack = options::sack(&[(1, 2)]);
        let rows: &[(&str, Vec<u8>, u32, Vec<u8>)] = &[
            ("a block of no size", [vec![1, 1, 5, 3], vec![9; 4]].concat(), flags::SACK, vec![1; 8]),
            ("blocks of eleven bytes", [vec![5, 11], vec![9; 9], vec![1]].concat(), flags::SACK, vec![1; 12]),
            ("an option of length zero", vec![5, 0, 9, 9], flags::SACK, vec![1; 4]),
            ("an option of length one", vec![8, 1, 9, 9], flags::TIMESTAMPS, vec![1; 4]),
            ("timestamps of eight bytes", [vec![8, 8], vec![9; 6]].concat(), flags::TIMESTAMPS, vec![1; 8]),
            ("timestamps that are cut off", vec![1, 1, 8, 10, 1, 2, 3, 4], flags::TIMESTAMPS, vec![1; 8]),
            ("a kind without a length", vec![1, 1, 1, 253], flags::SACK, vec![1; 4]),
            ("timestamps that were not negotiated", timestamps.clone(), flags::SACK, vec![1; 12]),
            ("blocks that were not negotiated", sack.clone(), flags::TIMESTAMPS, vec![1; 12]),
        ];
        for (name, options, flags, left) in rows {
            for family in Family::BOTH {
                eprintln!("{name} ({family:?})");
                let mut session = Session::new(family);
                session.record.flags = *flags;
                let direction = Direction::ToUpstream;
                lab.clear();
                lab.open(&session);
                let packet =
                    Packet { options: options.clone(), payload: vec![5; 55], ..session.packet(direction) };
                let output = lab.run(Hook::Ingress, &Input { frame: packet.to_bytes(), ..Input::default() });
                let plain = Packet { options: Vec::new(), ..packet };
                let expected = Packet { options: left.clone(), ..session.rewritten(direction, &plain) };
                assert_eq!(Packet::parse(&output.frame), expected);
            }
        }
    });
}

/// The first plausible packet after the hand-over gets the floor, at any position of its
/// timestamps, and chooses the shift. Packets that are not plausible get the floor and choose
/// nothing.
#[test]
fn the_first_timestamp_becomes_the_floor() {
    use proxy_common::flow::state;
    const FLOOR: u32 = 0xfff0_0000;
    let direction = Direction::ToDownstream;
    let layouts =
        [options::timestamps(5000, 6000), [options::bare_timestamps(5000, 6000), vec![1, 1]].concat()];
    in_namespace(|lab| {
        for (record_state, options) in
            [state::HAND_OVER, state::SPLICED].into_iter().flat_map(|s| layouts.iter().map(move |o| (s, o)))
        {
            for (other_known, believed) in [(false, true), (true, true), (true, false)] {
                let mut session = Session::new(Family::V6);
                session.record.state = record_state;
                let fixed = &mut session.flow(direction).fixed;
                (fixed.ts_shift, fixed.ts_floor) = (0, FLOOR);
                if !other_known {
                    let other = session.flow(direction.opposite());
                    (other.fixed.ts_shift, other.live.ts_value) = (0, 7000);
                }
                lab.clear();
                lab.open(&session);
                let forged = if believed { 0 } else { 1 << 30 };
                let packet = session.packet(direction);
                let packet =
                    Packet { options: options.clone(), seq: packet.seq.wrapping_add(forged), ..packet };
                let output = lab.run(Hook::Ingress, &Input { frame: packet.to_bytes(), ..Input::default() });

                let left = Packet::parse(&output.frame);
                let at = left.options.iter().position(|byte| *byte == 8).unwrap();
                let number = |at: usize| u32::from_be_bytes(left.options[at..at + 4].try_into().unwrap());
                assert_eq!(number(at + 2), FLOOR);
                let echo = if other_known { 6000u32.wrapping_sub(TS_SHIFTS[0]) } else { 7000 };
                assert_eq!(number(at + 6), echo);
                let flow = lab.record(session.index).flows[direction as usize];
                let shift = if record_state == state::SPLICED { FLOOR.wrapping_sub(5000) } else { 0 };
                let expected = if believed { (shift, 5000) } else { (0, 0) };
                assert_eq!((flow.fixed.ts_shift, flow.live.ts_value), expected);
            }
        }
    });
}

/// Packets that the first one has overtaken, and later packets.
#[test]
fn none_goes_below_the_floor() {
    in_namespace(|lab| {
        let mut session = Session::new(Family::V4);
        let first = TS_FLOOR.wrapping_sub(TS_SHIFTS[0]);
        session.flow(Direction::ToUpstream).live.ts_value = first;
        lab.clear();
        lab.open(&session);
        for (value, leaves) in [(0, TS_FLOOR), (9, TS_FLOOR + 9), (u32::MAX - 8, TS_FLOOR), (8, TS_FLOOR + 8)]
        {
            let options = options::timestamps(first.wrapping_add(value), 1);
            let packet = Packet { options, ..session.packet(Direction::ToUpstream) };
            let output = lab.run(Hook::Ingress, &Input { frame: packet.to_bytes(), ..Input::default() });
            let left = Packet::parse(&output.frame).options;
            assert_eq!(u32::from_be_bytes(left[4..8].try_into().unwrap()), leaves, "{value}");
        }
        let newest = lab.record(session.index).flows[0].live.ts_value;
        assert_eq!(newest, first.wrapping_add(9));
    });
}
