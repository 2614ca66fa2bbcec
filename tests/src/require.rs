//! What a test needs from the machine. On a developer's machine a test is skipped if a need is
//! missing, and prints that. With `STEER_TESTS_REQUIRE=1`, which `cargo xtask test` sets, the test
//! fails.

/// Prints that a test cannot run here, and why.
///
/// # Panics
/// When skipping is forbidden.
pub fn skip(reason: &str) {
    let required = std::env::var_os("STEER_TESTS_REQUIRE").is_some_and(|value| value == "1");
    assert!(!required, "this test must not be skipped (STEER_TESTS_REQUIRE=1): {reason}");
    eprintln!("SKIP {reason}");
}

/// Whether the test may make network namespaces and load BPF programs. If not, prints that the test
/// is skipped.
#[must_use = "a test that goes on without root fails in confusing ways"]
pub fn root() -> bool {
    let root = is_root();
    if !root {
        skip("needs root (network namespaces, BPF)");
    }
    root
}

/// Whether this process runs as root.
pub fn is_root() -> bool {
    // SAFETY: geteuid takes no argument and cannot fail.
    (unsafe { libc::geteuid() }) == 0
}

/// Whether the long form of the tests was asked for (`cargo xtask test --long`).
pub fn long() -> bool {
    std::env::var_os("STEER_TESTS_LONG").is_some_and(|value| value == "1")
}
