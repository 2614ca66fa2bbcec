//! What both peers of a stream do. It is derived from one number that the client sends in the
//! request.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::pattern::Pattern;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// Both peers send everything and end with a FIN.
    Whole,
    /// One peer resets the connection in the middle.
    Abort,
}

/// The plan of a stream. All of it follows from `seed` and `kind`.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) client: Side,
    pub(crate) backend: Side,
    /// How many bytes the client sends before it has seen the 101 ...
    pub(crate) early: usize,
    /// ... and whether they are in the same write as the request.
    pub(crate) early_with_request: bool,
    /// How many bytes the backend sends in the same write as the 101.
    pub(crate) with_101: usize,
    pub(crate) delay_101: Duration,
}

/// The plan of one peer.
#[derive(Debug)]
pub(crate) struct Side {
    pub(crate) sends: Pattern,
    pub(crate) send_bytes: u64,
    pub(crate) expects: Pattern,
    pub(crate) expect_bytes: u64,
    /// How many bytes are written at a time.
    pub(crate) piece: usize,
    pub(crate) write_pause: Duration,
    /// How many bytes are read at a time.
    pub(crate) chunk: usize,
    /// A pause after each sixteenth read.
    pub(crate) read_pause: Duration,
    /// A pause once, after half of the bytes.
    pub(crate) read_stop: Duration,
    /// Sends the second half of its bytes, and its FIN, only after the other peer's FIN.
    pub(crate) waits_for_fin: bool,
    pub(crate) abort: Abort,
    /// The seed of random choices during the stream.
    pub(crate) seed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Abort {
    Nobody,
    /// Sends half of its bytes and resets the connection when it has received this many bytes.
    Us {
        after: u64,
    },
    Them,
}

impl Plan {
    pub(crate) fn new(seed: u64, kind: Kind) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let rng = &mut rng;
        let (to_backend, to_client) = (size(rng), size(rng));
        let mut client = Side::new(rng, [!seed, seed], [to_backend, to_client]);
        let mut backend = Side::new(rng, [seed, !seed], [to_client, to_backend]);
        match rng.random_range(0..3) {
            0 => client.waits_for_fin = true,
            1 => backend.waits_for_fin = true,
            _ => {}
        }
        let early = part(rng, 40_000, client.send_bytes);
        let with_101 = part(rng, 8_000, backend.send_bytes);
        if kind == Kind::Abort {
            (client.waits_for_fin, backend.waits_for_fin) = (false, false);
            // A reset before the upgrade is complete would be a failed request, not a stream. So
            // the client resets only after it has seen the 101, and the backend only after it has
            // received bytes that follow the request.
            if rng.random() || client.send_bytes == early as u64 {
                (client.abort, backend.abort) = (Abort::Us { after: 0 }, Abort::Them);
            } else {
                (client.abort, backend.abort) = (Abort::Them, Abort::Us { after: early as u64 + 1 });
            }
        }
        Self {
            client,
            backend,
            early,
            early_with_request: rng.random(),
            with_101,
            delay_101: Duration::from_millis(some(rng, 0..20)),
        }
    }
}

impl Side {
    fn new(rng: &mut SmallRng, patterns: [u64; 2], bytes: [u64; 2]) -> Self {
        let slow = rng.random_ratio(1, 4);
        Self {
            sends: Pattern::new(patterns[0]),
            send_bytes: bytes[0],
            expects: Pattern::new(patterns[1]),
            expect_bytes: bytes[1],
            // At most twenty pieces, so that there are few pauses.
            piece: rng.random_range(bytes[0] as usize / 20..=bytes[0] as usize).max(1),
            write_pause: Duration::from_millis(some(rng, 1..5)),
            chunk: if slow { rng.random_range(512..8_192) } else { 65_536 },
            read_pause: Duration::from_millis(if slow { rng.random_range(1..4) } else { 0 }),
            read_stop: Duration::from_millis(if slow { some(rng, 50..800) } else { 0 }),
            waits_for_fin: false,
            abort: Abort::Nobody,
            seed: rng.random(),
        }
    }
}

/// 0 to 1.5 MB, and often only a few bytes.
fn size(rng: &mut SmallRng) -> u64 {
    match rng.random_range(0..8) {
        0 => 0,
        1 => rng.random_range(1..200),
        2 => rng.random_range(1..70_000),
        _ => rng.random_range(1..1_500_000),
    }
}

/// Nothing, a few bytes, or up to `max` bytes. Never more than `of`.
fn part(rng: &mut SmallRng, max: u64, of: u64) -> usize {
    let wanted = match rng.random_range(0..3) {
        0 => 0,
        1 => rng.random_range(1..100),
        _ => rng.random_range(1..max),
    };
    wanted.min(of) as usize
}

/// A value of `range`, but 0 in half of the cases.
fn some(rng: &mut SmallRng, range: std::ops::Range<u64>) -> u64 {
    if rng.random() { rng.random_range(range) } else { 0 }
}
