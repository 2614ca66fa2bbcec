use bytemuck::Zeroable as _;
use proptest::prelude::*;

use super::*;
use crate::flow::{DirLive, Record};
use crate::shared::Share as _;

const ACK: u8 = tcp_flags::ACK;
const FIN: u8 = tcp_flags::FIN | ACK;
const RST: u8 = tcp_flags::RST;
const CLIENT: usize = Direction::ToUpstream as usize;
const ENDPOINT: usize = Direction::ToDownstream as usize;
const WINDOW: u32 = 1 << 16;

/// Two peers that have sent nothing yet, and what the program knows about them.
struct Stream {
    record: Record,
    /// Where each peer's sequence numbers start.
    start: [u32; 2],
}

impl Stream {
    fn new(client: u32, endpoint: u32) -> Self {
        let mut record = Record::zeroed();
        record.state = state::SPLICED;
        let start = [client, endpoint];
        // The proxy's own numbers: towards the endpoint, and towards the client.
        let deltas = [77_u32, 0xffff_0000];
        for flow in [CLIENT, ENDPOINT] {
            let (fixed, live) = (&mut record.flows[flow].fixed, &mut record.flows[flow].live);
            fixed.seq_delta = deltas[flow];
            fixed.ack_delta = deltas[1 - flow].wrapping_neg();
            live.seq_end = start[flow];
            live.ack_end = start[1 - flow].wrapping_add(deltas[1 - flow]);
            live.own_end = live.ack_end;
            live.window_max = 1;
        }
        Self { record, start }
    }

    /// A segment of `flow`, its numbers counted from the start of each peer.
    fn segment(&self, flow: usize, flags: u8, seq: u32, payload: u32, ack: u32) -> Segment {
        let delta = self.record.flows[1 - flow].fixed.seq_delta;
        Segment {
            seq: self.start[flow].wrapping_add(seq),
            ack: self.start[1 - flow].wrapping_add(delta).wrapping_add(ack),
            payload,
            window: 500,
            flags,
        }
    }

    fn send(&mut self, flow: usize, flags: u8, seq: u32, payload: u32, ack: u32) -> Observed {
        let segment = self.segment(flow, flags, seq, payload, ack);
        let [client, endpoint] = &mut self.record.flows;
        let (arriving, other) = if flow == CLIENT { (client, endpoint) } else { (endpoint, client) };
        let clock = Clock { tick: 1, now_ns: || 1 };
        let observed = observe(self.record.state, &segment, arriving.shared(), other.shared(), clock);
        self.record.state = observed.state.unwrap_or(self.record.state);
        observed
    }

    fn live(&self, flow: usize) -> &DirLive {
        &self.record.flows[flow].live
    }
}

fn numbers() -> impl Strategy<Value = u32> {
    prop_oneof![any::<u32>(), Just(0), Just(u32::MAX - 5), Just(0x7fff_fffe)]
}

proptest! {
    #[test]
    fn a_session_ends_when_both_fins_are_acknowledged(client in numbers(), endpoint in numbers()) {
        let mut stream = Stream::new(client, endpoint);
        prop_assert!(stream.send(CLIENT, ACK, 0, 10, 0).believed);
        prop_assert!(stream.send(ENDPOINT, ACK, 0, 5, 10).believed);
        prop_assert_eq!(stream.send(CLIENT, FIN, 10, 3, 5).event, Some(event::FIN));
        // Repeated: no news.
        prop_assert_eq!(stream.send(CLIENT, FIN, 10, 3, 5).event, None);
        prop_assert_eq!(stream.live(CLIENT).bits, bits::FIN_SEEN);
        prop_assert!(stream.send(ENDPOINT, ACK, 5, 0, 14).believed);
        prop_assert_eq!(stream.live(CLIENT).bits, bits::FIN_SEEN | bits::FIN_ACKED);
        prop_assert_eq!(stream.send(ENDPOINT, FIN, 5, 0, 14).event, Some(event::FIN));
        let last = stream.send(CLIENT, ACK, 14, 0, 6);
        prop_assert_eq!((last.state, last.event), (Some(state::FINISHED), Some(event::FINISHED)));
        // A late FIN still passes, and is no news.
        prop_assert_eq!(stream.send(ENDPOINT, FIN, 5, 0, 14), Observed::BELIEVED);
        prop_assert_eq!((stream.live(CLIENT).bytes, stream.live(ENDPOINT).bytes), (13, 5));
    }

    #[test]
    fn bytes_count_once(client in numbers(), endpoint in numbers()) {
        let mut stream = Stream::new(client, endpoint);
        for (seq, payload) in [(0, 100), (50, 100), (0, 100), (300, 10), (150, 150)] {
            prop_assert!(stream.send(CLIENT, ACK, seq, payload, 0).believed);
        }
        prop_assert_eq!(stream.live(CLIENT).bytes, 310);
        prop_assert_eq!(stream.live(CLIENT).seq_end, client.wrapping_add(310));
    }

    #[test]
    fn what_peers_do_is_believed(client in numbers(), endpoint in numbers()) {
        let mut stream = Stream::new(client, endpoint);
        for (seq, payload, what) in [
            (0, 0, "nothing"),
            (0, WINDOW, "a whole window in one packet"),
            (0, 1000, "its beginning again"),
            (u32::MAX, 0, "a keepalive or window probe"),
            (u32::MAX, 1, "the same with a byte"),
        ] {
            prop_assert!(stream.send(CLIENT, ACK, seq, payload, 0).believed, "{what}");
        }
        prop_assert!(stream.send(CLIENT, FIN, WINDOW, 0, 0).believed, "a FIN after a full window");
        prop_assert!(stream.send(ENDPOINT, ACK, 0, 0, WINDOW + 1).believed);
        prop_assert!(stream.send(ENDPOINT, ACK, 0, 0, 7).believed, "an acknowledgement that comes late");
        prop_assert_eq!(stream.live(ENDPOINT).ack_end, stream.segment(ENDPOINT, ACK, 0, 0, WINDOW + 1).ack);
    }

    #[test]
    fn what_cannot_be_the_peer_changes_nothing(seq: u32, ack: u32, flags: u8, payload in 0..3000_u32) {
        let mut stream = Stream::new(9, 1 << 31);
        stream.send(CLIENT, ACK, 0, 100, 0);
        stream.send(ENDPOINT, ACK, 0, 100, 100);
        let far = |number: u32| number.wrapping_sub(100).wrapping_add(WINDOW + 3000) > 2 * (WINDOW + 3000);
        prop_assume!(far(seq) || (far(ack) && flags & RST == 0));
        let before = stream.record;
        let observed = stream.send(CLIENT, flags, seq, payload, ack);
        prop_assert!(!observed.believed);
        prop_assert_eq!((observed.state, observed.event), (None, None));
        let mut after = stream.record;
        after.flows[CLIENT].live.packets -= 1;
        prop_assert_eq!(bytemuck::bytes_of(&after), bytemuck::bytes_of(&before));
    }
}

/// Any distance of a stream in full flow, more than half of all numbers among them.
#[test]
fn packets_ahead_of_a_record_bring_it_up_to_date_while_windows_are_not_known() {
    for (ahead, known) in [(500_000_000, true), (500_000_000, false), (3_000_000_000, false)] {
        let mut stream = Stream::new(u32::MAX - 5, 5);
        for flow in [CLIENT, ENDPOINT] {
            stream.record.flows[flow].live.window_max = known.into();
        }
        assert_eq!(stream.send(CLIENT, ACK, ahead, 100, ahead).believed, !known);
        assert_eq!(stream.send(ENDPOINT, ACK, ahead, 1400, ahead + 100).believed, !known);
        if !known {
            assert_eq!(stream.record.flows.map(|flow| flow.live.window_max), [500; 2]);
            assert!(!stream.send(CLIENT, ACK, ahead + 500_000_000, 100, ahead).believed);
            assert_eq!(stream.live(CLIENT).bytes, u64::from(ahead) + 100);
            assert_eq!(stream.live(ENDPOINT).bytes, u64::from(ahead) + 1400);
        }
    }
}

/// The links of a stream get new programs one after the other: the new record sees many windows of
/// one direction, and only then the other.
#[test]
fn one_direction_may_run_ahead_while_the_other_is_seen_elsewhere() {
    let mut stream = Stream::new(u32::MAX - 5, 5);
    for flow in [CLIENT, ENDPOINT] {
        stream.record.flows[flow].live.window_max = 0;
    }
    for window in 0..100 {
        let far = window * WINDOW;
        assert!(stream.send(CLIENT, ACK, far, WINDOW, far).believed, "{window}");
    }
    // What comes late tells nothing.
    assert!(stream.send(ENDPOINT, ACK, 0, 0, 0).believed);
    for window in 98..200 {
        let far = window * WINDOW;
        assert!(stream.send(ENDPOINT, ACK, far, WINDOW, far + 2 * WINDOW).believed, "{window}");
        assert!(stream.send(CLIENT, ACK, far + 2 * WINDOW, WINDOW, far + WINDOW).believed, "{window}");
    }
    let windows = |flow| stream.live(flow).bytes / u64::from(WINDOW);
    assert_eq!((windows(CLIENT), windows(ENDPOINT)), (202, 200));
}

#[test]
fn only_the_expected_number_resets() {
    for (seq, acked, resets) in [
        (100, 100, true),
        (99, 100, false),
        (101, 100, false),
        (60, 60, true),
        (100, 60, true),
        (80, 60, false),
    ] {
        let mut stream = Stream::new(u32::MAX - 50, 5);
        stream.send(CLIENT, ACK, 0, 100, 0);
        stream.send(ENDPOINT, ACK, 0, 0, acked);
        let observed = stream.send(CLIENT, RST, seq, 0, 0);
        assert_eq!(observed.state, resets.then_some(state::RESET), "{seq} of {acked}");
        assert_eq!(observed.stat, (!resets).then_some(Stat::RstUnproven), "{seq} of {acked}");
    }
}

#[test]
fn a_fin_that_only_the_local_socket_saw_is_not_forgotten() {
    let mut stream = Stream::new(100, 7000);
    stream.record.state = state::HAND_OVER;
    // Userspace has read the FIN, after ten bytes, and notes it.
    let live = &mut stream.record.flows[CLIENT].live;
    live.seq_end = 110;
    (live.fin_end, live.bits) = (111, bits::FIN_SEEN);
    // An acknowledgement of the FIN comes before the FIN was passed on.
    stream.send(CLIENT, ACK, 11, 0, 0);
    assert_eq!((stream.live(CLIENT).bits, stream.live(CLIENT).seq_end), (bits::FIN_SEEN, 111));
    stream.send(ENDPOINT, FIN, 0, 0, 11);
    let last = stream.send(CLIENT, ACK, 11, 0, 1);
    assert_eq!(last.state, Some(state::FINISHED));
}

#[test]
fn a_fin_with_bytes_behind_it_was_none() {
    let mut stream = Stream::new(0, 0);
    stream.send(CLIENT, FIN, 200, 0, 0);
    assert_eq!(stream.live(CLIENT).bits, bits::FIN_SEEN);
    stream.send(CLIENT, ACK, 0, 500, 0);
    stream.send(ENDPOINT, ACK, 0, 0, 500);
    assert_eq!(stream.live(CLIENT).bits, 0);
    // One in front of bytes that are there is none either.
    assert_eq!(stream.send(CLIENT, FIN, 300, 0, 0).event, None);
    assert_eq!(stream.live(CLIENT).bits, 0);
}

#[test]
fn in_a_hand_over_what_the_local_socket_was_given_counts() {
    const OWN: u32 = 5_000_000;
    let mut stream = Stream::new(1000, 2000);
    stream.record.state = state::HAND_OVER;
    // The client has sent so much, and the socket towards the endpoint has it, not sent yet.
    let endpoint = &mut stream.record.flows[ENDPOINT].live;
    endpoint.own_end = endpoint.ack_end.wrapping_add(OWN);
    assert!(stream.send(CLIENT, ACK, OWN, 1448, 0).believed);
    assert!(stream.send(ENDPOINT, ACK, 0, 0, 1448).believed);
    assert!(stream.send(ENDPOINT, ACK, 0, 0, OWN).believed);
    stream.record.state = state::SPLICED;
    assert!(stream.send(CLIENT, ACK, OWN + 1448, 1448, 0).believed);
    assert_eq!(stream.live(CLIENT).bytes, 2 * 1448);
}

#[test]
fn a_tuple_is_taken_only_when_its_session_is_over() {
    use Direction::{ToDownstream, ToUpstream};
    const SYN: u8 = tcp_flags::SYN;
    for record_state in [state::HAND_OVER, state::SPLICED, state::FINISHED, state::RESET] {
        let over = record_state >= state::FINISHED;
        assert_eq!(takes_tuple(record_state, ToUpstream, SYN), over);
        assert_eq!(takes_tuple(record_state, ToDownstream, SYN), over);
        assert_eq!(takes_tuple(record_state, ToDownstream, SYN | ACK), over);
        assert!(!takes_tuple(record_state, ToUpstream, SYN | ACK));
        assert!(!takes_tuple(record_state, ToUpstream, FIN));
    }
}

#[test]
fn headers_that_lie_are_no_segments() {
    let header = |offset: u8| Tcp { offset, ..Tcp::zeroed() };
    assert_eq!(Segment::new(&header(4 << 4), 100), None);
    assert_eq!(Segment::new(&header(6 << 4), 23), None);
    assert_eq!(Segment::new(&header(6 << 4), 24).map(|segment| segment.payload), Some(0));
    assert_eq!(Segment::new(&header(15 << 4), 61).map(|segment| segment.payload), Some(1));
}

#[test]
fn the_last_piece_tells_how_far_a_packet_goes_and_whether_it_has_a_fin() {
    const FIN: u8 = tcp_flags::FIN | tcp_flags::ACK;
    let before = DirLive { seq_end: 0xffff_ff00, bytes: 5, ..DirLive::zeroed() };
    for (end, bytes) in [(0x100, 0x205), (0xffff_fe00, 5), (0x0002_0000, 5), (0xffff_ff00, 5)] {
        let mut live = before;
        assert!(!last_piece(live.shared(), end, tcp_flags::ACK));
        assert_eq!(live.bytes, bytes, "{end:x}");
    }
    let mut live = before;
    for is_first in [true, false] {
        assert_eq!(last_piece(live.shared(), 0x100, FIN), is_first);
        assert_eq!(
            (live.seq_end, live.fin_end, live.bits, live.bytes),
            (0x101, 0x101, bits::FIN_SEEN, 0x205)
        );
    }
}
