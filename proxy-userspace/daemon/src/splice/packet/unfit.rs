//! Peers that have sent a packet that the programs could not carry. That packet ended a stream; the
//! next streams of the peer are relayed.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// After this time, streams of the peer are spliced again: its network may have changed.
const REMEMBERED: Duration = Duration::from_secs(60 * 60);
/// At most this many peers are remembered. Each further peer can lose one more stream.
const MOST: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct Unfit(Mutex<HashMap<IpAddr, Instant>>);

impl Unfit {
    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, Instant>> {
        // Nothing panics while the lock is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn note(&self, peer: IpAddr) {
        self.note_at(peer, Instant::now());
    }

    fn note_at(&self, peer: IpAddr, now: Instant) {
        let mut peers = self.lock();
        if peers.len() >= MOST {
            peers.retain(|_, noted| now.duration_since(*noted) < REMEMBERED);
        }
        if peers.len() < MOST || peers.contains_key(&peer) {
            peers.insert(peer, now);
        }
    }

    pub(super) fn has(&self, peer: IpAddr) -> bool {
        self.has_at(peer, Instant::now())
    }

    fn has_at(&self, peer: IpAddr, now: Instant) -> bool {
        self.lock().get(&peer).is_some_and(|noted| now.duration_since(*noted) < REMEMBERED)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn a_peer_is_remembered_for_a_while_and_others_are_not_concerned() {
        let (unfit, now) = (Unfit::default(), Instant::now());
        let peer = IpAddr::from([192, 0, 2, 1]);
        unfit.note_at(peer, now);
        assert!(unfit.has_at(peer, now + REMEMBERED / 2));
        assert!(!unfit.has_at(peer, now + REMEMBERED));
        assert!(!unfit.has_at(IpAddr::from([192, 0, 2, 2]), now));
    }

    #[test]
    fn there_is_room_again_when_the_first_peers_are_forgotten() {
        let (unfit, now) = (Unfit::default(), Instant::now());
        let peer = |number: usize| IpAddr::from(Ipv4Addr::from(number as u32));
        (0..=MOST).for_each(|number| unfit.note_at(peer(number), now));
        assert!(unfit.has_at(peer(MOST - 1), now) && !unfit.has_at(peer(MOST), now));
        unfit.note_at(peer(MOST), now + REMEMBERED);
        assert!(unfit.has_at(peer(MOST), now + REMEMBERED));
        assert_eq!(unfit.lock().len(), 1);
    }
}
