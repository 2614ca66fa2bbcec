//! The stock kernels that the suite `kernels` runs Steer on, and that `cargo xtask test` gets for it.

use std::path::PathBuf;

use crate::require::skip;

/// How many streams are opened in a guest, one for each client.
pub const STREAMS: u64 = 20;
/// How many more after a restart.
pub const MORE: u64 = 5;
/// How many of them carry bulk at the same time.
pub const BULK_STREAMS: usize = 4;
/// What each of these carries, each way, in bytes.
pub const BULK_BYTES: usize = 5_000_000;

/// A kernel of Debian, in its package for virtual machines, and what Steer has there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    /// The suite of Debian whose kernel it is, by the name that apt knows.
    pub debian: &'static str,
    /// The version that is expected; `None` for whatever is newest.
    pub series: Option<&'static str>,
    pub has: Has,
    /// Whether the socket splice is tried: only on kernels that README.md names for it.
    pub tries_sockmap: bool,
    /// Of the guest.
    pub cpus: u32,
    /// Whether it is tried in the short form, too.
    pub is_in_short: bool,
}

impl Kernel {
    /// The phases of `steer-guest` in the long form, or in the short one.
    pub fn phases(&self, long: bool) -> &'static str {
        match (long, self.tries_sockmap) {
            (false, _) => "auto",
            (true, false) => "auto,kill",
            (true, true) => "auto,sockmap,kill",
        }
    }
}

/// What carries streams with `splice: auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Has {
    /// The packet splice with tcx links.
    Tcx,
    /// The same with filters of the qdisc clsact.
    Clsact,
    /// The relay, since the verifier refuses the packet splice.
    Relay,
}

/// The whole matrix, oldest first.
pub const ALL: [Kernel; 4] = [
    Kernel {
        debian: "bullseye",
        series: Some("5.10"),
        has: Has::Relay,
        tries_sockmap: false,
        cpus: 2,
        is_in_short: false,
    },
    Kernel {
        debian: "bookworm",
        series: Some("6.1"),
        has: Has::Clsact,
        tries_sockmap: false,
        cpus: 2,
        is_in_short: true,
    },
    Kernel {
        debian: "trixie",
        series: Some("6.12"),
        has: Has::Tcx,
        tries_sockmap: true,
        cpus: 2,
        is_in_short: true,
    },
    // One CPU: with more, QEMU 7.2 without KVM is not a match for how these kernels change their own code.
    Kernel {
        debian: "trixie-backports",
        series: None,
        has: Has::Tcx,
        tries_sockmap: true,
        cpus: 1,
        is_in_short: false,
    },
];

/// Those that are tried in the long form, or in the short one.
pub fn of_form(long: bool) -> impl Iterator<Item = Kernel> {
    ALL.into_iter().filter(move |kernel| long || kernel.is_in_short)
}

/// Where `cargo xtask test` has put the kernels: `STEER_KERNELS`.
pub fn directory() -> Option<PathBuf> {
    if !cfg!(target_arch = "x86_64") {
        skip("the guests are of x86-64, and get the Steer of this machine");
        return None;
    }
    let path = std::env::var_os("STEER_KERNELS").map(PathBuf::from).filter(|path| path.exists());
    if path.is_none() {
        skip("needs QEMU and kernels: run `cargo xtask test --only kernels`");
    }
    path
}
