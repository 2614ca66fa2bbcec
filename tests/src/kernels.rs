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

/// Where a kernel comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Distribution {
    Debian,
    /// From the mirror that [`UBUNTU_MIRROR`] names; without it, its kernels are not tried.
    Ubuntu,
}

/// The variable that names a mirror of Ubuntu, as apt's sources do.
pub const UBUNTU_MIRROR: &str = "STEER_UBUNTU_MIRROR";

/// A stock kernel, and what Steer has there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    pub distribution: Distribution,
    /// The suite of the distribution whose kernel it is, by the name that apt knows.
    pub suite: &'static str,
    /// The package that depends on the suite's newest kernel.
    pub package: &'static str,
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
    const DEBIAN: Self = Self {
        distribution: Distribution::Debian,
        suite: "",
        package: "linux-image-cloud-amd64",
        series: None,
        has: Has::Tcx,
        tries_sockmap: false,
        cpus: 2,
        is_in_short: false,
    };
    const UBUNTU: Self =
        Self { distribution: Distribution::Ubuntu, package: "linux-image-generic", ..Self::DEBIAN };

    /// What tells it from the others: the name of its directory.
    pub fn name(&self) -> String {
        format!("{:?}-{}-{}", self.distribution, self.suite, self.package)
    }

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
pub const ALL: [Kernel; 7] = [
    Kernel { suite: "bullseye", series: Some("5.10"), has: Has::Relay, ..Kernel::DEBIAN },
    Kernel { suite: "jammy-updates", series: Some("5.15"), has: Has::Clsact, ..Kernel::UBUNTU },
    Kernel { suite: "bookworm", series: Some("6.1"), has: Has::Clsact, is_in_short: true, ..Kernel::DEBIAN },
    Kernel { suite: "noble-updates", series: Some("6.8"), ..Kernel::UBUNTU },
    Kernel {
        suite: "trixie",
        series: Some("6.12"),
        tries_sockmap: true,
        is_in_short: true,
        ..Kernel::DEBIAN
    },
    Kernel {
        suite: "noble-updates",
        package: "linux-image-generic-hwe-24.04",
        tries_sockmap: true,
        ..Kernel::UBUNTU
    },
    // One CPU: with more, QEMU 7.2 without KVM is not a match for how these kernels change their own code.
    Kernel { suite: "trixie-backports", tries_sockmap: true, cpus: 1, ..Kernel::DEBIAN },
];

/// Those that are tried in the long form, or in the short one.
pub fn of_form(long: bool) -> impl Iterator<Item = Kernel> {
    let has_ubuntu = std::env::var_os(UBUNTU_MIRROR).is_some();
    let can_be_had = move |kernel: &Kernel| has_ubuntu || kernel.distribution != Distribution::Ubuntu;
    ALL.into_iter().filter(can_be_had).filter(move |kernel| long || kernel.is_in_short)
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
