//! Whole packets, rewritten: right checksums, and nothing lost on the way.

use bytemuck::Zeroable as _;
use proptest::prelude::*;

use crate::flow::{Flow, Record, flags, state};
use crate::packet::checksum;
use crate::packet::copy::HeaderCopy;
use crate::packet::headers::{Ip as _, Ipv4, Ipv6, Tcp, tcp_flags};
use crate::packet::life::Segment;
use crate::packet::options::{SackBlock, SackHead, TimestampsOption, Translation};
use crate::packet::rewrite::Timestamps;
use crate::packet::testing::{Packet, TestIp, forward, inverse, options, packet, record, translate_options};
use crate::shared::Share as _;

/// Rewrites a packet; its checksums must be those of the new one.
fn checksums_follow<I: TestIp>(record: &Record, mut packet: Packet<I>, options: Vec<u8>) {
    packet.options = options;
    packet.seal();
    assert!(packet.is_right(), "the test's own checksums");
    let old = packet.clone();
    forward(record, &mut packet);
    assert!(packet.is_right(), "{old:?} became {packet:?}");

    let fixed = &record.flows[0].fixed;
    assert_eq!(packet.payload, old.payload);
    assert_eq!(packet.tcp.ports, fixed.to_ports);
    assert_eq!(u32::from_be(packet.tcp.seq), u32::from_be(old.tcp.seq).wrapping_add(fixed.seq_delta));
    let [ack, old_ack] = [&packet, &old].map(|packet| u32::from_be(packet.tcp.ack));
    let has_ack = old.tcp.flags & tcp_flags::ACK != 0;
    assert_eq!(ack, if has_ack { old_ack.wrapping_add(fixed.ack_delta) } else { old_ack });
}

/// Rewrites a packet with options that are kept, and back.
fn the_way_back_restores<I: TestIp>(
    mut record: Record,
    mut packet: Packet<I>,
    timestamps: [u8; 8],
    sack: [u8; 16],
) {
    // Another scale loses the low bits of a window.
    for flow in &mut record.flows {
        flow.fixed.window_right = flow.fixed.window_left;
    }
    // And what lies below the floor would come back later.
    let value = u32::from_be_bytes(timestamps[..4].try_into().unwrap());
    let fixed = &mut record.flows[0].fixed;
    fixed.ts_floor = value.wrapping_add(fixed.ts_shift);
    packet.options = [&[1, 1, 8, 10][..], &timestamps, &[1, 1, 5, 18], &sack].concat();
    packet.seal();
    let old = packet.clone();
    forward(&record, &mut packet);
    forward(&inverse(&record, &old), &mut packet);
    assert_eq!(packet, old);
}

proptest! {
    #[test]
    fn checksums_follow_v4(record in record(), strip: bool, packet in packet::<Ipv4>(), options in options()) {
        let ecn = if strip { flags::STRIP_ECN } else { 0 };
        checksums_follow(&Record { flags: record.flags | ecn, ..record }, packet, options);
    }

    #[test]
    fn checksums_follow_v6(record in record(), strip: bool, packet in packet::<Ipv6>(), options in options()) {
        let ecn = if strip { flags::STRIP_ECN } else { 0 };
        checksums_follow(&Record { flags: record.flags | ecn, ..record }, packet, options);
    }

    #[test]
    fn the_way_back_restores_v4(record in record(), packet in packet::<Ipv4>(), ts: [u8; 8], sack: [u8; 16]) {
        the_way_back_restores(record, packet, ts, sack);
    }

    #[test]
    fn the_way_back_restores_v6(record in record(), packet in packet::<Ipv6>(), ts: [u8; 8], sack: [u8; 16]) {
        the_way_back_restores(record, packet, ts, sack);
    }

    /// The walk over unusual options does the same as the fixed places.
    #[test]
    fn both_ways_through_usual_options_agree(record in record(), value: u32, echo: u32, left: u32, right: u32) {
        let [flow, other] = record.flows.to_shared();
        let to = Translation::of(record.flags, &flow, &other);
        let mut timestamps = TimestampsOption { head: TimestampsOption::HEAD, value, echo };
        let head = SackHead(u32::from_ne_bytes([1, 1, 5, 10]));
        prop_assert_eq!(head.blocks(12), 1);
        let mut block = SackBlock { left, right };
        let mut walked =
            [bytemuck::bytes_of(&timestamps), bytemuck::bytes_of(&head), bytemuck::bytes_of(&block)].concat();

        let (mut change, old_value) = timestamps.translate(&to.timestamps);
        change.add(block.translate(to.ack_delta));
        prop_assert_eq!(old_value, u32::from_be(value));
        let (walked_change, blanked) = translate_options(&mut walked, &to);
        let fixed =
            [bytemuck::bytes_of(&timestamps), bytemuck::bytes_of(&head), bytemuck::bytes_of(&block)].concat();
        prop_assert_eq!(walked, fixed);
        prop_assert_eq!(change.apply(0x1234), walked_change.apply(0x1234));
        prop_assert!(!blanked);
    }

    /// No options whatever make the walk fail, and none of a connection's numbers get through as
    /// they are.
    #[test]
    fn any_bytes_can_be_options(record in record(), mut bytes in prop::collection::vec(any::<u8>(), 0..=40)) {
        let untranslated = Record { flags: 0, ..record };
        let [flow, other] = record.flows.to_shared();
        let to = Translation::of(untranslated.flags, &flow, &other);
        translate_options(&mut bytes, &to);
        let once = bytes.clone();
        let (_, blanked) = translate_options(&mut bytes, &to);
        prop_assert!(!blanked && bytes == once, "all that is left is harmless");
    }

    #[test]
    fn a_trimmed_copy_is_a_right_acknowledgement(
        packet in packet::<Ipv4>(), words in 0..=10_usize, rcv_nxt: u32, own_end: u32, options: [u8; 40],
    ) {
        let mut packet = Packet { options: options[..4 * words].to_vec(), ..packet };
        packet.seal();
        let mut copy = HeaderCopy([0; 15]);
        let segment = packet.segment();
        let len = Tcp::LEN + packet.options.len();
        bytemuck::bytes_of_mut(&mut copy)[..len].copy_from_slice(&segment[..len]);

        packet.payload.clear();
        packet.ip.set_segment_len(len as u16);
        copy.trim(rcv_nxt, own_end, packet.ip.pseudo_sum(len as u16));
        packet.tcp = bytemuck::pod_read_unaligned(&bytemuck::bytes_of(&copy)[..Tcp::LEN]);
        packet.options = bytemuck::bytes_of(&copy)[Tcp::LEN..len].to_vec();
        prop_assert!(packet.is_right());
        let segment = Segment::new(&packet.tcp, len as u32).unwrap();
        prop_assert_eq!((segment.seq, segment.payload, segment.flags), (rcv_nxt, 0, tcp_flags::ACK));
        prop_assert!(own_end.wrapping_sub(segment.ack) as i32 >= 0);
    }

    #[test]
    fn a_sum_may_be_changed_word_by_word(words in prop::collection::vec(any::<(u32, u32)>(), 1..20)) {
        let sum = |sums: Vec<u32>| checksum::finish(sums.into_iter().map(u64::from).sum());
        let (old, new): (Vec<u32>, Vec<u32>) = words.iter().copied().unzip();
        let mut change = checksum::Difference::default();
        words.iter().for_each(|(old, new)| change.replace(*old, *new));
        let (changed, full) = (change.apply(sum(old)), sum(new));
        // The two zeroes of ones-complement are the same number.
        prop_assert!(changed == full || changed.min(full) == 0 && changed.max(full) == 0xffff);
    }
}

/// The first packet gets the floor, and none goes below, though it was sent before; what was sent
/// later keeps its distance.
#[test]
fn timestamps_never_go_below_the_floor() {
    for (floor, sent) in [(1000, 50), (u32::MAX - 3, 9), (5, u32::MAX - 1), (7, 7)] {
        let [flow, other] = [Flow::zeroed(); 2].to_shared();
        flow.fixed.ts_floor.set(floor);
        let mut to = Timestamps::of(&flow, &other);
        assert_eq!((to.value(sent), Timestamps::newest(&flow)), (floor, floor), "nothing is known");
        let unknown = to;
        to.settle(&flow, sent, || state::HAND_OVER);
        assert!(!to.is_known());
        to.settle(&flow, sent, || state::SPLICED);
        let first = to.value(sent);
        // A difference of zero would be none.
        assert!(first.wrapping_sub(floor) <= 1 && to.is_known());
        // Another CPU found nothing known, either, but is too late.
        let mut late = unknown;
        late.settle(&flow, sent.wrapping_add(9), || state::SPLICED);
        let to = Timestamps::of(&flow, &other);
        assert_eq!(to.value(sent.wrapping_sub(100)), floor);
        assert_eq!(to.value(sent.wrapping_add(9)), first.wrapping_add(9));
        // They come round after so many ticks.
        assert_eq!(to.value(sent.wrapping_add(1 << 31)), first.wrapping_add(1 << 31));

        for (value, newest) in
            [(sent.wrapping_add(9), 9), (sent.wrapping_add(3), 9), (sent.wrapping_add(20), 20)]
        {
            Timestamps::note(&flow, value);
            assert_eq!(Timestamps::newest(&flow), first.wrapping_add(newest));
        }
        assert_eq!(Timestamps::of(&other, &flow).echo(first.wrapping_add(9)), sent.wrapping_add(9));
        assert_eq!(to.echo(77), 0);
    }
}
