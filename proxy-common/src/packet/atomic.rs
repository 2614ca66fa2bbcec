//! Words of a record that several CPUs write at once.

/// Writes `new` if the word is still `old`. Returns the word that was there before. A full barrier.
///
/// Rust has no compare-exchange for the BPF target, since the first versions of the instruction set
/// had none. Version 3, for which the programs are compiled, has one (Linux 5.12), and the
/// assembler knows it.
///
/// # Safety
/// `place` is aligned and live, and others access it only as a whole.
#[cfg(target_arch = "bpf")]
#[inline(always)]
pub(crate) unsafe fn compare_exchange(place: *mut u32, old: u32, new: u32) -> u32 {
    let mut found = u64::from(old);
    // SAFETY: the instruction compares the word with the lower half of r0, writes it at most, and
    // leaves in r0 what it was.
    unsafe {
        core::arch::asm!(
            "w0 = cmpxchg32_32({place} + 0, w0, {new})",
            place = in(reg) place,
            new = in(wreg) new,
            inout("r0") found,
        );
    }
    found as u32
}

/// As the programs have it.
///
/// # Safety
/// `place` is aligned and live, and others access it only as a whole.
#[cfg(not(target_arch = "bpf"))]
#[inline(always)]
pub(crate) unsafe fn compare_exchange(place: *mut u32, old: u32, new: u32) -> u32 {
    use core::sync::atomic::{AtomicU32, Ordering::SeqCst};
    // SAFETY: as the caller says.
    let word = unsafe { AtomicU32::from_ptr(place) };
    word.compare_exchange(old, new, SeqCst, SeqCst).unwrap_or_else(|found| found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_expected_word_is_replaced() {
        let mut word = 7;
        // SAFETY: a local word.
        let found =
            [(6, 1), (7, 8), (7, 9)].map(|(old, new)| unsafe { compare_exchange(&raw mut word, old, new) });
        assert_eq!((found, word), ([7, 7, 8], 8));
    }
}
