//! Which ports streams may have: sets of port numbers as sorted ranges. Pure.

use std::ops::RangeInclusive;

use rangemap::RangeInclusiveSet;

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
    let given_out: Ranges = set(wanted).intersection(&set(&[local])).collect();
    without(&given_out, reserved)
}

/// `ranges` less everything in `holes`, in order.
pub(super) fn without(ranges: &[RangeInclusive<u16>], holes: &[RangeInclusive<u16>]) -> Ranges {
    let mut left = set(ranges);
    for hole in set(holes) {
        left.remove(hole);
    }
    left.into_iter().collect()
}

/// Whether a port is in both.
pub(super) fn overlap(ours: &[RangeInclusive<u16>], theirs: &[RangeInclusive<u16>]) -> bool {
    set(ours).intersection(&set(theirs)).next().is_some()
}

fn set(ranges: &[RangeInclusive<u16>]) -> RangeInclusiveSet<u16> {
    // The set panics at an empty range, and what another process has noted may be anything.
    ranges.iter().filter(|range| !range.is_empty()).cloned().collect()
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
    use super::*;

    #[test]
    fn the_default_is_what_the_kernel_leaves() {
        assert_eq!(by_default(32768..=60999, &[]), [10240..=32767, 61000..=65535]);
        assert_eq!(by_default(1024..=65535, &[]), []);
        assert_eq!(by_default(1024..=60999, &[61000..=61000, 65535..=65535]), [61001..=65534]);
        assert_eq!(
            by_default(32768..=60999, &[RangeInclusive::new(40000, 30000)]),
            [10240..=32767, 61000..=65535]
        );
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

    #[test]
    fn ranges_overlap_if_they_share_a_port() {
        assert!(overlap(&[1024..=2047, 9000..=9000], &[80..=80, 9000..=9001]));
        assert!(!overlap(&[1024..=2047, 9000..=9000], &[80..=1023, 2048..=8999, 9001..=65535]));
        assert!(!overlap(&[2000..=2047, 2048..=2100], &[]));
    }
}
