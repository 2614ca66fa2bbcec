//! Helpers that several fuzz targets share. A target is a file of `targets/`. It builds an input
//! from the fuzzer's bytes, calls the code under test, and compares the result with the result of a
//! plain, slow model.
//!
//! The code under test is safe Rust, so no address sanitizer is needed: an access out of bounds is
//! a panic.
#![forbid(unsafe_code)]

use bytemuck::{AnyBitPattern, NoUninit};

/// The ones-complement sum of big-endian words (RFC 1071), modulo 65535. The sum over data with a
/// correct checksum is zero. An update that does not change the sum keeps a correct checksum
/// correct and a wrong one wrong.
pub fn sum(bytes: &[u8]) -> u32 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |byte| u32::from(*byte));
    bytes.chunks(2).map(word).fold(0, |sum, word| (sum + word) % 0xffff)
}

/// Takes a value from the front of `bytes`. `None` if `bytes` are too short.
pub fn take<T: AnyBitPattern>(bytes: &mut &[u8]) -> Option<T> {
    let (value, rest) = bytes.split_at_checked(size_of::<T>())?;
    *bytes = rest;
    Some(bytemuck::pod_read_unaligned(value))
}

/// Writes `value` over the front of `bytes`. If `bytes` are too short, the rest of `value` is left
/// out.
pub fn put<T: NoUninit>(bytes: &mut [u8], value: &T) {
    let value = bytemuck::bytes_of(value);
    let len = value.len().min(bytes.len());
    bytes[..len].copy_from_slice(&value[..len]);
}
