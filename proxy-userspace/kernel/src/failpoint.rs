//! Places at which a test can make the process die (the variable `STEER_DIE_AT`) or do something
//! more (`STEER_ALSO`). Without the feature `failpoints`, the binary has none of this.

/// Ends the process as SIGKILL does, if this is the place.
#[cfg(feature = "failpoints")]
pub fn reached(place: &str) {
    if std::env::var_os("STEER_DIE_AT").is_some_and(|chosen| chosen == place) {
        // SAFETY: takes a number, and does not return.
        unsafe { libc::raise(libc::SIGKILL) };
    }
}

#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn reached(_place: &str) {}

/// Whether a test wants this done, too.
#[cfg(feature = "failpoints")]
pub fn is_asked(deed: &str) -> bool {
    std::env::var_os("STEER_ALSO").is_some_and(|chosen| chosen == deed)
}

#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn is_asked(_deed: &str) -> bool {
    false
}
