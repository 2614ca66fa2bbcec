//! The stock kernels on which the suite `kernels` runs Steer. `cargo xtask test` downloads them.

use std::path::PathBuf;

use crate::require::skip;

/// How many streams a guest opens, one for each client.
pub const STREAMS: u64 = 20;
/// How many streams are opened after a restart.
pub const MORE: u64 = 5;
/// How many of the streams carry bulk at the same time.
pub const BULK_STREAMS: usize = 4;
/// How many bytes each bulk stream carries in each direction.
pub const BULK_BYTES: usize = 5_000_000;

/// Where a kernel comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Distribution {
    Debian,
    /// The mirror that [`UBUNTU_MIRROR`] names. Without a mirror, Ubuntu's kernels are not tried.
    Ubuntu,
}

/// The variable that names a mirror of Ubuntu, in the form of apt's sources.
pub const UBUNTU_MIRROR: &str = "STEER_UBUNTU_MIRROR";

/// The variable with a part of a kernel's name. Kernels whose names do not contain it are not
/// tried.
pub const ONLY: &str = "STEER_KERNELS_ONLY";

/// A stock kernel, and which paths Steer has there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    pub distribution: Distribution,
    /// The suite of the kernel's distribution, by the name that apt knows.
    pub suite: &'static str,
    /// The package that depends on the newest kernel of the suite.
    pub package: &'static str,
    /// The expected version. `None` for the newest one.
    pub series: Option<&'static str>,
    pub has: Has,
    /// Whether the socket splice is tried. Only on kernels that README.md names for the socket
    /// splice.
    pub tries_sockmap: bool,
    /// The number of CPUs of the guest.
    pub cpus: u32,
    /// Whether the short form of the suite tries this kernel, too.
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

    /// The unique name of the kernel, which is also the name of its directory.
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
    /// The packet splice with filters of the qdisc clsact.
    Clsact,
    /// The relay, because the verifier refuses the packet splice.
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
    // One CPU: with more, QEMU 7.2 without KVM fails when these kernels patch their own code.
    Kernel { suite: "trixie-backports", tries_sockmap: true, cpus: 1, ..Kernel::DEBIAN },
];

/// The kernels of the long form, or of the short form.
pub fn of_form(long: bool) -> impl Iterator<Item = Kernel> {
    let has_ubuntu = std::env::var_os(UBUNTU_MIRROR).is_some();
    let can_be_had = move |kernel: &Kernel| has_ubuntu || kernel.distribution != Distribution::Ubuntu;
    let only = std::env::var(ONLY).unwrap_or_default();
    ALL.into_iter().filter(can_be_had).filter(move |kernel| {
        if only.is_empty() { long || kernel.is_in_short } else { kernel.name().contains(&only) }
    })
}

/// The directory in which `cargo xtask test` has put the kernels: `STEER_KERNELS`.
pub fn directory() -> Option<PathBuf> {
    if !cfg!(target_arch = "x86_64") {
        skip("needs x86-64: the guests run the Steer binary of this machine");
        return None;
    }
    let path = std::env::var_os("STEER_KERNELS").map(PathBuf::from).filter(|path| path.exists());
    if path.is_none() {
        skip("needs QEMU and kernels: run `cargo xtask test --only kernels`");
    }
    path
}
