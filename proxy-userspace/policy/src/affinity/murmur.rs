//! MurmurHash64A as libstdc++'s `std::hash<std::string>` computes it on 64-bit little endian
//! machines: what Envoy calls `MURMUR_HASH_2`.

/// The seed that libstdc++ uses.
const SEED: u64 = 0xc70f_6907;
const MULTIPLIER: u64 = 0xc6a4_a793_5bd1_e995;

pub fn murmur2(bytes: &[u8]) -> u64 {
    let mut hash = SEED ^ (bytes.len() as u64).wrapping_mul(MULTIPLIER);
    let (words, tail) = bytes.as_chunks::<8>();
    for word in words {
        let mut word = u64::from_le_bytes(*word).wrapping_mul(MULTIPLIER);
        word ^= word >> 47;
        word = word.wrapping_mul(MULTIPLIER);
        hash = (hash ^ word).wrapping_mul(MULTIPLIER);
    }
    if !tail.is_empty() {
        let mut word = [0; 8];
        word[..tail.len()].copy_from_slice(tail);
        hash = (hash ^ u64::from_le_bytes(word)).wrapping_mul(MULTIPLIER);
    }
    hash ^= hash >> 47;
    hash = hash.wrapping_mul(MULTIPLIER);
    hash ^ (hash >> 47)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        assert_eq!(murmur2(b""), 0x553e_9390_1e46_2a6e);
        assert_eq!(murmur2(b"a"), 0x454d_dee4_88c1_ed6b);
        assert_eq!(murmur2(b"12345678"), 0x8c5b_90a3_3a04_dca5);
        assert_eq!(murmur2(b"10.10.62.120:3000_0"), 0xe630_49cc_a059_e695);
    }
}
