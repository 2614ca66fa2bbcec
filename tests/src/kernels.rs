//! The stock kernels that the suite `kernels` runs Steer on, and that `cargo xtask test` gets for it.

use std::path::PathBuf;

use crate::require::skip;

/// A kernel of Debian, in its package for virtual machines, and what Steer has there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    /// The suite of Debian whose kernel it is, by the name that apt knows.
    pub debian: &'static str,
    /// The version that is expected; `None` for whatever is newest.
    pub series: Option<&'static str>,
    pub has: Has,
    /// Of the guest.
    pub cpus: u32,
    /// Whether it is tried in the short form, too.
    pub is_in_short: bool,
}

/// What carries streams with `splice: auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Has {
    /// The packet splice with tcx links: streams outlive the process.
    Tcx,
    /// The packet splice with filters of the qdisc clsact.
    Clsact,
    /// The relay, since the verifier refuses the packet splice.
    Relay,
}

/// The whole matrix, oldest first.
pub const ALL: [Kernel; 4] = [
    Kernel { debian: "bullseye", series: Some("5.10"), has: Has::Relay, cpus: 2, is_in_short: false },
    Kernel { debian: "bookworm", series: Some("6.1"), has: Has::Clsact, cpus: 2, is_in_short: true },
    Kernel { debian: "trixie", series: Some("6.12"), has: Has::Tcx, cpus: 2, is_in_short: true },
    // One CPU: with more, QEMU 7.2 without KVM is not a match for how these kernels change their own code.
    Kernel { debian: "trixie-backports", series: None, has: Has::Tcx, cpus: 1, is_in_short: false },
];

/// Those that are tried in the long form, or in the short one.
pub fn of_form(long: bool) -> impl Iterator<Item = Kernel> {
    ALL.into_iter().filter(move |kernel| long || kernel.is_in_short)
}

/// Where `cargo xtask test` has put the kernels: `STEER_KERNELS`.
pub fn directory() -> Option<PathBuf> {
    let path = std::env::var_os("STEER_KERNELS").map(PathBuf::from).filter(|path| path.exists());
    if path.is_none() {
        skip("needs QEMU and kernels: run `cargo xtask test --only kernels`");
    }
    path
}
