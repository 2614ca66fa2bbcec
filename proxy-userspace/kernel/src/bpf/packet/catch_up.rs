//! Moves a stream from the record of an earlier process to a record of this process while packets
//! of the stream arrive.
//!
//! The new record starts as a copy. Then the links get the new programs, one link after the other.
//! Until the last link has its new program, the old program sees some packets of a stream and uses
//! the old record, and the new program sees the other packets and uses the new record. Both
//! programs rewrite a packet in the same way, since both records have the same [`DirFixed`]
//! (without sockets, a stream changes nothing of that but the shift of its first timestamp). But
//! the two records do not learn the same: each lacks what the other one has seen. So
//!
//! * what the old record learns later is noted in the new one, for as long as a program may write
//!   to the old one. Sequence numbers only grow and states only advance. So it does no harm to note
//!   something twice, or while the new program handles packets;
//! * as long as the new record may lag, its largest windows are unknown ([`DirLive::window_max`]).
//!   The next packet of a direction is then believed however far ahead it is, and brings the
//!   numbers up to date. And packets of one direction are believed until a packet of the other
//!   direction has come. Otherwise a stream that has advanced by more than a window meanwhile would
//!   never be believed again, and would be given up as silent. When all links have their new
//!   programs, a quiet stream is checked as strictly as before. Nobody outside of this host can
//!   cause such a change, and a RST needs the exact number at any time;
//! * a RST, or the acknowledgement of a FIN, that meets a lagging record is passed on, and changes
//!   nothing. Afterwards the state of the old record, or the numbers, tell of the packet. A RST
//!   that no record has believed is noticed like a RST that was lost on the way here: the next
//!   probe gets no answer.

use std::mem::offset_of;
use std::sync::atomic::Ordering;

use proxy_common::flow::{DirFixed, DirLive, Direction, FlowRef, Record, bits, state};
use proxy_common::packet::seq::{after, before};

use super::records::Records;

/// Notes in the record `index` what `old`, the record of the same stream in other maps, has seen
/// since. `packets` is what `old` had counted when it was last noted, or copied.
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
            // In the same order as the program: a CPU that finds the shift known also finds a
            // value.
            replace(to.live(flow, offset_of!(DirLive, ts_value)), 0, old_flow.live.ts_value);
            replace(to.fixed(flow, offset_of!(DirFixed, ts_shift)), 0, old_flow.fixed.ts_shift);
        }
    }
    if relayed != new.relayed {
        to.set_relayed(index, relayed);
    }
    ends(to, index, old);
}

/// Reconciles the bytes that the record `index` has counted with those of `old`, which no program
/// writes any more. A copy that was made while a packet was being counted may have the bytes of the
/// packet without its sequence number, or the number without the bytes.
pub(super) fn correct_counts(to: &Records, index: u32, old: &Record) {
    // In a hand-over the bytes do not follow from the numbers.
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

/// A copy during which no packet was counted, if a few attempts yield one.
fn settled(records: &Records, index: u32) -> Option<Record> {
    let same = |one: &Record, other: &Record| bytemuck::bytes_of(one) == bytemuck::bytes_of(other);
    (0..100).find_map(|_| {
        let record = records.snapshot(index);
        same(&record, &records.snapshot(index)).then_some(record)
    })
}

/// Lets the next packet of each direction be believed, however far ahead of the record it is; and
/// all packets of one direction until one of the other direction has come.
pub(super) fn expect_leaps(to: &Records, index: u32) {
    for direction in Direction::BOTH {
        let flow = FlowRef::new(index, direction);
        to.live_half(flow, offset_of!(DirLive, window_max)).store(0, Ordering::Release);
    }
}

/// Gives the record its largest windows again: for each direction whose packets have brought the
/// record up to date, and for both directions if `up_to_date` and neither has moved. Any other
/// direction still waits for its next packet, because the old record may have seen nothing of it
/// since the first link got the new program.
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

/// Returns how many bytes of payload the new record did not know of. These bytes are not added to
/// [`DirLive::bytes`], which only the program writes. The program counts how far `seq_end`
/// advances, so no byte is counted twice. `counted` is how many bytes more the old record has
/// counted: this tells how often the sequence numbers have wrapped since the two records were
/// equal.
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

/// The bytes of a direction, including those that sockets have forwarded.
fn total(record: &Record, way: usize) -> u64 {
    record.relayed[way].wrapping_add(record.flows[way].live.bytes)
}

/// Unless the program has written meanwhile, since the program knows later numbers.
fn replace(place: &std::sync::atomic::AtomicU32, from: u32, to: u32) -> bool {
    place.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
}

/// `seq_end` without a FIN.
fn payload_end(live: &DirLive) -> u32 {
    let has_fin = live.bits & bits::FIN_SEEN != 0 && live.seq_end == live.fin_end;
    live.seq_end.wrapping_sub(has_fin.into())
}

/// `packets` may lose a packet that the program counts at this moment.
fn counts(to: &Records, flow: FlowRef, old: &DirLive, packets: u64) {
    let place = |offset| to.live_count(flow, offset);
    let more = old.packets.wrapping_sub(packets);
    if more != 0 {
        place(offset_of!(DirLive, packets)).fetch_add(more, Ordering::AcqRel);
    }
    place(offset_of!(DirLive, last_payload_ns)).fetch_max(old.last_payload_ns, Ordering::AcqRel);
    place(offset_of!(DirLive, last_packet_ns)).fetch_max(old.last_packet_ns, Ordering::AcqRel);
}

/// FINs, acknowledged or not, and the state. One record may have seen a FIN, the other one what
/// acknowledges it.
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
            // The second time there is nothing to do but for packets, which are told apart by what
            // was noted.
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
