//! Bytes that depend on their stream and on their position in it. So a lost, doubled or moved byte
//! is found where it happens, and no sent byte has to be kept.

use std::sync::LazyLock;

use anyhow::Result;
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

/// A prime number, so that a lost or repeated block does not fit by chance.
const PERIOD: usize = 4_194_301;

static RANDOM: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut bytes = vec![0; PERIOD];
    SmallRng::seed_from_u64(0).fill(&mut bytes[..]);
    bytes
});

/// A position in an endless stream of bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pattern {
    /// The place of position 0 in [`RANDOM`].
    offset: usize,
    position: u64,
}

impl Pattern {
    /// The start of the stream `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        // The remainder fits into usize on any machine.
        Self { offset: (seed % PERIOD as u64) as usize, position: 0 }
    }

    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// The next bytes: at least one, at most `max`. The position does not change.
    pub(crate) fn peek(&self, max: usize) -> &'static [u8] {
        let start = (self.offset + (self.position % PERIOD as u64) as usize) % PERIOD;
        &RANDOM[start..PERIOD.min(start + max)]
    }

    pub(crate) fn advance(&mut self, bytes: usize) {
        self.position += bytes as u64;
    }

    /// Compares `bytes` with the next bytes of the stream, and moves the position after them.
    pub(crate) fn check(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let expected = self.peek(bytes.len());
            let (now, rest) = bytes.split_at(expected.len());
            if now != expected {
                let good = now.iter().zip(expected).take_while(|(a, b)| a == b).count() as u64;
                anyhow::bail!("the byte at {} is wrong", self.position + good);
            }
            self.advance(now.len());
            bytes = rest;
        }
        Ok(())
    }
}

#[test]
fn any_change_of_the_stream_is_found() {
    let whole = |from: u64, len: usize| {
        let mut pattern = Pattern::new(7);
        pattern.position = from;
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let next = pattern.peek(len - bytes.len());
            bytes.extend_from_slice(next);
            pattern.advance(next.len());
        }
        bytes
    };
    // This range crosses the end of the period.
    let (start, len) = (PERIOD as u64 - 5_000, 10_000);
    let good = whole(start, len);
    let check = |bytes: &[u8]| {
        let mut pattern = Pattern::new(7);
        pattern.position = start;
        pattern.check(bytes)
    };
    check(&good).unwrap();
    check(&[&good[..100], &good[101..]].concat()).unwrap_err();
    check(&[&good[..100], &good[99..]].concat()).unwrap_err();
    check(&[&good[..100], &good[200..300], &good[100..200], &good[300..]].concat()).unwrap_err();
    let mut flipped = good.clone();
    flipped[6_000] ^= 1;
    let error = check(&flipped).unwrap_err().to_string();
    assert_eq!(error, format!("the byte at {} is wrong", start + 6_000));
    Pattern::new(8).check(&whole(0, 100)).unwrap_err();
}
