//! The kernel's monotonic clock: what `bpf_ktime_get_ns` and TCP timestamps count.

use std::fs;
use std::sync::OnceLock;

/// Nanoseconds of CLOCK_MONOTONIC as the kernel itself sees it, also inside a time namespace, where
/// `clock_gettime` adds an offset.
pub fn monotonic_ns() -> u64 {
    static NAMESPACE_OFFSET: OnceLock<i64> = OnceLock::new();
    let offset = NAMESPACE_OFFSET.get_or_init(|| {
        let offsets = fs::read_to_string("/proc/self/timens_offsets").unwrap_or_default();
        monotonic_offset(&offsets).unwrap_or(0)
    });
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a local; this clock exists everywhere, so the call cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let own = now.tv_sec * 1_000_000_000 + now.tv_nsec;
    own.wrapping_sub(*offset).unsigned_abs()
}

/// The same in milliseconds: the clock of TCP timestamps.
pub fn monotonic_ms() -> u64 {
    monotonic_ns() / 1_000_000
}

/// Nanoseconds in the line `monotonic SECONDS NANOSECONDS` of `/proc/PID/timens_offsets`, which
/// kernels without time namespaces (before 5.6) do not have.
fn monotonic_offset(offsets: &str) -> Option<i64> {
    let mut fields = offsets.lines().find_map(|line| line.strip_prefix("monotonic"))?.split_whitespace();
    let mut number = || fields.next()?.parse::<i64>().ok();
    number()?.checked_mul(1_000_000_000)?.checked_add(number()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_offset_of_a_time_namespace_is_read() {
        let offsets = "monotonic           0         0\nboottime            0         0\n";
        assert_eq!(monotonic_offset(offsets), Some(0));
        assert_eq!(monotonic_offset("monotonic -3 500\n"), Some(-2_999_999_500));
        assert_eq!(monotonic_offset(""), None);
        assert_eq!(monotonic_offset("monotonic x 0"), None);
    }

    #[test]
    fn it_does_not_go_back() {
        let before = monotonic_ns();
        assert!(before > 0 && monotonic_ns() >= before);
    }
}
