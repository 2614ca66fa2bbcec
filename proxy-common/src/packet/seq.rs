//! Sequence numbers: 32 bits that wrap, compared by their distance (RFC 9293, section 3.4).

/// Whether `a` comes after `b`. Meaningless when they are 2^31 or more apart.
#[inline(always)]
pub const fn after(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) > 0
}

/// Whether `a` comes before `b`.
#[inline(always)]
pub const fn before(a: u32, b: u32) -> bool {
    after(b, a)
}

/// The later one of two.
#[inline(always)]
pub const fn later(a: u32, b: u32) -> u32 {
    if after(a, b) { a } else { b }
}

/// The earlier one of two.
#[inline(always)]
pub const fn earlier(a: u32, b: u32) -> u32 {
    if after(a, b) { b } else { a }
}

/// Whether the two are at most `distance` apart.
#[inline(always)]
pub const fn within(a: u32, b: u32, distance: u32) -> bool {
    (a.wrapping_sub(b) as i32).unsigned_abs() <= distance
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_survives_the_wrap() {
        for base in [0, 1, 0x7fff_ffff, 0x8000_0000, u32::MAX - 1, u32::MAX] {
            let next = base.wrapping_add(1);
            assert!(after(next, base) && !after(base, next) && !after(base, base), "{base}");
            assert!(before(base, next) && !before(next, base), "{base}");
            assert_eq!((later(base, next), later(next, base)), (next, next));
            assert_eq!((earlier(base, next), earlier(next, base)), (base, base));
            assert!(within(base, base.wrapping_add(9), 9) && !within(base.wrapping_add(10), base, 9));
        }
    }
}
