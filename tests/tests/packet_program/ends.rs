//! FIN, RST and SYN: how they change a session, and that forged ones change nothing.

use proxy_common::flow::{Direction, Record, bits, event, state};
use proxy_common::stat::Stat;

use crate::support::lab::in_namespace;
use crate::support::packet::{ACK, FIN, Packet, RST, SYN};
use crate::support::session::Session;
use crate::table::{DOUBTED, IGNORED, Row, SPLICED, believed, check};

/// The other direction has ended with a FIN that is not acknowledged yet.
fn other_has_fin(session: &mut Session, direction: Direction) {
    let live = &mut session.flow(direction.opposite()).live;
    live.seq_end = live.seq_end.wrapping_add(1);
    live.fin_end = live.seq_end;
    live.bits = bits::FIN_SEEN;
}

/// This direction has ended with a FIN that is acknowledged.
fn own_fin_is_acknowledged(session: &mut Session, direction: Direction) {
    let [mut own, mut other] =
        [direction, direction.opposite()].map(|d| session.record.flows[d as usize].live);
    own.seq_end = own.seq_end.wrapping_add(1);
    own.fin_end = own.seq_end;
    own.bits = bits::FIN_SEEN | bits::FIN_ACKED;
    other.ack_end = other.ack_end.wrapping_add(1);
    session.record.flows[direction as usize].live = own;
    session.record.flows[direction.opposite() as usize].live = other;
}

fn other_fin_is_acknowledged(record: &mut Record, direction: Direction) {
    record.flows[direction.opposite() as usize].live.bits |= bits::FIN_ACKED;
}

#[test]
fn fins() {
    in_namespace(|lab| check(lab, FINS));
}

const FINS: &[Row] = &[
    Row { name: "a FIN", packet: |p, _| p.flags = ACK | FIN, events: &[event::FIN], ..SPLICED },
    Row {
        name: "a FIN with data",
        packet: |p, _| {
            p.flags = ACK | FIN;
            p.payload = vec![1; 300];
        },
        events: &[event::FIN],
        ..SPLICED
    },
    Row {
        name: "a FIN again",
        session: own_fin_is_acknowledged,
        packet: |p, _| {
            p.flags = ACK | FIN;
            p.seq = p.seq.wrapping_sub(1);
        },
        ..SPLICED
    },
    Row {
        name: "the acknowledgement of the other's FIN",
        session: other_has_fin,
        packet: |p, _| p.ack = p.ack.wrapping_add(1),
        record: |record, direction, packet| {
            believed(record, direction, packet);
            other_fin_is_acknowledged(record, direction);
        },
        ..SPLICED
    },
    Row { name: "an acknowledgement of the bytes before the other's FIN", session: other_has_fin, ..SPLICED },
    Row {
        name: "FIN and the acknowledgement of the other's",
        session: other_has_fin,
        packet: |p, _| {
            p.flags = ACK | FIN;
            p.ack = p.ack.wrapping_add(1);
        },
        record: |record, direction, packet| {
            believed(record, direction, packet);
            other_fin_is_acknowledged(record, direction);
        },
        events: &[event::FIN],
        ..SPLICED
    },
    Row {
        name: "the last acknowledgement",
        session: |s, d| {
            own_fin_is_acknowledged(s, d);
            other_has_fin(s, d);
        },
        packet: |p, _| p.ack = p.ack.wrapping_add(1),
        record: |record, direction, packet| {
            believed(record, direction, packet);
            other_fin_is_acknowledged(record, direction);
            record.state = state::FINISHED;
        },
        events: &[event::FINISHED],
        ..SPLICED
    },
    Row {
        name: "a late packet of a finished session",
        session: |s, d| {
            own_fin_is_acknowledged(s, d);
            s.record.state = state::FINISHED;
        },
        packet: |p, _| {
            p.seq = p.seq.wrapping_sub(301);
            p.payload = vec![1; 300];
        },
        ..SPLICED
    },
    Row {
        name: "a FIN that cannot be the peer's",
        packet: |p, _| {
            p.flags = ACK | FIN;
            p.seq = p.seq.wrapping_add(1 << 20);
        },
        ..DOUBTED
    },
    Row { name: "a FIN without an acknowledgement", packet: |p, _| p.flags = FIN, ..DOUBTED },
];

#[test]
fn resets() {
    in_namespace(|lab| check(lab, RESETS));
}

const UNPROVEN: Row = Row { counts: &[Stat::Spliced, Stat::RstUnproven], ..DOUBTED };
/// Ends the session. The row does not say whether the packet is also taken for the last packet.
const PROVEN: Row = Row {
    record: |record, direction, _| {
        record.flows[direction as usize].live.packets += 1;
        record.state = state::RESET;
    },
    counts: &[Stat::Spliced],
    events: &[event::RESET],
    ..DOUBTED
};

const RESETS: &[Row] = &[
    Row { name: "a RST with the exact number", packet: |p, _| p.flags = RST, ..PROVEN },
    Row { name: "a RST that acknowledges", packet: |p, _| p.flags = RST | ACK, ..PROVEN },
    Row {
        name: "a RST with the last number seen",
        session: |s, d| {
            let live = &mut s.flow(d).live;
            live.seq_end = live.seq_end.wrapping_add(777);
        },
        packet: |p, _| p.flags = RST,
        ..PROVEN
    },
    Row {
        name: "a RST with the last number acknowledged",
        session: |s, d| {
            let live = &mut s.flow(d).live;
            live.seq_end = live.seq_end.wrapping_add(777);
        },
        packet: |p, _| {
            p.flags = RST;
            p.seq = p.seq.wrapping_sub(777);
        },
        ..PROVEN
    },
    Row {
        name: "a RST in the window",
        packet: |p, _| {
            p.flags = RST | ACK;
            p.seq = p.seq.wrapping_add(1);
        },
        ..UNPROVEN
    },
    Row {
        name: "a RST far away",
        packet: |p, _| {
            p.flags = RST;
            p.seq = p.seq.wrapping_add(1 << 31);
        },
        ..UNPROVEN
    },
    Row {
        name: "a RST of a finished session",
        session: |s, _| s.record.state = state::FINISHED,
        packet: |p, _| p.flags = RST,
        counts: &[Stat::Spliced],
        ..DOUBTED
    },
    Row {
        name: "a late packet of a reset session",
        session: |s, _| s.record.state = state::RESET,
        ..SPLICED
    },
];

#[test]
fn syns() {
    in_namespace(|lab| {
        check(lab, LIVE_SYNS);
        for (state, spliced) in [(state::FINISHED, SYN_FINISHED), (state::RESET, SYN_RESET)] {
            eprintln!("state {state}");
            check(lab, &[spliced]);
        }
    });
}

/// These packets go to the other peer, which knows what they mean. The window is not scaled, and
/// the record learns nothing.
const LIVE_SYNS: &[Row] = &[
    Row {
        name: "a SYN in a living session",
        session: |s, d| s.flow(d).fixed.window_left = 7,
        packet: |p, _| {
            p.flags = SYN;
            p.ack = 0;
            p.window = 64_240;
            p.seq = p.seq.wrapping_add(99_999_999);
        },
        ..DOUBTED
    },
    Row {
        name: "a SYN with an acknowledgement in a living session",
        session: |s, d| s.flow(d).fixed.window_right = 7,
        packet: |p, _| p.flags = SYN | ACK,
        ..DOUBTED
    },
    Row {
        name: "a SYN in a hand-over",
        session: |s, _| s.record.state = state::HAND_OVER,
        packet: |p, _| p.flags = SYN,
        ..DOUBTED
    },
];

const REUSED: Row = Row {
    packet: |p, _| p.flags = SYN,
    record: |record, _, _| record.state = state::DEAD,
    counts: &[Stat::Reused],
    events: &[event::REUSED],
    keeps_key: false,
    ..IGNORED
};

const SYN_FINISHED: Row =
    Row { name: "a SYN after the end", session: |s, _| s.record.state = state::FINISHED, ..REUSED };
const SYN_RESET: Row =
    Row { name: "a SYN after a reset", session: |s, _| s.record.state = state::RESET, ..REUSED };

/// The proxy's own stack may use the port towards the endpoint again. The programs did not see its
/// SYN, but they see the answer.
#[test]
fn an_endpoints_answer_to_a_new_connection_takes_the_tuple_a_clients_does_not() {
    use crate::support::session::Session;
    use crate::table::check_row;
    const ANSWER: Row = Row {
        name: "SYN and ACK after the end",
        packet: |p: &mut Packet, _| p.flags = SYN | ACK,
        ..SYN_FINISHED
    };
    const STRAY: Row = Row {
        name: "SYN and ACK from a client after the end",
        packet: |p: &mut Packet, _| p.flags = SYN | ACK,
        session: |s, _| s.record.state = state::FINISHED,
        ..DOUBTED
    };
    in_namespace(|lab| {
        for family in crate::support::session::Family::BOTH {
            check_row(lab, &ANSWER, Session::new(family), Direction::ToDownstream);
            check_row(lab, &STRAY, Session::new(family), Direction::ToUpstream);
        }
    });
}
