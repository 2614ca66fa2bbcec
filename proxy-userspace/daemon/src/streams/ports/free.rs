//! The free ports of one (source address, endpoint) pair. Pure: the time is given.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

const WORDS: usize = (u16::MAX as usize + 1) / 64;
/// A port that was given back is not given out before so many others were given back after it, unless there
/// is no other: the endpoint may still wait for stragglers of its last connection.
const RESTING: usize = 512;
/// How long a port that somebody else uses is left alone.
const ASIDE: Duration = Duration::from_secs(60);

/// 8 KiB, and 1 KiB for the ports that rest.
#[derive(Debug)]
pub(super) struct FreePorts {
    /// One bit for each port number: free and rested.
    rested: Box<[u64; WORDS]>,
    /// Where the search goes on; so a port's turn comes again only after that of all others.
    next: u16,
    /// Given back lately, oldest first.
    resting: VecDeque<u16>,
    /// Used by somebody else, with the time they were found to be; oldest first.
    aside: VecDeque<(Instant, u16)>,
    /// Ports that are rested or resting.
    left: u32,
}

impl FreePorts {
    /// `ranges` must not overlap.
    pub(super) fn new(ranges: &[RangeInclusive<u16>]) -> Self {
        let mut free = Self {
            rested: Box::new([0; WORDS]),
            next: 0,
            resting: VecDeque::new(),
            aside: VecDeque::new(),
            left: 0,
        };
        for port in ranges.iter().cloned().flatten() {
            free.set(port);
            free.left += 1;
        }
        free
    }

    /// How many [`take`](Self::take) can give before it has none.
    pub(super) fn left(&self) -> u32 {
        self.left
    }

    /// A free port, if there is one.
    pub(super) fn take(&mut self, now: Instant) -> Option<u16> {
        while let Some((since, port)) = self.aside.front().copied()
            && now.saturating_duration_since(since) >= ASIDE
        {
            self.aside.pop_front();
            self.give_back(port);
        }
        let port = match self.first_from(self.next) {
            Some(port) => {
                self.clear(port);
                port
            }
            None => self.resting.pop_front()?,
        };
        self.next = port.wrapping_add(1);
        self.left -= 1;
        Some(port)
    }

    /// Takes this very port; `false` if it is not free, or none of those that are given out.
    pub(super) fn take_this(&mut self, port: u16) -> bool {
        let (word, bit) = place(port);
        if self.rested[word] & 1 << bit != 0 {
            self.clear(port);
        } else if let Some(position) = self.resting.iter().position(|resting| *resting == port) {
            self.resting.remove(position);
        } else {
            return false;
        }
        self.left -= 1;
        true
    }

    /// Only for a port that was taken.
    pub(super) fn give_back(&mut self, port: u16) {
        self.left += 1;
        self.resting.push_back(port);
        if self.resting.len() > RESTING
            && let Some(rested) = self.resting.pop_front()
        {
            self.set(rested);
        }
    }

    /// Gives a taken port back, but not before some time has passed.
    pub(super) fn set_aside(&mut self, port: u16, now: Instant) {
        self.aside.push_back((now, port));
        // A user of this port may use the following ones, too: so does a process that this one has taken over from.
        self.next = rand::random();
    }

    /// The first rested port at or after `start`, going round.
    fn first_from(&self, start: u16) -> Option<u16> {
        let (word, bit) = place(start);
        let here = self.rested[word] & (u64::MAX << bit);
        if here != 0 {
            return Some(port(word, here));
        }
        // All others once, and at last what stands before `start` in its own word.
        let other = (1..=WORDS).map(|step| (word + step) % WORDS).find(|&word| self.rested[word] != 0)?;
        Some(port(other, self.rested[other]))
    }

    fn set(&mut self, port: u16) {
        let (word, bit) = place(port);
        self.rested[word] |= 1 << bit;
    }

    fn clear(&mut self, port: u16) {
        let (word, bit) = place(port);
        self.rested[word] &= !(1 << bit);
    }
}

fn place(port: u16) -> (usize, u32) {
    (usize::from(port) / 64, u32::from(port) % 64)
}

/// The port of the lowest bit of a word that has one.
fn port(word: usize, bits: u64) -> u16 {
    // At most 1023 * 64 + 63.
    (word * 64) as u16 + bits.trailing_zeros() as u16
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn taken(free: &mut FreePorts) -> Vec<u16> {
        let now = Instant::now();
        std::iter::from_fn(|| free.take(now)).collect()
    }

    #[test]
    fn every_port_once_and_then_none() {
        let mut free = FreePorts::new(&[1024..=1030, 65000..=65535]);
        let expected: Vec<u16> = (1024..=1030).chain(65000..=65535).collect();
        assert_eq!(free.left(), 543);
        assert_eq!(taken(&mut free), expected);
        assert_eq!(free.left(), 0);
        assert!(taken(&mut FreePorts::new(&[])).is_empty());
    }

    #[test]
    fn with_few_ports_the_one_that_rested_longest_comes_first() {
        let mut free = FreePorts::new(&[2000..=2004]);
        taken(&mut free);
        for port in [2003, 2000, 2004] {
            free.give_back(port);
        }
        assert_eq!(taken(&mut free), [2003, 2000, 2004]);
    }

    #[test]
    fn a_port_that_was_given_back_waits_for_all_the_others() {
        let mut free = FreePorts::new(&[10000..=19999]);
        let now = Instant::now();
        let first = free.take(now).unwrap();
        free.give_back(first);
        for port in 10001..=19999 {
            assert_eq!(free.take(now), Some(port));
        }
        assert_eq!(free.take(now), Some(first));
    }

    #[test]
    fn ports_of_others_are_left_alone_for_a_minute() {
        let mut free = FreePorts::new(&[2000..=2001]);
        let now = Instant::now();
        let port = free.take(now).unwrap();
        free.set_aside(port, now);
        assert_eq!(free.left(), 1);
        assert_eq!(free.take(now), Some(2001));
        assert_eq!(free.take(now + ASIDE / 2), None);
        assert_eq!(free.take(now + ASIDE), Some(port));
    }

    #[test]
    fn a_port_that_is_in_use_already_is_not_given() {
        let mut free = FreePorts::new(&[2000..=2002]);
        assert!(free.take_this(2001) && !free.take_this(2001) && !free.take_this(1999));
        assert_eq!(free.left(), 2);
        assert_eq!(taken(&mut free), [2000, 2002]);
        free.give_back(2001);
        free.give_back(2002);
        assert!(free.take_this(2001) && !free.take_this(2001), "also one that rests");
        assert_eq!(taken(&mut free), [2002]);
    }

    proptest! {
        #[test]
        fn no_port_is_lent_twice_and_none_gets_lost(
            count in 1u16..700,
            steps in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 0..3000),
        ) {
            let mut free = FreePorts::new(&[30000..=30000 + (count - 1)]);
            let now = Instant::now();
            let mut lent = Vec::new();
            // By port: how many had been given back when it was.
            let mut returned_at = HashMap::new();
            let mut returned = 0_usize;
            for (take, which) in steps {
                if take {
                    let left = free.left();
                    let port = free.take(now);
                    prop_assert_eq!(port.is_some(), left > 0);
                    let Some(port) = port else { continue };
                    prop_assert!(!lent.contains(&port));
                    if let Some(at) = returned_at.remove(&port) {
                        let others = returned - at;
                        prop_assert!(
                            others >= RESTING || usize::try_from(left).unwrap() <= RESTING,
                            "{port} rested for {others} only, {left} were left"
                        );
                    }
                    lent.push(port);
                } else if !lent.is_empty() {
                    let port = lent.swap_remove(which.index(lent.len()));
                    free.give_back(port);
                    returned += 1;
                    returned_at.insert(port, returned);
                }
                prop_assert_eq!(usize::try_from(free.left()).unwrap() + lent.len(), usize::from(count));
            }
        }
    }
}
