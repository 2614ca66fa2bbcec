//! Envoy's `ring_hash`: each endpoint owns points on a ring of 64-bit hashes, and a request belongs
//! to the first point at or after its own hash.

use super::murmur::murmur2;
use super::{Member, Shares, shares, xxh64};
use crate::config::HashFunction;

/// Immutable; two flat arrays, so that a lookup touches hashes only.
#[derive(Debug)]
pub struct Ring {
    /// Ascending.
    hashes: Box<[u64]>,
    /// The member index that owns the point of the same position.
    owners: Box<[u32]>,
    sizes: Sizes,
}

/// What Envoy reports as the gauges `size`, `min_hashes_per_host` and `max_hashes_per_host`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    /// The intended size. The ring can have a few points more.
    pub size: u64,
    pub min_per_member: u64,
    pub max_per_member: u64,
}

impl Ring {
    /// `members` in cluster order. The points depend on that order where sizes are cut off.
    pub fn new(
        members: &[Member<'_>],
        hash_function: HashFunction,
        minimum_size: u64,
        maximum_size: u64,
    ) -> Self {
        let hash = match hash_function {
            HashFunction::XxHash => xxh64,
            HashFunction::MurmurHash2 => murmur2,
        };
        let Shares { each, least, .. } = shares(members.iter().map(|member| member.weight));
        let scale = scale(least, minimum_size, maximum_size);
        let mut sizes = Sizes { size: whole(scale.ceil()), ..Sizes::default() };
        sizes.min_per_member = sizes.size;

        // Both sums run over all members without a reset: a fraction that one member leaves over
        // counts for the next.
        let (mut current, mut target) = (0.0, 0.0);
        let mut points = Vec::new();
        let mut key = Vec::new();
        for (member, share) in members.iter().zip(each) {
            target += scale * share;
            key.clear();
            key.extend_from_slice(member.key);
            key.push(b'_');
            let prefix = key.len();
            let mut count = 0_u64;
            while current < target {
                key.truncate(prefix);
                key.extend_from_slice(count.to_string().as_bytes());
                points.push((hash(&key), member.index));
                count += 1;
                current += 1.0;
            }
            sizes.min_per_member = sizes.min_per_member.min(count);
            sizes.max_per_member = sizes.max_per_member.max(count);
        }
        // Stable: among equal hashes, the first in cluster order is found.
        points.sort_by_key(|&(hash, _)| hash);
        let (hashes, owners): (Vec<_>, Vec<_>) = points.into_iter().unzip();
        Self { hashes: hashes.into(), owners: owners.into(), sizes }
    }

    /// The index of the member that `hash` belongs to; `None` if the ring is empty.
    pub fn pick(&self, hash: u64) -> Option<u32> {
        let point = self.hashes.partition_point(|&point| point < hash);
        self.owners.get(point).or_else(|| self.owners.first()).copied()
    }

    /// The points in ascending order, with the index of the member that owns each.
    pub fn points(&self) -> impl ExactSizeIterator<Item = (u64, u32)> + '_ {
        self.hashes.iter().copied().zip(self.owners.iter().copied())
    }

    pub fn sizes(&self) -> Sizes {
        self.sizes
    }
}

/// How many points a share of 1 has. The number gives the least share a whole number of points, and
/// the ring at least `minimum` points but never more than `maximum`.
fn scale(least_share: f64, minimum: u64, maximum: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "ring sizes are at most 2^23, checked by config")]
    let (minimum, maximum) = (minimum as f64, maximum as f64);
    ((least_share * minimum).ceil() / least_share).min(maximum)
}

fn whole(size: f64) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a ring size: 0 to 2^23, without a fraction"
    )]
    {
        size as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(weights: &[u32], minimum: u64, maximum: u64) -> Ring {
        let keys: Vec<String> = (0..weights.len()).map(|i| format!("10.0.0.{i}:80")).collect();
        let members: Vec<_> = weights
            .iter()
            .zip(&keys)
            .zip(0..)
            .map(|((&weight, key), index)| Member { index, key: key.as_bytes(), weight })
            .collect();
        Ring::new(&members, HashFunction::XxHash, minimum, maximum)
    }

    #[test]
    fn digest_of_two_endpoints_is_envoys() {
        let members = [
            Member { index: 0, key: b"10.10.62.120:3000", weight: 1 },
            Member { index: 1, key: b"10.10.62.121:3000", weight: 1 },
        ];
        let ring = Ring::new(&members, HashFunction::XxHash, 1024, 8 << 20);
        let mut bytes = Vec::new();
        for (hash, owner) in ring.points() {
            bytes.extend_from_slice(&hash.to_le_bytes());
            bytes.extend_from_slice(&u16::try_from(owner).unwrap().to_le_bytes());
        }
        assert_eq!(ring.points().len(), 1024);
        assert_eq!(xxh64(&bytes), 0x95f8_2266_89de_e91f);
    }

    #[test]
    fn a_hash_belongs_to_the_point_at_or_after_it() {
        let ring = ring(&[1, 1, 1], 16, 1024);
        let points: Vec<_> = ring.points().collect();
        for pair in points.windows(2) {
            let [(before, owner_before), (after, owner_after)] = pair.try_into().unwrap();
            assert_eq!(ring.pick(before), Some(owner_before), "a hash that is a point");
            assert_eq!(ring.pick(before + 1), Some(owner_after));
            assert_eq!(ring.pick(after - 1), Some(owner_after));
        }
        let (first, last) = (points[0], points[points.len() - 1]);
        assert_eq!(ring.pick(0), Some(first.1));
        assert_eq!(ring.pick(last.0 + 1), Some(first.1), "past the end comes the first");
        assert_eq!(ring.pick(u64::MAX), Some(first.1));
    }

    #[test]
    fn sizes_follow_weights_and_limits() {
        assert_eq!(ring(&[1], 1024, 8 << 20).points().len(), 1024);
        assert_eq!(ring(&[1, 1, 1], 1024, 8 << 20).points().len(), 1026, "342 each");
        assert_eq!(ring(&[1, 1000], 1024, 8 << 20).points().len(), 2002);
        assert_eq!(ring(&[1; 5], 2, 2).points().len(), 2, "fewer points than endpoints");
        let uneven = ring(&[1; 75], 1024, 8 << 20).sizes();
        assert_eq!((uneven.min_per_member, uneven.max_per_member), (14, 15), "rounding of doubles");
    }

    #[test]
    fn empty_rings_pick_nothing() {
        assert_eq!(ring(&[], 1024, 8 << 20).pick(7), None);
        assert_eq!(ring(&[1, 1], 0, 8 << 20).pick(7), None, "minimum 0 makes no points");
    }
}
