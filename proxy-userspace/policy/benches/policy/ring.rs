//! From a key hash to an endpoint.

use divan::{Bencher, black_box};
use steer_policy::affinity::ring::Ring;
use steer_policy::affinity::{Member, xxh64};
use steer_policy::config::HashFunction;

/// Keys that are looked up in turn: always the same one would find the processor prepared.
const KEYS: usize = 4096;

/// The sizes are those of a cluster that sets none.
fn ring(endpoints: usize) -> Ring {
    let keys: Vec<_> = (0..endpoints).map(|i| format!("10.0.{}.{}:3000", i / 250, i % 250)).collect();
    let members: Vec<_> =
        keys.iter().zip(0..).map(|(key, index)| Member { index, key: key.as_bytes(), weight: 1 }).collect();
    Ring::new(&members, HashFunction::XxHash, 1024, 8 << 20)
}

#[divan::bench(args = [3, 100])]
fn pick(bencher: Bencher<'_, '_>, endpoints: usize) {
    let ring = ring(endpoints);
    let hashes: Vec<_> = (0..KEYS).map(|i| xxh64(&i.to_le_bytes())).collect();
    let mut next = hashes.iter().cycle();
    bencher.bench_local(|| next.next().and_then(|hash| black_box(&ring).pick(*hash)));
}

#[divan::bench(args = [3, 100])]
fn build(endpoints: usize) -> Ring {
    ring(endpoints)
}
