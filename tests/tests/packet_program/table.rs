//! Tables: a packet of a session, and the expected verdict, packet, record, counters and events.
//!
//! Each row is tried with both families and in both directions. Everything that a row does not
//! mention must not change.

use proxy_common::flow::{Direction, FlowEvent, FlowRef, Record, bits};
use proxy_common::stat::Stat;

use crate::support::lab::{Hook, Input, Lab, Output, Verdict};
use crate::support::packet::{FIN, Packet};
use crate::support::session::{Family, GENERATION, Session};

/// A row. Begin with [`DOUBTED`], [`SPLICED`] or [`IGNORED`].
#[derive(Clone, Copy)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    /// Changes to [`Session::new`].
    pub(crate) session: fn(&mut Session, Direction),
    /// Changes to [`Session::packet`].
    pub(crate) packet: fn(&mut Packet, &Session),
    /// Changes to the frame and its surroundings.
    pub(crate) input: fn(&mut Input),
    pub(crate) expect: Expect,
    /// Changes to the record. The packet is the one that arrived.
    pub(crate) record: fn(&mut Record, Direction, &Packet),
    /// The counters that grow, each by one.
    pub(crate) counts: &'static [Stat],
    /// The kinds of the events of the packet's flow.
    pub(crate) events: &'static [u32],
    /// Whether the packet's own key still exists.
    pub(crate) keeps_key: bool,
}

#[derive(Clone, Copy)]
pub(crate) enum Expect {
    /// Redirected as [`Session::rewritten`] says, except for these changes.
    Rewritten(fn(&mut Packet)),
    /// Rewritten in the same way, but passed on instead of redirected.
    InPlace,
    /// Passed on unchanged.
    Untouched,
}

/// A packet that is forwarded although it is not plausible.
pub(crate) const DOUBTED: Row = Row {
    name: "",
    session: |_, _| {},
    packet: |_, _| {},
    input: |_| {},
    expect: Expect::Rewritten(|_| {}),
    record: |record, direction, _| record.flows[direction as usize].live.packets += 1,
    counts: &[Stat::Spliced, Stat::Implausible],
    events: &[],
    keeps_key: true,
};

/// A plausible packet, spliced.
pub(crate) const SPLICED: Row = Row { record: believed, counts: &[Stat::Spliced], ..DOUBTED };

/// A packet that belongs to no stream.
pub(crate) const IGNORED: Row =
    Row { expect: Expect::Untouched, record: |_, _, _| {}, counts: &[], ..DOUBTED };

/// What a plausible packet changes in the record, according to the descriptions of the record's
/// fields.
pub(crate) fn believed(record: &mut Record, direction: Direction, packet: &Packet) {
    let live = &mut record.flows[direction as usize].live;
    let after = |a: u32, b: u32| a.wrapping_sub(b) as i32 > 0;
    live.packets += 1;
    (live.tick, live.last_packet_ns) = (1, 1);
    let data_end = packet.seq.wrapping_add(packet.payload.len() as u32);
    if after(data_end, live.seq_end) && !packet.payload.is_empty() {
        live.bytes += u64::from(data_end.wrapping_sub(live.seq_end));
        live.last_payload_ns = 1;
    }
    let has_fin = packet.flags & FIN != 0;
    let end = data_end.wrapping_add(u32::from(has_fin));
    if after(end, live.seq_end) {
        live.seq_end = end;
    }
    if has_fin {
        live.fin_end = end;
        live.bits |= bits::FIN_SEEN;
    }
    if !after(live.ack_end, packet.ack) {
        live.ack_end = packet.ack;
        live.window = packet.window;
    }
    live.window_max = live.window_max.max(packet.window);
    if let Some(at) = timestamps(&packet.options) {
        let value = u32::from_be_bytes(packet.options[at + 2..at + 6].try_into().unwrap());
        if live.ts_value == 0 || after(value, live.ts_value) {
            live.ts_value = value;
        }
    }
}

/// The offset of the option.
fn timestamps(options: &[u8]) -> Option<usize> {
    let mut at = 0;
    while at < options.len() {
        match options[at] {
            0 => return None,
            1 => at += 1,
            8 => return Some(at),
            _ => at += usize::from(options[at + 1]),
        }
    }
    None
}

/// Tries every row with a family and in a direction.
pub(crate) fn check(lab: &mut Lab, rows: &[Row]) {
    for row in rows {
        for family in Family::BOTH {
            for direction in Direction::BOTH {
                eprintln!("{} ({family:?}, {direction:?})", row.name);
                check_row(lab, row, Session::new(family), direction);
            }
        }
    }
}

pub(crate) fn check_row(lab: &mut Lab, row: &Row, mut session: Session, direction: Direction) {
    (row.session)(&mut session, direction);
    let mut packet = session.packet(direction);
    (row.packet)(&mut packet, &session);
    let mut input = Input { frame: packet.to_bytes(), ..Input::default() };
    (row.input)(&mut input);
    lab.clear();
    lab.open(&session);
    let counted = lab.stats();

    let output = lab.run(Hook::Ingress, &input);
    check_output(row, &session, direction, &packet, &input, &output);
    let mut expected = session.record;
    (row.record)(&mut expected, direction, &packet);
    check_record(lab.record(session.index), expected);
    check_counts(lab, &counted, row.counts);
    check_events(lab, &session, direction, row.events);
    assert_eq!(lab.has_key(session.key(direction)), row.keeps_key, "the packet's key");
    assert!(lab.has_key(session.key(direction.opposite())), "the other direction's key");

    check_summed(lab, &session, &input, &output);
}

fn check_output(
    row: &Row,
    session: &Session,
    direction: Direction,
    packet: &Packet,
    input: &Input,
    output: &Output,
) {
    match row.expect {
        Expect::Rewritten(change) => {
            assert_eq!(output.verdict, Verdict::Redirect);
            let mut expected = session.rewritten(direction, packet);
            change(&mut expected);
            let found = Packet::parse(&output.frame);
            if packet.source.is_ipv6() && found.source.is_ipv4() {
                allow_cutting(&mut expected, packet, input, found.id);
            }
            assert_eq!(found, expected);
        }
        Expect::InPlace => {
            assert_eq!(output.verdict, Verdict::Pass);
            assert_eq!(Packet::parse(&output.frame), session.rewritten(direction, packet));
        }
        Expect::Untouched => {
            assert_eq!(output.verdict, Verdict::Pass);
            assert!(output.frame == input.frame, "the packet was changed");
        }
    }
    assert_eq!(output.mark, input.mark);
}

/// A packet that was IPv6 may be fragmented if its segments are small. Then any identification, like
/// this `id`, is right.
fn allow_cutting(expected: &mut Packet, arrived: &Packet, input: &Input, id: u16) {
    if input.gso_size != 0 && arrived.ip_length.is_none() {
        expected.fragment = 0;
    }
    if expected.fragment == 0 {
        expected.id = id;
    }
}

/// Compares only whether times were set.
pub(crate) fn check_record(mut found: Record, expected: Record) {
    for live in found.flows.iter_mut().map(|flow| &mut flow.live) {
        live.tick = live.tick.min(1);
        live.last_packet_ns = live.last_packet_ns.min(1);
        live.last_payload_ns = live.last_payload_ns.min(1);
    }
    let [found, expected] = [found, expected].map(|record| format!("{record:#?}"));
    let differences: Vec<_> = found.lines().zip(expected.lines()).filter(|(a, b)| a != b).collect();
    assert!(differences.is_empty(), "the record (found, expected): {differences:?}");
}

pub(crate) fn check_counts(lab: &Lab, before: &[u64], counts: &[Stat]) {
    for (stat, (before, after)) in Stat::ALL.iter().zip(before.iter().zip(lab.stats())) {
        let expected = counts.iter().filter(|counted| *counted == stat).count() as u64;
        assert_eq!(after - before, expected, "{stat:?}");
    }
}

fn check_events(lab: &mut Lab, session: &Session, direction: Direction, kinds: &[u32]) {
    let flow = FlowRef::new(session.index, direction);
    let event = |kind: &u32| FlowEvent { flow, generation: GENERATION, kind: *kind, _pad: 0 };
    assert_eq!(lab.events(), kinds.iter().map(event).collect::<Vec<_>>());
}

/// Tries the same once more, as if a network card had summed up the packet. The kernel checks the
/// sum afterwards.
fn check_summed(lab: &mut Lab, session: &Session, input: &Input, output: &Output) {
    lab.clear();
    lab.open(session);
    match lab.run_summed(Hook::Ingress, input) {
        Ok(summed) => {
            assert_eq!(summed.verdict, output.verdict);
            if summed.frame != output.frame {
                let [mut found, expected] = [&summed, output].map(|output| Packet::parse(&output.frame));
                if input.frame[12..14] == [0x86, 0xdd] && expected.source.is_ipv4() {
                    // A random one.
                    found.id = expected.id;
                }
                assert_eq!(found, expected);
            }
        }
        Err(error) => panic!("CHECKSUM_COMPLETE: {error}"),
    }
}
