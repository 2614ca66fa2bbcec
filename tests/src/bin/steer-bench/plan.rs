//! What is measured, how often and for how long.

/// How thorough a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// Within four minutes.
    Quick,
    Standard,
    Full,
}
