//! Random packets. For any packet, the kernel runs the program to its end. A packet that is not
//! spliced is not changed. A packet that is spliced has correct checksums.

use proxy_common::flow::{Direction, flags, state};
use rand::rngs::StdRng;
use rand::{Rng as _, RngExt as _, SeedableRng as _};

use crate::support::lab::{COPY_MARK, Hook, Input, MARK, SYN_MARK, Verdict, in_namespace};
use crate::support::packet::{Packet, options};
use crate::support::session::{Family, Session};

const PACKETS: usize = 10_000;
const STATES: [u32; 6] =
    [state::OFF, state::HAND_OVER, state::SPLICED, state::FINISHED, state::RESET, state::DEAD];

/// The seed is `STEER_PACKET_SEED` (hex), to repeat a run.
fn random() -> StdRng {
    let seed = match std::env::var("STEER_PACKET_SEED") {
        Ok(seed) => u64::from_str_radix(&seed, 16).unwrap(),
        Err(_) => rand::random(),
    };
    eprintln!("STEER_PACKET_SEED={seed:x}");
    StdRng::seed_from_u64(seed)
}

fn random_session(random: &mut StdRng) -> (Session, Direction) {
    let family = Family::BOTH[random.random_range(0..2)];
    let mut session = Session::new(family);
    session.record.state = STATES[random.random_range(0..STATES.len())];
    session.record.flags = random.random::<u32>() & (flags::TIMESTAMPS | flags::SACK | flags::STRIP_ECN);
    for flow in &mut session.record.flows {
        flow.fixed.window_left = random.random_range(0..15);
        flow.fixed.window_right = random.random_range(0..15);
    }
    (session, Direction::BOTH[random.random_range(0..2)])
}

/// A packet with correct checksums and random contents.
fn random_packet(random: &mut StdRng, session: &Session, direction: Direction) -> Packet {
    let mut packet = session.packet(direction);
    let near = |random: &mut StdRng, number: u32| match random.random_range(0..3) {
        0 => number,
        1 => number.wrapping_add(random.random_range(0..200_000)).wrapping_sub(100_000),
        _ => random.random(),
    };
    (packet.seq, packet.ack) = (near(random, packet.seq), near(random, packet.ack));
    (packet.flags, packet.window, packet.traffic_class) = (random.random(), random.random(), random.random());
    packet.payload = vec![random.random(); random.random_range(0..1500)];
    packet.options = match random.random_range(0..5) {
        0 => Vec::new(),
        1 => options::timestamps(random.random(), random.random()),
        2 => options::sack(&[(random.random(), random.random())]),
        3 => {
            [options::timestamps(1, 2), options::sack(&[(random.random(), random.random()), (3, 4)])].concat()
        }
        _ => (0..4 * random.random_range(0..=10)).map(|_| random.random_range(0..12)).collect(),
    };
    packet
}

#[test]
fn any_packet_with_right_checksums_leaves_with_right_checksums() {
    in_namespace(|lab| {
        let mut random = random();
        let mut spliced = 0;
        for _ in 0..PACKETS {
            let (session, direction) = random_session(&mut random);
            let packet = random_packet(&mut random, &session, direction);
            let frame = packet.to_bytes();
            lab.clear();
            lab.open(&session);
            let output =
                lab.run_summed(Hook::Ingress, &Input { frame: frame.clone(), ..Input::default() }).unwrap();
            match output.verdict {
                Verdict::Redirect => {
                    spliced += 1;
                    let left = Packet::parse(&output.frame);
                    let plain = |packet: &Packet| Packet { options: Vec::new(), ..packet.clone() };
                    assert_eq!(plain(&left), session.rewritten(direction, &plain(&packet)));
                    assert_eq!(left.options.len(), packet.options.len());
                }
                Verdict::Pass => assert_eq!(output.frame, frame),
                other => panic!("{other:?}"),
            }
        }
        assert!(spliced > PACKETS / 2, "only {spliced}");
    });
}

#[test]
fn any_frame_is_survived() {
    in_namespace(|lab| {
        let mut random = random();
        for _ in 0..PACKETS {
            let (session, direction) = random_session(&mut random);
            let mut frame = random_packet(&mut random, &session, direction).to_bytes();
            // Most changes are in the headers.
            for _ in 0..random.random_range(1..6) {
                let at = random.random_range(14..frame.len().min(120));
                frame[at] = random.random();
            }
            if random.random_ratio(1, 4) {
                // The kernel accepts no packet that is shorter than its IP header.
                frame.truncate(random.random_range(54..=frame.len()));
            }
            if random.random_ratio(1, 8) {
                random.fill_bytes(&mut frame[14..]);
            }
            lab.clear();
            lab.open(&session);
            for hook in [Hook::Ingress, Hook::Egress] {
                let mark = [0, MARK, COPY_MARK, SYN_MARK][random.random_range(0..4)];
                let input = Input { frame: frame.clone(), mark, ..Input::default() };
                let before = lab.stats();
                let output = lab.run(hook, &input);
                if lab.stats() == before {
                    assert_eq!((output.verdict, output.frame), (Verdict::Pass, frame.clone()));
                }
            }
        }
    });
}

#[test]
fn packets_of_unknown_flows_are_unchanged() {
    in_namespace(|lab| {
        let mut random = random();
        lab.clear();
        let before = lab.stats();
        for _ in 0..PACKETS {
            let (session, direction) = random_session(&mut random);
            let frame = random_packet(&mut random, &session, direction).to_bytes();
            let output = lab.run(Hook::Ingress, &Input { frame: frame.clone(), ..Input::default() });
            assert_eq!((output.verdict, output.frame), (Verdict::Pass, frame));
        }
        assert_eq!(lab.stats(), before);
    });
}
