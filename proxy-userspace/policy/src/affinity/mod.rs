//! Consistent hashing that agrees bit for bit with Envoy 1.39: from a request head to a hash
//! ([`hash_policy`]), from the endpoints of a cluster to those in use ([`ring_members`]), and from a
//! hash to one of them ([`ring`], [`maglev`]). Pure: no sockets, no clock, no shared state.
//!
//! The contract is checked by the daemon's `tests/vectors` against what a real Envoy did. The order
//! of the floating point operations is part of it: Envoy's counts depend on how IEEE doubles round.

pub mod address;
pub mod cookie;
pub mod hash_policy;
pub mod maglev;
pub mod murmur;
pub mod rewrite;
pub mod ring;
pub mod ring_members;

/// xxHash64 with seed 0: the hash of every request key and, unless configured otherwise, of every
/// ring point.
pub fn xxh64(bytes: &[u8]) -> u64 {
    xxhash_rust::xxh64::xxh64(bytes, 0)
}

/// The weights as shares of their sum, the way Envoy divides them, with the least (at most 1) and
/// the greatest share.
fn shares(weights: impl Iterator<Item = u32> + Clone) -> Shares {
    let total: u64 = weights.clone().map(u64::from).sum();
    #[expect(clippy::cast_precision_loss, reason = "the sum of weights fits 32 bits, checked by config")]
    let total = total as f64;
    let each: Vec<f64> = weights.map(|weight| f64::from(weight) / total).collect();
    let least = each.iter().copied().fold(1.0, f64::min);
    let greatest = each.iter().copied().fold(0.0, f64::max);
    Shares { each, least, greatest }
}

struct Shares {
    each: Vec<f64>,
    least: f64,
    greatest: f64,
}

/// An endpoint as a table sees it.
#[derive(Debug, Clone, Copy)]
pub struct Member<'a> {
    /// The number that the table answers with.
    pub index: u32,
    /// The bytes that are hashed for the endpoint.
    pub key: &'a [u8],
    /// 1 or more.
    pub weight: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xxh64_known_answers() {
        assert_eq!(xxh64(b""), 0xef46_db37_51d8_e999);
        assert_eq!(xxh64(b"a"), 0xd24e_c4f1_a98c_6e5b);
        assert_eq!(xxh64(b"10.10.62.120:3000_0"), 0x49ba_eb60_b77a_e642);
        assert_eq!(xxhash_rust::xxh64::xxh64(b"a", 1), 0xdec2_bc81_c3cd_46c6);
    }
}
