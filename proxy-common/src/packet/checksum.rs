//! The ones-complement checksum of the internet (RFC 1071) and how it changes with a packet (RFC
//! 1624).
//!
//! All sums are over wire words as a native load reads them. The sum does not care in which half of
//! a 32-bit word a 16-bit word stands, since 2^16 = 1 in its arithmetic, so both widths are added
//! alike.

/// By how much the sum of some words changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Difference(u64);

impl Difference {
    /// A word of 16 or 32 bits changes to another one.
    #[inline(always)]
    pub fn replace(&mut self, old: u32, new: u32) {
        // Each adds less than 2^33, and a packet has some dozens of words: no overflow.
        self.0 += u64::from(!old) + u64::from(new);
    }

    /// Adds another change.
    #[inline(always)]
    pub fn add(&mut self, other: Self) {
        self.0 += other.0;
    }

    /// As the kernel's checksum helpers take it: 32 bits, folded no further.
    #[inline(always)]
    pub const fn folded(self) -> u32 {
        fold32(self.0)
    }

    /// The new value of a checksum field (wire) over the words.
    #[inline(always)]
    pub const fn apply(self, check: u16) -> u16 {
        !self.add_to(!check)
    }

    /// The new value of the folded sum of the words: the content of a checksum field that an
    /// offloading device completes.
    #[inline(always)]
    pub const fn add_to(self, sum: u16) -> u16 {
        fold16(sum as u64 + self.0)
    }

    /// The same change of bytes that stand one byte further on: each changes from one half of its
    /// 16-bit word to the other. For a few words only.
    #[inline(always)]
    pub const fn at_odd_place(self) -> Self {
        Self(self.0 << 8)
    }

    /// The opposite change of a sum.
    #[inline(always)]
    pub const fn negative(self) -> Self {
        Self(!self.folded() as u64)
    }
}

/// The checksum field (wire) over words whose sum is `sum`.
#[inline(always)]
pub const fn finish(sum: u64) -> u16 {
    !fold16(sum)
}

#[inline(always)]
const fn fold32(sum: u64) -> u32 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    ((sum & 0xffff_ffff) + (sum >> 32)) as u32
}

/// For sums below 2^48.
#[inline(always)]
const fn fold16(sum: u64) -> u16 {
    // Less than 2^33, 2^18, 2^16 + 2, 2^16.
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}
