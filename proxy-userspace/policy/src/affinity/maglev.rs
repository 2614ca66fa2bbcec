//! Envoy's `maglev`: a table of fixed prime size whose slots the endpoints take in turns.

use xxhash_rust::xxh64::xxh64;

use super::{Member, Shares, shares};

#[derive(Debug)]
pub struct Maglev {
    /// The member index of each slot. A single member has one slot, which is enough.
    slots: Box<[u32]>,
}

/// A member during the filling of the table.
struct Candidate {
    index: u32,
    /// The next slot of its permutation.
    slot: u64,
    skip: u64,
    share: f64,
    /// The member takes a slot in each round in which round · share reaches this number.
    target: f64,
}

const EMPTY: u32 = u32::MAX;

impl Maglev {
    /// `table_size` is prime, so at least 2, and at most
    /// [`LbPolicy::MAXIMUM_TABLE_SIZE`](crate::config::LbPolicy::MAXIMUM_TABLE_SIZE).
    pub fn new(members: &[Member<'_>], table_size: u64) -> Self {
        match members {
            [] => Self { slots: Box::default() },
            [only] => Self { slots: Box::new([only.index]) },
            _ => Self { slots: fill(members, table_size.max(2)) },
        }
    }

    /// The index of the member that `hash` belongs to; `None` if there is no member.
    pub fn pick(&self, hash: u64) -> Option<u32> {
        let slot = hash.checked_rem(self.slots.len() as u64)?;
        #[expect(clippy::cast_possible_truncation, reason = "less than the length of a slice")]
        Some(self.slots[slot as usize])
    }

    pub fn slots(&self) -> &[u32] {
        &self.slots
    }
}

fn fill(members: &[Member<'_>], size: u64) -> Box<[u32]> {
    let Shares { each, greatest, .. } = shares(members.iter().map(|member| member.weight));
    let mut order: Vec<_> = members.iter().zip(each).collect();
    // Envoy fills in the order of keys, not in cluster order; members with equal keys stay in
    // cluster order.
    order.sort_by_key(|(member, _)| member.key);
    let mut candidates: Vec<_> = order
        .into_iter()
        .map(|(member, share)| Candidate {
            index: member.index,
            slot: xxh64(member.key, 0) % size,
            skip: xxh64(member.key, 1) % (size - 1) + 1,
            share,
            target: 0.0,
        })
        .collect();

    #[expect(clippy::cast_possible_truncation, reason = "at most 5,000,011, checked by config")]
    let mut slots = vec![EMPTY; size as usize];
    let mut left = slots.len();
    let mut round = 0.0;
    while left > 0 {
        round += 1.0;
        for candidate in &mut candidates {
            if round * candidate.share < candidate.target {
                continue;
            }
            candidate.target += greatest;
            take(candidate, &mut slots, size);
            left -= 1;
            if left == 0 {
                break;
            }
        }
    }
    slots.into()
}

/// Gives the candidate the next free slot of its permutation. There is a free slot, and the
/// permutation reaches it: the size is prime, so the permutation visits every slot.
fn take(candidate: &mut Candidate, slots: &mut [u32], size: u64) {
    loop {
        #[expect(clippy::cast_possible_truncation, reason = "less than the length of a slice")]
        let slot = &mut slots[candidate.slot as usize];
        candidate.slot = (candidate.slot + candidate.skip) % size;
        if *slot == EMPTY {
            *slot = candidate.index;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(keys: &[&'static str]) -> Vec<Member<'static>> {
        keys.iter().zip(0..).map(|(key, index)| Member { index, key: key.as_bytes(), weight: 1 }).collect()
    }

    #[test]
    fn every_slot_is_taken_and_evenly() {
        let table = Maglev::new(&members(&["a", "b", "c"]), 251);
        assert_eq!(table.slots().len(), 251);
        for index in 0..3 {
            let count = table.slots().iter().filter(|&&owner| owner == index).count();
            assert!((83..=84).contains(&count), "{count}");
        }
        for hash in [0, 1, 250, 251, u64::MAX] {
            let slot = usize::try_from(hash % 251).unwrap();
            assert_eq!(table.pick(hash), Some(table.slots()[slot]));
        }
    }

    #[test]
    fn slots_follow_weights() {
        let mut weighted = members(&["a", "b"]);
        weighted[1].weight = 3;
        let table = Maglev::new(&weighted, 1009);
        let heavy = table.slots().iter().filter(|&&owner| owner == 1).count();
        assert!((750..=760).contains(&heavy), "{heavy}");
    }

    #[test]
    fn order_of_the_cluster_does_not_matter() {
        let forward = Maglev::new(&members(&["a", "b", "c"]), 251);
        let backward = Maglev::new(&members(&["c", "b", "a"]), 251);
        let mirrored: Vec<u32> = backward.slots().iter().map(|owner| 2 - owner).collect();
        assert_eq!(forward.slots(), mirrored);
    }

    #[test]
    fn one_member_needs_no_table_and_none_picks_nothing() {
        assert_eq!(Maglev::new(&members(&["a"]), 65537).pick(12345), Some(0));
        assert_eq!(Maglev::new(&[], 65537).pick(12345), None);
    }

    #[test]
    fn more_members_than_slots() {
        let table = Maglev::new(&members(&["a", "b", "c"]), 2);
        assert_eq!(table.slots().len(), 2);
        assert_ne!(table.slots()[0], table.slots()[1]);
    }
}
