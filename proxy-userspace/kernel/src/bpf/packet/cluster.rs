//! How a record names the cluster of its stream.

use xxhash_rust::xxh64::xxh64;

/// What [`Record::cluster`](proxy_common::flow::Record::cluster) holds for the cluster of this
/// name: xxh64 with seed 0. A process reads the records that another build has written, so another
/// hash needs another `ABI_VERSION`.
pub fn name_hash(cluster: &str) -> u64 {
    xxh64(cluster.as_bytes(), 0)
}

#[cfg(test)]
mod tests {
    use super::name_hash;

    #[test]
    fn the_hash_of_a_name_is_frozen() {
        assert_eq!(name_hash(""), 0xef46_db37_51d8_e999);
        assert_eq!(name_hash("a"), 0xd24e_c4f1_a98c_6e5b);
    }
}
