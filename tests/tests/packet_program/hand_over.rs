//! The hand-over: copies of acknowledgements for the proxy's own sockets, packets that these
//! sockets send, and resets of the stack.

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;

use proxy_common::flow::{Direction, flags, state};
use proxy_common::stat::Stat;

use crate::support::lab::{COPY_MARK, Hook, Input, Lab, MARK, Verdict, in_namespace};
use crate::support::packet::{ACK, FIN, Packet, RST, SYN, options};
use crate::support::session::{Family, LOOPBACK, Session, TS_FLOOR, TS_SHIFTS};
use crate::table::{check_counts, check_record};

const DIRECTION: Direction = Direction::ToUpstream;
const NO_SUCH_INTERFACE: u32 = 9999;

fn handing_over(family: Family) -> Session {
    let mut session = Session::new(family);
    session.record.state = state::HAND_OVER;
    session.record.flags |= flags::COPY_ACKS;
    session
}

/// Runs a packet, and compares the counters. Returns the verdict and the packet that left.
fn run(lab: &mut Lab, session: &Session, hook: Hook, input: &Input, counts: &[Stat]) -> (Verdict, Vec<u8>) {
    lab.clear();
    lab.open(session);
    let before = lab.stats();
    let output = lab.run(hook, input);
    check_counts(lab, &before, counts);
    assert_eq!(output.mark, input.mark);
    (output.verdict, output.frame)
}

#[test]
fn acknowledgements_are_copied_and_forwarded() {
    in_namespace(|lab| {
        for (family, direction) in
            [(Family::V4, Direction::ToUpstream), (Family::V6, Direction::ToDownstream)]
        {
            let session = handing_over(family);
            let plain = session.packet(direction);
            let data = Packet { payload: vec![1; 700], options: options::timestamps(1, 2), ..plain.clone() };
            let fin = Packet { flags: ACK | FIN, ..plain.clone() };
            for packet in [plain, data, fin] {
                let input = Input { frame: packet.to_bytes(), ingress_ifindex: LOOPBACK, ..Input::default() };
                let counts = &[Stat::Spliced, Stat::Copied];
                let (verdict, frame) = run(lab, &session, Hook::Ingress, &input, counts);
                assert_eq!(verdict, Verdict::Redirect);
                assert_eq!(Packet::parse(&frame), session.rewritten(direction, &packet));
                let nowhere = Input { ingress_ifindex: NO_SUCH_INTERFACE, ..input };
                let counts = &[Stat::Spliced, Stat::CopyFailed];
                let (verdict, again) = run(lab, &session, Hook::Ingress, &nowhere, counts);
                assert_eq!((verdict, again), (Verdict::Redirect, frame));
            }
        }
    });
}

#[test]
fn nothing_else_is_copied() {
    in_namespace(|lab| {
        let session = handing_over(Family::V4);
        let packet = session.packet(DIRECTION);
        let input = |packet: &Packet| Input {
            frame: packet.to_bytes(),
            ingress_ifindex: LOOPBACK,
            ..Input::default()
        };
        let reset = Packet { flags: RST | ACK, seq: packet.seq.wrapping_add(1), ..packet.clone() };
        run(lab, &session, Hook::Ingress, &input(&reset), &[Stat::Spliced, Stat::RstUnproven]);
        let syn = Packet { flags: SYN | ACK, ..packet.clone() };
        run(lab, &session, Hook::Ingress, &input(&syn), &[Stat::Spliced, Stat::Implausible]);
        let mut quiet = session.clone();
        quiet.record.flags &= !flags::COPY_ACKS;
        run(lab, &quiet, Hook::Ingress, &input(&packet), &[Stat::Spliced]);
        let mut spliced = session;
        spliced.record.state = state::SPLICED;
        run(lab, &spliced, Hook::Ingress, &input(&packet), &[Stat::Spliced]);
    });
}

/// A connection inside the namespace. `near` is the proxy's end.
struct Connection {
    _listener: TcpListener,
    near: TcpStream,
    far: TcpStream,
}

impl Connection {
    /// Makes a connection on which `near` has received 5 bytes.
    fn new(family: Family) -> Self {
        let address = match family {
            Family::V4 => IpAddr::from(Ipv4Addr::LOCALHOST),
            Family::V6 => IpAddr::from(Ipv6Addr::LOCALHOST),
        };
        let listener = TcpListener::bind((address, 0)).unwrap();
        let mut far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let near = listener.accept().unwrap().0;
        far.write_all(b"hello").unwrap();
        near.peek(&mut [0]).unwrap();
        Self { _listener: listener, near, far }
    }

    /// A session whose client is at the far end.
    fn session(&self, family: Family) -> Session {
        let mut session = handing_over(family);
        session.client = self.far.local_addr().unwrap();
        session.front = self.near.local_addr().unwrap();
        session
    }

    /// The sequence number that `near` expects.
    fn expected(&self) -> u32 {
        const ON: i32 = 1;
        const OFF_WITHOUT_PROBE: i32 = -1;
        const RECEIVE_QUEUE: i32 = 1;
        self.set(libc::TCP_REPAIR, ON);
        self.set(libc::TCP_REPAIR_QUEUE, RECEIVE_QUEUE);
        let (mut number, mut length) = (0u32, 4);
        let to = (&raw mut number).cast();
        // SAFETY: `to` has room for `length` bytes, and the socket is open.
        let result = unsafe {
            libc::getsockopt(self.near.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_QUEUE_SEQ, to, &mut length)
        };
        assert_eq!(result, 0);
        self.set(libc::TCP_REPAIR, OFF_WITHOUT_PROBE);
        number
    }

    fn set(&self, option: i32, value: i32) {
        let from = (&raw const value).cast();
        // SAFETY: `from` is four bytes, and the socket is open.
        let result = unsafe { libc::setsockopt(self.near.as_raw_fd(), libc::IPPROTO_TCP, option, from, 4) };
        assert_eq!(result, 0);
    }
}

fn copy_of(packet: &Packet) -> Input {
    Input { frame: packet.to_bytes(), mark: COPY_MARK, ingress_ifindex: LOOPBACK, ..Input::default() }
}

#[test]
fn a_copy_becomes_an_acknowledgement_that_the_socket_takes() {
    in_namespace(|lab| {
        for family in Family::BOTH {
            let connection = Connection::new(family);
            let expected = connection.expected();
            let mut session = connection.session(family);
            let own_end = 0xffff_fff0;
            session.record.flows[DIRECTION as usize].live.own_end = own_end;
            let (behind, ahead) = (own_end - 500, own_end.wrapping_add(500));
            let plain = Packet { seq: 0x0bad_cafe, ack: behind, ttl: 33, ..session.packet(DIRECTION) };
            let blocks = |blocks: &[(u32, u32)]| [options::timestamps(3, 4), options::sack(blocks)].concat();
            for (packet, ack, options) in [
                (plain.clone(), behind, vec![]),
                (Packet { ack: ahead, ..plain.clone() }, own_end, vec![]),
                (
                    Packet { payload: vec![1; 999], flags: ACK | FIN, urgent: 7, ..plain.clone() },
                    behind,
                    vec![],
                ),
                (Packet { options: options::timestamps(3, 4), ..plain.clone() }, behind, vec![1; 12]),
                (
                    Packet {
                        options: blocks(&[(behind, ahead), (behind, own_end)]),
                        payload: vec![1],
                        ..plain.clone()
                    },
                    behind,
                    [vec![1; 12], options::sack(&[(behind, own_end), (behind, own_end)])].concat(),
                ),
                (
                    Packet { options: options::sack(&[(behind, ahead)]), ..plain.clone() },
                    behind,
                    options::sack(&[(behind, own_end)]),
                ),
                (Packet { trailer: vec![0; 6], ..plain.clone() }, behind, vec![]),
            ] {
                let (verdict, frame) =
                    run(lab, &session, Hook::Ingress, &copy_of(&packet), &[Stat::CopyPassed]);
                assert_eq!(verdict, Verdict::Pass);
                let trimmed = Packet {
                    seq: expected,
                    ack,
                    flags: ACK,
                    urgent: 0,
                    options,
                    payload: vec![],
                    trailer: vec![],
                    ..packet.clone()
                };
                assert_eq!(Packet::parse(&frame), trimmed);
                check_record(lab.record(session.index), session.record);
                // The kernel forgets the network card's sum of a packet that is shortened. But the
                // test run would still check the sum.
                if packet.payload.is_empty() && packet.trailer.is_empty() {
                    let summed = lab.run_summed(Hook::Ingress, &copy_of(&packet)).unwrap();
                    assert_eq!(summed.frame, frame);
                }
            }
        }
    });
}

#[test]
fn a_copy_that_comes_late_is_dropped() {
    in_namespace(|lab| {
        for family in Family::BOTH {
            let connection = Connection::new(family);
            let session = connection.session(family);
            let copy = copy_of(&session.packet(DIRECTION));
            for late in [state::OFF, state::SPLICED, state::FINISHED, state::RESET, state::DEAD] {
                let mut session = session.clone();
                session.record.state = late;
                let (verdict, _) = run(lab, &session, Hook::Ingress, &copy, &[Stat::DropLateCopy]);
                assert_eq!(verdict, Verdict::Drop);
            }
            // The listener would answer the copy with a RST.
            let Connection { _listener, near, far } = connection;
            socket2::SockRef::from(&near).set_linger(Some(std::time::Duration::ZERO)).unwrap();
            drop(near);
            let (verdict, _) = run(lab, &session, Hook::Ingress, &copy, &[Stat::DropLateCopy]);
            assert_eq!(verdict, Verdict::Drop);
            drop((_listener, far));
            let (verdict, _) = run(lab, &session, Hook::Ingress, &copy, &[Stat::DropLateCopy]);
            assert_eq!(verdict, Verdict::Drop);
        }
    });
}

/// Several instances have programs on an interface, and the same marks.
#[test]
fn a_copy_of_a_stream_without_a_record_is_left_to_the_next_program() {
    in_namespace(|lab| {
        for family in Family::BOTH {
            let copy = copy_of(&handing_over(family).packet(DIRECTION));
            lab.clear();
            let output = lab.run(Hook::Ingress, &copy);
            assert_eq!((output.verdict, output.frame), (Verdict::Pass, copy.frame));
        }
    });
}

/// A packet of the proxy's own socket.
fn own(packet: &Packet) -> Input {
    Input { frame: packet.to_bytes(), mark: MARK, ..Input::default() }
}

#[test]
fn what_the_own_socket_sends_is_brought_up_to_date() {
    in_namespace(|lab| {
        for family in Family::BOTH {
            for direction in Direction::BOTH {
                let mut session = handing_over(family);
                session.record.flags &= !flags::TIMESTAMPS;
                let flow = session.flow(direction);
                (flow.live.window, flow.fixed.window_left, flow.fixed.window_right) = (3000, 7, 5);
                let newest = session.own_packet(direction);
                let stale =
                    Packet { ack: newest.ack.wrapping_sub(70_000), payload: vec![4; 501], ..newest.clone() };
                let (verdict, frame) = run(lab, &session, Hook::Egress, &own(&stale), &[Stat::Freshened]);
                assert_eq!(verdict, Verdict::Pass);
                assert_eq!(Packet::parse(&frame), Packet { ack: newest.ack, window: 12_000, ..stale });
                // The socket has received more than was forwarded. The difference is missing from
                // the window.
                for (more, window) in [(32, 11_999), (3000 << 7, 0), (4000 << 7, 0)] {
                    let newer = Packet { ack: newest.ack.wrapping_add(more), ..newest.clone() };
                    let (_, frame) = run(lab, &session, Hook::Egress, &own(&newer), &[Stat::Freshened]);
                    assert_eq!(Packet::parse(&frame), Packet { window, ..newer });
                }
                check_record(lab.record(session.index), session.record);
            }
        }
    });
}

/// Data gets the timestamp of the floor. An acknowledgement gets the newest timestamp of the
/// sender.
#[test]
fn what_the_own_socket_sends_is_stamped_like_forwarded_packets() {
    let there = DIRECTION as usize;
    let back = DIRECTION.opposite() as usize;
    in_namespace(|lab| {
        for family in Family::BOTH {
            let mut session = handing_over(family);
            session.record.flows[there].live.ts_value = 0x1234;
            let newest = 0x1234 + TS_SHIFTS[there];
            let own_packet = session.own_packet(DIRECTION);
            // The socket has sent the bytes that the peer has acknowledged. 100 more bytes were
            // forwarded since then.
            session.record.flows[back].live.own_end = own_packet.seq.wrapping_sub(100);
            let packet = Packet {
                options: options::timestamps(1, 99),
                seq: own_packet.seq.wrapping_sub(100),
                ..own_packet.clone()
            };
            let check = |lab: &mut Lab, session: &Session, packet: &Packet, seq: u32, stamp: u32| {
                let (_, frame) = run(lab, session, Hook::Egress, &own(packet), &[Stat::Freshened]);
                let options = options::timestamps(stamp, 99);
                assert_eq!(Packet::parse(&frame), Packet { seq, options, ..packet.clone() });
            };
            check(lab, &session, &packet, own_packet.seq, newest);
            let data = Packet { payload: vec![1; 100], ..packet.clone() };
            check(lab, &session, &data, data.seq, TS_FLOOR);
            let probe = Packet { seq: packet.seq.wrapping_sub(1), ..packet.clone() };
            check(lab, &session, &probe, probe.seq, TS_FLOOR);
            // The number is beyond the peer's window, so the peer would discard the packet.
            let mut narrow = session.clone();
            narrow.record.flows[back].live.ack_end = packet.seq;
            narrow.record.flows[back].live.window = 0;
            check(lab, &narrow, &packet, packet.seq, newest);
            let mut unknown = session.clone();
            unknown.record.flows[there].fixed.ts_shift = 0;
            check(lab, &unknown, &packet, own_packet.seq, TS_FLOOR);
        }
    });
}

/// The time after the floor was set and before the hand-over.
#[test]
fn what_is_ahead_of_the_floor_raises_the_floor_before() {
    in_namespace(|lab| {
        for family in Family::BOTH {
            let mut session = handing_over(family);
            session.record.state = state::OFF;
            let packet = |value| {
                own(&Packet { options: options::timestamps(value, 99), ..session.own_packet(DIRECTION) })
            };
            let [ahead, not_ahead] = [packet(TS_FLOOR + 1), packet(TS_FLOOR)];
            let index = session.index;
            let floor = |lab: &mut Lab| lab.record(index).flows[DIRECTION as usize].fixed.ts_floor;
            let (verdict, frame) = run(lab, &session, Hook::Egress, &ahead, &[]);
            assert_eq!((verdict, &frame), (Verdict::Pass, &ahead.frame));
            assert_eq!(floor(lab), TS_FLOOR + 1);
            let (verdict, frame) = run(lab, &session, Hook::Egress, &not_ahead, &[]);
            assert_eq!((verdict, &frame), (Verdict::Pass, &not_ahead.frame));
            assert_eq!(floor(lab), TS_FLOOR);
            session.record.flows[DIRECTION as usize].fixed.ts_floor = 0;
            let (verdict, frame) = run(lab, &session, Hook::Egress, &ahead, &[]);
            assert_eq!((verdict, &frame), (Verdict::Pass, &ahead.frame));
            assert_eq!(floor(lab), 0);
        }
    });
}

#[test]
fn other_packets_of_the_stack_are_left_alone() {
    in_namespace(|lab| {
        for family in Family::BOTH {
            let session = handing_over(family);
            let stale = Packet { ack: 0, ..session.own_packet(DIRECTION) };
            let untouched = |lab: &mut Lab, session: &Session, input: &Input| {
                let (verdict, frame) = run(lab, session, Hook::Egress, input, &[]);
                assert_eq!((verdict, &frame), (Verdict::Pass, &input.frame));
            };
            untouched(lab, &session, &Input { mark: 0, ..own(&stale) });
            let stranger = Packet { destination: stale.source, ..stale.clone() };
            untouched(lab, &session, &own(&stranger));
            for other in [state::OFF, state::DEAD] {
                let mut session = session.clone();
                session.record.state = other;
                untouched(lab, &session, &own(&stale));
            }
            // A packet that was forwarded.
            untouched(lab, &session, &Input { ingress_ifindex: LOOPBACK, ..own(&stale) });
        }
    });
}

/// The client has reset its connection and opened another one with the same port, before userspace
/// has noticed. The record must not forward the packets of the new connection.
#[test]
fn another_connection_that_the_stack_accepts_takes_the_tuple() {
    in_namespace(|lab| {
        for family in Family::BOTH {
            for (before, after) in [
                (state::OFF, state::DEAD),
                (state::HAND_OVER, state::RESET),
                (state::SPLICED, state::SPLICED),
                (state::FINISHED, state::FINISHED),
            ] {
                let mut session = handing_over(family);
                session.record.state = before;
                let answer = Packet { flags: SYN | ACK, ..session.own_packet(Direction::ToDownstream) };
                let is_taken = after != before;
                let counts: &[Stat] = if is_taken { &[Stat::Reused] } else { &[] };
                let input = Input { mark: 0, ..own(&answer) };
                let (verdict, frame) = run(lab, &session, Hook::Egress, &input, counts);
                assert_eq!((verdict, &frame), (Verdict::Pass, &input.frame), "state {before}");
                assert_eq!(lab.record(session.index).state, after, "state {before}");
                assert_eq!(lab.has_key(session.key(Direction::ToUpstream)), !is_taken, "state {before}");
                assert!(lab.has_key(session.key(Direction::ToDownstream)), "state {before}");
            }
        }
    });
}

#[test]
fn the_stack_does_not_reset_a_living_stream() {
    in_namespace(|lab| {
        for family in Family::BOTH {
            for direction in Direction::BOTH {
                let mut session = handing_over(family);
                // `odd` tests numbers that the peer's packets acknowledge.
                let own_packet = session.own_packet(direction);
                let reset = Packet { flags: RST, seq: own_packet.seq.wrapping_add(1), ..own_packet };
                for (state, living) in [
                    (state::OFF, false),
                    (state::HAND_OVER, true),
                    (state::SPLICED, true),
                    (state::FINISHED, false),
                    (state::RESET, false),
                    (state::DEAD, false),
                ] {
                    session.record.state = state;
                    // In these two states, a RST of the proxy's own sockets is treated differently.
                    let own_too = !matches!(state, state::HAND_OVER | state::RESET);
                    for mark in [0].into_iter().chain(own_too.then_some(MARK)) {
                        let input = Input { mark, ..own(&reset) };
                        let counts: &[Stat] = if living { &[Stat::DropStackRst] } else { &[] };
                        let (verdict, _) = run(lab, &session, Hook::Egress, &input, counts);
                        assert_eq!(verdict, if living { Verdict::Drop } else { Verdict::Pass });
                    }
                    // A RST of a peer, which was forwarded.
                    let forwarded = Input { ingress_ifindex: LOOPBACK, mark: 0, ..own(&reset) };
                    let (verdict, _) = run(lab, &session, Hook::Egress, &forwarded, &[]);
                    assert_eq!(verdict, Verdict::Pass);
                }
            }
        }
    });
}

#[test]
fn when_the_process_dies_its_sockets_reset_the_stream_with_the_number_that_is_expected() {
    in_namespace(|lab| {
        for family in Family::BOTH {
            for direction in Direction::BOTH {
                let session = handing_over(family);
                let forwarded = &session.record.flows[direction as usize];
                let (received, sent) = (forwarded.fixed.received, forwarded.live.seq_end);
                let here = |number: u32| number.wrapping_add(forwarded.fixed.seq_delta);
                let lost = here(received).wrapping_sub(5);
                for (state, own_seq, expected) in [
                    (state::HAND_OVER, here(received), here(sent)),
                    (state::HAND_OVER, lost, lost),
                    (state::RESET, here(received), here(sent)),
                ] {
                    let mut session = session.clone();
                    session.record.state = state;
                    let packet = session.own_packet(direction);
                    let reset = Packet { flags: RST | ACK, seq: own_seq, ..packet };
                    let counts: &[Stat] = if state == state::RESET { &[] } else { &[Stat::OwnerDied] };
                    let (verdict, frame) = run(lab, &session, Hook::Egress, &own(&reset), counts);
                    assert_eq!(verdict, Verdict::Pass);
                    assert_eq!(Packet::parse(&frame), Packet { seq: expected, ..reset });
                    let after = lab.record(session.index);
                    let given_up = state == state::HAND_OVER;
                    assert_eq!((after.state, after.flags & flags::GIVEN_UP != 0), (state::RESET, given_up));
                }
            }
        }
    });
}

#[test]
fn a_full_event_ring_is_counted() {
    in_namespace(|lab| {
        let session = Session::new(Family::V6);
        let fin = Packet { flags: ACK | FIN, ..session.packet(DIRECTION) };
        let input = Input { frame: fin.to_bytes(), ..Input::default() };
        let before = lab.stats()[Stat::EventLost.number() as usize];
        lab.open(&session);
        let room = crate::support::lab::EVENTS_BYTES / 24;
        for _ in 0..room + 10 {
            lab.set_record(session.index, &session.record);
            assert_eq!(lab.run(Hook::Ingress, &input).verdict, Verdict::Redirect);
        }
        let lost = lab.stats()[Stat::EventLost.number() as usize] - before;
        assert!((10..30).contains(&lost), "{lost} events lost");
        assert_eq!(lab.events().len() as u64, u64::from(room) + 10 - lost);
    });
}
