//! Finds the offer of timestamps in a SYN that arrives. Clients write their options in any order:
//!
//! - Linux, Android: MSS, SACK permitted, timestamps, NOP, window scale
//! - macOS, iOS: MSS, NOP, window scale, NOP, NOP, timestamps, SACK permitted, END
//! - Windows, if timestamps are switched on: MSS, NOP, window scale, SACK permitted, timestamps
//! - FreeBSD: MSS, NOP, window scale, SACK permitted, timestamps
//!
//! The walk has no branch that depends on the packet. So every verifier follows it once, from byte
//! to byte, and not once for each order of options.

use core::hint::black_box;

use crate::packet::checksum::Difference;
use crate::packet::headers::{Tcp, tcp_flags};
use crate::packet::options::{MAX_LEN, kind};

/// Bytes of the option: kind, length, TSval, TSecr.
pub const OFFER_LEN: usize = 10;

/// What stands instead of an offer.
pub const NOPS: [u8; OFFER_LEN] = [kind::NOP; OFFER_LEN];

/// Whether a segment opens a connection, and its options have room for an offer.
#[inline(always)]
pub const fn may_offer(tcp: &Tcp) -> bool {
    const OTHERS: u8 = tcp_flags::ACK | tcp_flags::RST | tcp_flags::FIN;
    tcp.flags & (tcp_flags::SYN | OTHERS) == tcp_flags::SYN
        && tcp.header_len() >= (Tcp::LEN + OFFER_LEN) as u32
}

/// Where the first offer stands in `options`, of which `len` bytes are options and the others zero.
///
/// The walk goes from option to option, as tcp_parse_options of Linux does, and ends where that
/// function ends: at END, and at a length that is impossible.
#[inline(always)]
pub fn find(options: &[u8; MAX_LEN], len: u32) -> Option<u32> {
    const LAST: u64 = MAX_LEN as u64 - 1;
    // Bit `i`: an option begins at byte `i`.
    let mut begins = 1_u64;
    // One more than the place of the offer.
    let mut found = 0_u64;
    for i in 0..MAX_LEN - 1 {
        let (kind, len) = (u64::from(options[i]), u64::from(options[i + 1]));
        let here = begins >> i & 1;
        let (is_end, is_nop) = (is(kind, kind::END), is(kind, kind::NOP));
        let is_offer = here & is(kind, kind::TIMESTAMPS) & is(len, OFFER_LEN as u8);
        found |= (is_offer & is(found, 0)) * (i as u64 + 1);
        // A NOP has one byte.
        let size = len ^ (len ^ 1) & is_nop.wrapping_neg();
        let has_next = (is_end | is_below(len, 2) & (is_nop ^ 1) | is_below(LAST - i as u64, size)) ^ 1;
        begins |= (here & has_next).wrapping_shl(i as u32 + size as u32);
    }
    let end = found + OFFER_LEN as u64 - 1;
    (found != 0 && end <= u64::from(len)).then(|| found as u32 - 1)
}

/// 1 if the numbers, which are below 2^63, are equal; else 0.
#[inline(always)]
fn is(number: u64, other: u8) -> u64 {
    // Without `black_box`, LLVM makes a comparison and a jump of it.
    black_box((number ^ u64::from(other)).wrapping_sub(1)) >> 63
}

/// 1 if `number` is below `limit`, both below 2^63; else 0.
#[inline(always)]
fn is_below(number: u64, limit: u64) -> u64 {
    black_box(number.wrapping_sub(limit)) >> 63
}

/// The change of the checksum when [`NOPS`] replace `offer`, which stands at byte `place` of the
/// options.
#[inline(always)]
pub fn change(offer: &[u8; OFFER_LEN], place: u32) -> Difference {
    let mut change = Difference::default();
    for i in (0..OFFER_LEN).step_by(2) {
        let old = u16::from_ne_bytes([offer[i], offer[i + 1]]);
        change.replace(old.into(), u16::from_ne_bytes([kind::NOP; 2]).into());
    }
    if place & 1 == 0 { change } else { change.at_odd_place() }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;
    use proptest::prelude::*;

    use super::*;

    const OFFER: [u8; OFFER_LEN] = [8, 10, 0x11, 0x22, 0x33, 0x44, 0, 0, 0, 0];

    fn found(options: &[u8]) -> Option<u32> {
        let mut bytes = [0; MAX_LEN];
        bytes[..options.len()].copy_from_slice(options);
        find(&bytes, options.len() as u32)
    }

    /// The same, option by option.
    fn slow(options: &[u8]) -> Option<u32> {
        let mut at = 0;
        while at < options.len() {
            let size = match options[at] {
                kind::END => return None,
                kind::NOP => 1,
                _ => usize::from(*options.get(at + 1)?),
            };
            if size == 0 || options[at] != kind::NOP && size < 2 || at + size > options.len() {
                return None;
            }
            if options[at] == kind::TIMESTAMPS && size == OFFER_LEN {
                return Some(at as u32);
            }
            at += size;
        }
        None
    }

    #[test]
    fn the_offer_is_found_in_the_order_of_every_system() {
        let cases: [(&[&[u8]], u32); 6] = [
            (&[&[2, 4, 5, 180], &[4, 2], &OFFER, &[1, 3, 3, 7]], 6),
            (&[&[2, 4, 5, 180], &[1, 3, 3, 6], &[1, 1], &OFFER, &[4, 2, 0, 0]], 10),
            (&[&[2, 4, 5, 180], &[1, 3, 3, 8], &[4, 2], &OFFER], 10),
            (&[&OFFER, &[1, 1]], 0),
            (&[&[1], &OFFER, &[1]], 1),
            (&[&[34, 10, 1, 2, 3, 4, 5, 6, 7, 8], &[1; 20], &OFFER], 30),
        ];
        for (options, place) in cases {
            assert_eq!(found(&options.concat()), Some(place), "{options:?}");
        }
    }

    #[test]
    fn what_is_no_offer_is_not_found() {
        let cases: [&[&[u8]]; 8] = [
            &[&[2, 4, 5, 180], &[1, 3, 3, 7]],
            &[&[0], &OFFER],
            &[&[2, 0], &OFFER],
            &[&[2, 1], &OFFER],
            &[&[2, 255], &OFFER],
            // In the body of another option.
            &[&[254, 12], &OFFER],
            &[&[8, 9], &OFFER[2..9]],
            &[&[1, 1], &OFFER[..8]],
        ];
        for options in cases {
            assert_eq!(found(&options.concat()), None, "{options:?}");
        }
    }

    #[test]
    fn only_a_syn_with_room_for_an_offer_may_have_one() {
        let tcp = |flags, words: u8| Tcp { flags, offset: words << 4, ..Tcp::zeroed() };
        assert!(may_offer(&tcp(tcp_flags::SYN, 8)));
        assert!(may_offer(&tcp(tcp_flags::SYN | tcp_flags::ECE | tcp_flags::CWR, 10)));
        assert!(!may_offer(&tcp(tcp_flags::SYN, 7)));
        for flags in [0, tcp_flags::ACK, tcp_flags::SYN | tcp_flags::ACK, tcp_flags::SYN | tcp_flags::RST] {
            assert!(!may_offer(&tcp(flags, 10)), "{flags:#x}");
        }
    }

    fn pieces() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            4 => Just(OFFER.to_vec()),
            4 => Just(vec![kind::NOP]),
            2 => Just(vec![2, 4, 5, 180]),
            2 => Just(vec![4, 2]),
            2 => Just(vec![3, 3, 7]),
            1 => Just(vec![kind::END]),
            2 => proptest::collection::vec(any::<u8>(), 1..12),
        ];
        proptest::collection::vec(piece, 0..12).prop_map(|pieces| {
            let mut all = pieces.concat();
            all.truncate(MAX_LEN);
            all
        })
    }

    proptest! {
        #[test]
        fn the_walk_finds_what_a_slow_one_finds(options in pieces()) {
            prop_assert_eq!(found(&options), slow(&options));
        }

        #[test]
        fn the_checksum_is_right_at_every_place(
            options in proptest::array::uniform32(any::<u8>()), place in 0_usize..=22,
        ) {
            let mut plain = options;
            plain[place..place + OFFER_LEN].copy_from_slice(&NOPS);
            let offer = options[place..place + OFFER_LEN].first_chunk().unwrap();
            let field = |bytes| u16::from_ne_bytes(crate::packet::testing::sum(bytes).to_be_bytes());
            let changed = change(offer, place as u32).apply(field(&options));
            // Zero has two forms.
            prop_assert_eq!(changed % 0xffff, field(&plain) % 0xffff);
        }
    }
}
