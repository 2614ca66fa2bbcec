//! A stream goes from a record of an earlier process to one of this, while its packets come.
//!
//! The new record is a copy, and then the links get the new programs, one after the other. Until the last one has it, some
//! packets of a stream are seen by the old program and its record, others by the new one and its own. What is done to a packet
//! does not depend on that: both records say the same of it ([`DirFixed`], which does not change in a stream without sockets but
//! for its first timestamp). What is believed and remembered does: each record lacks what the other one has seen. So
//!
//! * what the old one has seen later is noted in the new one, for as long as a program may write to the old: sequence numbers only
//!   grow, states only advance, so that nothing is lost when that is done twice, or against packets that the new program sees
//!   at the same time;
//! * as long as the new record may lag, it has no largest windows ([`DirLive::window_max`]): the next packet of a direction is
//!   believed however far ahead it is, and brings the numbers up to date; and one direction is believed until a packet of the other
//!   has come, too. Without that, a stream that has gone further than a window meanwhile would never be believed again, and be
//!   given up as silent. Streams that are quiet are as strict as before when all links have changed. Nobody from outside can
//!   bring about such a change, and a RST needs the very number at any time;
//! * a RST, or the acknowledgement of a FIN, that comes to a lagging record is passed on, and changes nothing. The state
//!   of the old record, or the numbers, tell of it afterwards; a RST that no record has believed is noticed as one that
//!   was lost before it got here: the next probe finds nobody.

use std::mem::offset_of;
use std::sync::atomic::Ordering;

use proxy_common::flow::{DirFixed, DirLive, Direction, FlowRef, Record, bits, state};
use proxy_common::packet::seq::{after, before};

use super::records::Records;

/// Notes in the record `index` what `old`, the same stream's in other maps, has seen later. `packets` is what `old` had counted when
/// it was last noted, or copied.
pub(super) fn catch_up(to: &Records, index: u32, old: &Record, packets: [u64; 2]) {
    let new = to.snapshot(index);
    if new.state == state::OFF || old.state == state::OFF || new.generation != old.generation {
        return;
    }
    let mut relayed = new.relayed;
    for direction in Direction::BOTH {
        let (flow, way) = (FlowRef::new(index, direction), direction as usize);
        let (old_flow, new_flow) = (&old.flows[way], &new.flows[way]);
        let counted = total(old, way).wrapping_sub(total(&new, way)) as i64;
        let more = numbers(to, flow, &old_flow.live, &new_flow.live, counted);
        relayed[way] = relayed[way].wrapping_add(more);
        counts(to, flow, &old_flow.live, packets[way]);
        if old_flow.fixed.ts_shift != 0 {
            // In the order of the program: a CPU that finds the shift known finds a value, too.
            replace(to.live(flow, offset_of!(DirLive, ts_value)), 0, old_flow.live.ts_value);
            replace(to.fixed(flow, offset_of!(DirFixed, ts_shift)), 0, old_flow.fixed.ts_shift);
        }
    }
    if relayed != new.relayed {
        to.set_relayed(index, relayed);
    }
    ends(to, index, old);
}

/// Makes the bytes that the record `index` has counted fit to those of `old`, which no program writes any more. A copy that is made
/// while a packet is counted has its bytes, but not its number, or the other way round.
pub(super) fn correct_counts(to: &Records, index: u32, old: &Record) {
    // In a hand-over numbers and bytes do not go together.
    let is_spliced = |record: &Record| record.state == state::SPLICED && record.generation == old.generation;
    let Some(new) = settled(to, index).filter(|new| is_spliced(new) && is_spliced(old)) else { return };
    let mut relayed = new.relayed;
    for direction in Direction::BOTH {
        let way = direction as usize;
        let counted = total(&new, way).wrapping_sub(total(old, way)) as u32;
        let distance = payload_end(&new.flows[way].live).wrapping_sub(payload_end(&old.flows[way].live));
        let missing = distance.wrapping_sub(counted) as i32;
        relayed[way] = relayed[way].wrapping_add_signed(missing.into());
    }
    if relayed != new.relayed {
        to.set_relayed(index, relayed);
    }
}

/// A copy during which no packet was counted, if that can be had soon.
fn settled(records: &Records, index: u32) -> Option<Record> {
    let same = |one: &Record, other: &Record| bytemuck::bytes_of(one) == bytemuck::bytes_of(other);
    (0..100).find_map(|_| {
        let record = records.snapshot(index);
        same(&record, &records.snapshot(index)).then_some(record)
    })
}

/// Lets the next packet of each direction be believed, however far ahead of the record it is, and those of one as long as none of the
/// other has come.
pub(super) fn expect_leaps(to: &Records, index: u32) {
    for direction in Direction::BOTH {
        let flow = FlowRef::new(index, direction);
        to.live_half(flow, offset_of!(DirLive, window_max)).store(0, Ordering::Release);
    }
}

/// Gives the record its largest windows again: those of directions that have brought it up to date, and all if `up_to_date` and
/// no direction has moved. Any other direction's next packet is still to do that: what the old record knows of it may end where the
/// first link got the new program.
pub(super) fn expect_no_leaps(to: &Records, index: u32, old: &Record, up_to_date: bool) {
    let window = |direction| to.live_half(FlowRef::new(index, direction), offset_of!(DirLive, window_max));
    let has_moved = Direction::BOTH.map(|direction| window(direction).load(Ordering::Acquire) != 0);
    for direction in Direction::BOTH {
        if has_moved[direction as usize] || up_to_date && has_moved == [false; 2] {
            let largest = old.flows[direction as usize].live.window_max;
            window(direction).fetch_max(largest, Ordering::AcqRel);
        }
    }
}

/// Returns how many bytes of payload the new record did not know of. They are not added to [`DirLive::bytes`], which belongs to the
/// program: it counts by advance from `seq_end`, so what comes after that is never counted by both. `counted` is how many bytes more
/// the old one has counted: it tells how often the numbers have wrapped since the two were the same.
fn numbers(to: &Records, flow: FlowRef, old: &DirLive, new: &DirLive, counted: i64) -> u64 {
    let place = |offset| to.live(flow, offset);
    if after(old.ack_end, new.ack_end)
        && replace(place(offset_of!(DirLive, ack_end)), new.ack_end, old.ack_end)
    {
        to.live_half(flow, offset_of!(DirLive, window)).store(old.window, Ordering::Release);
    }
    if after(old.ts_value, new.ts_value) {
        replace(place(offset_of!(DirLive, ts_value)), new.ts_value, old.ts_value);
    }
    let distance = payload_end(old).wrapping_sub(payload_end(new));
    let more = counted.wrapping_add(i64::from(distance.wrapping_sub(counted as u32) as i32));
    let is_later = more > 0 || more == 0 && after(old.seq_end, new.seq_end);
    if is_later && replace(place(offset_of!(DirLive, seq_end)), new.seq_end, old.seq_end) {
        more as u64
    } else {
        0
    }
}

/// Bytes of a direction, those that sockets have forwarded among them.
fn total(record: &Record, way: usize) -> u64 {
    record.relayed[way].wrapping_add(record.flows[way].live.bytes)
}

/// Unless the program has written meanwhile: what it knows is later.
fn replace(place: &std::sync::atomic::AtomicU32, from: u32, to: u32) -> bool {
    place.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
}

/// `seq_end` without a FIN.
fn payload_end(live: &DirLive) -> u32 {
    let has_fin = live.bits & bits::FIN_SEEN != 0 && live.seq_end == live.fin_end;
    live.seq_end.wrapping_sub(has_fin.into())
}

/// `packets` may lose a packet that the program counts at this very moment.
fn counts(to: &Records, flow: FlowRef, old: &DirLive, packets: u64) {
    let place = |offset| to.live_count(flow, offset);
    let more = old.packets.wrapping_sub(packets);
    if more != 0 {
        place(offset_of!(DirLive, packets)).fetch_add(more, Ordering::AcqRel);
    }
    place(offset_of!(DirLive, last_payload_ns)).fetch_max(old.last_payload_ns, Ordering::AcqRel);
    place(offset_of!(DirLive, last_packet_ns)).fetch_max(old.last_packet_ns, Ordering::AcqRel);
}

/// FINs, acknowledged or not, and the state. One record may have seen a FIN, the other one what acknowledges it.
fn ends(to: &Records, index: u32, old: &Record) {
    let mut acknowledged = bits::FIN_ACKED;
    for direction in Direction::BOTH {
        let (flow, way, back) =
            (FlowRef::new(index, direction), direction as usize, direction.opposite() as usize);
        let live = &old.flows[way].live;
        if live.bits & bits::FIN_SEEN != 0 && to.snapshot(index).flows[way].live.bits & bits::FIN_SEEN == 0 {
            to.note_fin(flow, live.fin_end);
        }
        let new = to.snapshot(index);
        let (live, back) = (&new.flows[way].live, &new.flows[back]);
        let acked = back.live.ack_end.wrapping_add(back.fixed.ack_delta);
        if live.bits & bits::FIN_SEEN != 0 && !before(acked, live.fin_end) {
            to.live_half(flow, offset_of!(DirLive, bits)).fetch_or(bits::FIN_ACKED, Ordering::AcqRel);
        } else {
            acknowledged = 0;
        }
    }
    let is_over = acknowledged != 0 && old.state == state::SPLICED;
    let known = if is_over { state::FINISHED } else { old.state };
    let mut now = to.state(index);
    // Later states have greater numbers.
    while now != state::OFF && now < known {
        match to.advance_state(index, now, known) {
            Ok(()) => return,
            Err(other) => now = other,
        }
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;

    use super::super::records::tests::records;
    use super::*;

    const UP: usize = Direction::ToUpstream as usize;
    const DOWN: usize = Direction::ToDownstream as usize;

    /// A stream whose client has sent up to 1000 and whose endpoint up to 2000, all acknowledged.
    fn stream() -> Record {
        let mut record =
            Record { state: state::SPLICED, generation: 1, family: 4, relayed: [10, 20], ..Record::zeroed() };
        for (way, sent, received) in [(UP, 1000, 2000_u32), (DOWN, 2000, 1000)] {
            let flow = &mut record.flows[way];
            (flow.fixed.seq_delta, flow.fixed.ack_delta) = (500, 500_u32.wrapping_neg());
            (flow.live.seq_end, flow.live.ack_end) = (sent, received + 500);
            (flow.live.window, flow.live.window_max) = (50, 100);
            (flow.live.packets, flow.live.bytes) = (5, 300);
        }
        record
    }

    fn after_catching_up(new: Record, old: &Record) -> Record {
        let records = records(2);
        records.write(1, new);
        for _ in 0..2 {
            // The second time there is nothing to do but for packets, which are told apart by what was noted.
            catch_up(&records, 1, old, old.flows.map(|flow| flow.live.packets));
        }
        assert_eq!(records.state(0), state::OFF);
        records.snapshot(1)
    }

    #[test]
    fn what_the_old_record_saw_later_is_taken_once() {
        let mut old = stream();
        let live = &mut old.flows[UP].live;
        (live.seq_end, live.bytes, live.packets, live.last_packet_ns) = (1700, 1000, 9, 77);
        let live = &mut old.flows[DOWN].live;
        (live.ack_end, live.window, live.ts_value) = (2200, 40, 5);
        let new = after_catching_up(stream(), &old);
        assert_eq!((total(&new, UP), total(&new, DOWN)), (1010, 320));
        let [up, down] = new.flows.map(|flow| flow.live);
        assert_eq!((up.seq_end, up.ack_end, up.window, up.last_packet_ns), (1700, 2500, 50, 77));
        assert_eq!((down.seq_end, down.ack_end, down.window, down.ts_value), (2000, 2200, 40, 5));
        assert_eq!(new.state, state::SPLICED);
    }

    #[test]
    fn what_the_new_record_saw_later_stays() {
        let mut new = stream();
        let live = &mut new.flows[UP].live;
        (live.seq_end, live.bytes, live.ack_end, live.window) = (3000, 2300, 2900, 60);
        new.state = state::RESET;
        let after = after_catching_up(new, &stream());
        assert_eq!(bytemuck::bytes_of(&after), bytemuck::bytes_of(&new));
    }

    #[test]
    fn packets_are_added() {
        let records = records(1);
        records.write(0, stream());
        let mut old = stream();
        old.flows[UP].live.packets = 12;
        catch_up(&records, 0, &old, [5, 5]);
        assert_eq!(records.snapshot(0).flows.map(|flow| flow.live.packets), [12, 5]);
    }

    #[test]
    fn a_fin_and_its_acknowledgement_may_be_seen_by_different_records() {
        let mut old = stream();
        // Both peers close: the old record sees both FINs, the new one what acknowledges them.
        for (way, end) in [(UP, 1001), (DOWN, 2001)] {
            let live = &mut old.flows[way].live;
            (live.seq_end, live.fin_end, live.bits) = (end, end, bits::FIN_SEEN);
        }
        let half = after_catching_up(stream(), &old);
        assert_eq!(
            (half.state, half.flows.map(|flow| flow.live.bits)),
            (state::SPLICED, [bits::FIN_SEEN; 2])
        );
        assert_eq!((total(&half, UP), total(&half, DOWN)), (310, 320));
        let mut new = stream();
        new.flows[UP].live.ack_end = 2501;
        new.flows[DOWN].live.ack_end = 1501;
        assert_eq!(after_catching_up(new, &old).state, state::FINISHED);
    }

    #[test]
    fn states_only_advance_and_free_records_stay_free() {
        let in_state = |state| Record { state, ..stream() };
        for (new, old, then) in [
            (state::SPLICED, state::RESET, state::RESET),
            (state::FINISHED, state::DEAD, state::DEAD),
            (state::RESET, state::FINISHED, state::RESET),
            (state::OFF, state::SPLICED, state::OFF),
        ] {
            assert_eq!(after_catching_up(in_state(new), &in_state(old)).state, then);
        }
        let other = Record { generation: 2, state: state::RESET, ..stream() };
        assert_eq!(after_catching_up(stream(), &other).state, state::SPLICED);
    }

    #[test]
    fn the_first_timestamp_is_taken_over() {
        let mut old = stream();
        // A value that looks as if it lay before zero.
        (old.flows[UP].live.ts_value, old.flows[UP].fixed.ts_shift) = (1 << 31, 9);
        let new = after_catching_up(stream(), &old);
        assert_eq!((new.flows[UP].live.ts_value, new.flows[UP].fixed.ts_shift), (1 << 31, 9));
        let mut own = stream();
        own.flows[UP].fixed.ts_shift = 11;
        assert_eq!(after_catching_up(own, &old).flows[UP].fixed.ts_shift, 11);
    }

    #[test]
    fn windows_are_known_again_in_the_end() {
        let records = records(1);
        records.write(0, stream());
        let windows = || records.snapshot(0).flows.map(|flow| flow.live.window_max);
        // Which directions have moved, what is known, and what is left of that.
        for (moved, up_to_date, then) in [
            ([0, 0], true, [100, 100]),
            ([0, 0], false, [0, 0]),
            ([7, 0], true, [100, 0]),
            ([0, 700], false, [0, 700]),
        ] {
            expect_leaps(&records, 0);
            assert_eq!(windows(), [0; 2]);
            let mut now = records.snapshot(0);
            for way in [UP, DOWN] {
                now.flows[way].live.window_max = moved[way];
            }
            records.write(0, now);
            expect_no_leaps(&records, 0, &stream(), up_to_date);
            assert_eq!(windows(), then);
        }
    }

    #[test]
    fn counts_that_were_copied_in_the_middle_of_a_packet_are_corrected() {
        for (copied, way) in [(1000_i64, UP), (-1000, DOWN)] {
            let records = records(1);
            let mut new = stream();
            let live = &mut new.flows[way].live;
            (live.seq_end, live.bytes) = (live.seq_end + 5000, live.bytes + 5000);
            live.bytes = live.bytes.wrapping_add_signed(copied);
            records.write(0, new);
            correct_counts(&records, 0, &stream());
            let [up, down] = [UP, DOWN].map(|way| total(&records.snapshot(0), way));
            assert_eq!((up, down), if way == UP { (5310, 320) } else { (310, 5320) });
            // With another stream's it has nothing to do.
            correct_counts(&records, 0, &Record { generation: 2, ..new });
            assert_eq!(total(&records.snapshot(0), UP), up);
        }
    }

    #[test]
    fn numbers_that_have_wrapped_are_told_by_the_counts() {
        const AHEAD: u64 = 11_000_000_000;
        let mut ahead = stream();
        let live = &mut ahead.flows[UP].live;
        (live.seq_end, live.bytes) = (live.seq_end.wrapping_add(AHEAD as u32), live.bytes + AHEAD);
        for (new, old) in [(stream(), ahead), (ahead, stream())] {
            let after = after_catching_up(new, &old);
            assert_eq!(after.flows[UP].live.seq_end, ahead.flows[UP].live.seq_end);
            assert_eq!((total(&after, UP), total(&after, DOWN)), (310 + AHEAD, 320));
        }
    }
}
