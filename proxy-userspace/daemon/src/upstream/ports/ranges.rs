//! Which ports streams may have: sets of port numbers as sorted ranges. Pure.

use std::ops::RangeInclusive;

/// Ports below are services' by custom, whatever the kernel gives out.
const FIRST: u16 = 10240;

pub(super) type Ranges = Vec<RangeInclusive<u16>>;

/// What the kernel gives nobody by itself: not of its own range, nor reserved for somebody.
pub(super) fn by_default(local: RangeInclusive<u16>, reserved: &[RangeInclusive<u16>]) -> Ranges {
    without(&without(&[FIRST..=u16::MAX], &[local]), reserved)
}

/// What of `wanted` the kernel gives to connections and `bind(0)`, unless it is reserved.
pub(super) fn given_out(
    wanted: &[RangeInclusive<u16>],
    local: RangeInclusive<u16>,
    reserved: &[RangeInclusive<u16>],
) -> Ranges {
    let outside = without(wanted, &[local]);
    without(&without(wanted, &outside), reserved)
}

/// `ranges` less everything in `holes`.
pub(super) fn without(ranges: &[RangeInclusive<u16>], holes: &[RangeInclusive<u16>]) -> Ranges {
    let mut left = ranges.to_vec();
    for hole in holes {
        let split = |range: RangeInclusive<u16>| {
            let below = *range.start()..=(*range.end()).min(hole.start().saturating_sub(1));
            let above = (*range.start()).max(hole.end().saturating_add(1))..=*range.end();
            // At either end of the numbers nothing lies beyond the hole.
            let below = (*hole.start() > 0).then_some(below);
            let above = (*hole.end() < u16::MAX).then_some(above);
            [below, above].into_iter().flatten().filter(|range| !range.is_empty())
        };
        left = left.into_iter().flat_map(split).collect();
    }
    left
}

/// As the kernel reads and writes them: `10240-32767,61000`.
pub(super) fn text(ranges: &[RangeInclusive<u16>]) -> String {
    let range = |range: &RangeInclusive<u16>| match (range.start(), range.end()) {
        (first, last) if first == last => first.to_string(),
        (first, last) => format!("{first}-{last}"),
    };
    ranges.iter().map(range).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_default_is_what_the_kernel_leaves() {
        assert_eq!(by_default(32768..=60999, &[]), [10240..=32767, 61000..=65535]);
        assert_eq!(by_default(1024..=65535, &[]), []);
        assert_eq!(by_default(1024..=60999, &[61000..=61000, 65535..=65535]), [61001..=65534]);
        assert_eq!(by_default(32768..=60999, &[30000..=32767]), [10240..=29999, 61000..=65535]);
    }

    #[test]
    fn only_what_the_kernel_gives_out_must_be_reserved() {
        assert_eq!(given_out(&[10240..=32767], 32768..=60999, &[]), []);
        assert_eq!(given_out(&[30000..=40000], 32768..=60999, &[]), [32768..=40000]);
        assert_eq!(given_out(&[30000..=40000], 32768..=60999, &[32000..=35000]), [35001..=40000]);
        assert_eq!(given_out(&[40000..=40009], 32768..=60999, &[40000..=40009]), []);
    }

    #[test]
    fn ranges_are_written_as_the_kernel_does() {
        assert_eq!(text(&[1024..=2047, 9000..=9000]), "1024-2047,9000");
    }

    fn ranges() -> impl Strategy<Value = Ranges> {
        let range = (any::<u16>(), any::<u16>()).prop_map(|(a, b)| a.min(b)..=a.max(b));
        prop_oneof![
            prop::collection::vec(range, 0..4),
            prop::collection::vec((0u16..40).prop_map(|port| port..=port + 3), 0..6),
        ]
    }

    proptest! {
        #[test]
        fn without_is_set_difference(ranges in ranges(), holes in ranges()) {
            let set = |ranges: &Ranges| ranges.iter().cloned().flatten().collect::<BTreeSet<u16>>();
            let difference: BTreeSet<_> = set(&ranges).difference(&set(&holes)).copied().collect();
            prop_assert_eq!(set(&without(&ranges, &holes)), difference);
        }
    }
}
