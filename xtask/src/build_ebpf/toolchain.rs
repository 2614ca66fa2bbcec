//! Finds a compiler and a linker for BPF by trying what is there, and installs them if it may.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::{TARGET, run_visibly};

/// The bpf-linker that Steer is tested with.
const LINKER_VERSION: &str = "0.13.0";
/// LLVM versions that it can be built with.
const LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;

/// Debian 12's packages: rustc with a `core` for BPF, and the LLVM that bpf-linker needs.
const DEBIAN_PACKAGES: [&str; 4] = ["rustc-web", "libstd-rust-web-dev-bpf", "llvm-22-dev", "libpolly-22-dev"];

pub(super) enum Toolchain {
    /// A rustc whose sysroot has `core` for BPF.
    Prebuilt { rustc: PathBuf, llvm: u32 },
    /// A rustup toolchain that is a nightly and has the source of `core`.
    Nightly { name: String, llvm: u32 },
}

impl Toolchain {
    pub(super) fn cargo(&self) -> Command {
        match self {
            Self::Prebuilt { rustc, .. } => {
                let mut cargo = Command::new(own_cargo());
                // The BPF target and what aya-ebpf uses are unstable; a distribution's rustc has
                // them all the same.
                cargo.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1");
                cargo
            }
            Self::Nightly { name, .. } => {
                let mut rustup = Command::new("rustup");
                rustup
                    .args(["run", name, "cargo", "-Zbuild-std=core"])
                    .env_remove("RUSTC")
                    .env_remove("CARGO");
                rustup
            }
        }
    }

    /// `cargo clippy` with the clippy of this compiler.
    pub(super) fn clippy(&self) -> Command {
        match self {
            Self::Prebuilt { rustc, .. } => {
                let mut clippy = Command::new(rustc.with_file_name("cargo-clippy"));
                // It runs this cargo.
                clippy
                    .arg("clippy")
                    .env("CARGO", own_cargo())
                    .env("RUSTC", rustc)
                    .env("RUSTC_BOOTSTRAP", "1");
                clippy
            }
            Self::Nightly { .. } => {
                let mut cargo = self.cargo();
                cargo.arg("clippy");
                cargo
            }
        }
    }

    fn llvm(&self) -> u32 {
        match self {
            Self::Prebuilt { llvm, .. } | Self::Nightly { llvm, .. } => *llvm,
        }
    }
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prebuilt { rustc, llvm } => {
                write!(f, "{} with its own core for BPF (LLVM {llvm})", rustc.display())
            }
            Self::Nightly { name, llvm } => write!(f, "rustup's {name} with rust-src (LLVM {llvm})"),
        }
    }
}

pub(super) fn find_or_install(may_install: bool) -> Result<Toolchain> {
    if let Some(found) = find() {
        return Ok(found);
    }
    if !may_install || !is_root() || !has_debian_packages() {
        bail!(
            "no Rust compiler here can build for BPF. One of these gives you one:\n\
             \n  Debian 12, as root:  apt-get update && apt-get install -y {}\
             \n  elsewhere:           rustup toolchain install nightly --profile minimal --component rust-src\n\
             \nthen run cargo xtask build-ebpf again",
            DEBIAN_PACKAGES.join(" ")
        );
    }
    eprintln!("build-ebpf: no Rust compiler for BPF; installing {}", DEBIAN_PACKAGES.join(" "));
    run_visibly(
        Command::new("apt-get")
            .args(["install", "-y", "--no-install-recommends"])
            .args(DEBIAN_PACKAGES)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )?;
    find().context("the packages are installed, but no rustc on PATH has a core for BPF")
}

fn find() -> Option<Toolchain> {
    rustcs_on_path().find_map(prebuilt).or_else(|| rustup_nightlies().into_iter().find_map(nightly))
}

fn prebuilt(rustc: PathBuf) -> Option<Toolchain> {
    let sysroot = output(Command::new(&rustc).args(["--print", "sysroot"]))?;
    let libraries = Path::new(sysroot.trim()).join("lib/rustlib").join(TARGET).join("lib");
    let has_core = std::fs::read_dir(libraries)
        .ok()?
        .flatten()
        .any(|file| file.file_name().to_string_lossy().starts_with("libcore-"));
    let llvm = llvm_version(Command::new(&rustc).arg("-vV"))?;
    has_core.then_some(Toolchain::Prebuilt { rustc, llvm })
}

fn nightly(name: String) -> Option<Toolchain> {
    let rustc = |args: &[&str]| {
        let mut rustup = Command::new("rustup");
        rustup.args(["run", &name, "rustc"]).args(args);
        rustup
    };
    let sysroot = output(&mut rustc(&["--print", "sysroot"]))?;
    let source = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml");
    let llvm = llvm_version(&mut rustc(&["-vV"]))?;
    source.is_file().then_some(Toolchain::Nightly { name, llvm })
}

fn rustcs_on_path() -> impl Iterator<Item = PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian's directory comes last, in case PATH does not have it.
    let folders: Vec<_> = std::env::split_paths(&path).chain([PathBuf::from("/usr/bin")]).collect();
    folders.into_iter().map(|folder| folder.join("rustc")).filter(|rustc| rustc.is_file())
}

fn rustup_nightlies() -> Vec<String> {
    let list = output(Command::new("rustup").args(["toolchain", "list", "--quiet"])).unwrap_or_default();
    list.split_whitespace().filter(|name| name.starts_with("nightly")).map(str::to_owned).collect()
}

/// The major version of the LLVM inside a rustc.
fn llvm_version(verbose_version: &mut Command) -> Option<u32> {
    parse_llvm_version(&output(verbose_version)?)
}

fn parse_llvm_version(text: &str) -> Option<u32> {
    text.lines().find_map(|line| line.strip_prefix("LLVM version: "))?.split('.').next()?.parse().ok()
}

pub(super) fn find_or_install_linker(toolchain: &Toolchain, may_install: bool) -> Result<PathBuf> {
    let llvm = toolchain.llvm();
    if !LINKER_LLVM.contains(&llvm) {
        bail!(
            "{toolchain}: bpf-linker {LINKER_VERSION} knows LLVM {} to {}; use a rustc with one of these",
            LINKER_LLVM.start(),
            LINKER_LLVM.end()
        );
    }
    if let Some(linker) = find_linker() {
        return Ok(linker);
    }
    let llvm_config = PathBuf::from(format!("/usr/lib/llvm-{llvm}/bin/llvm-config"));
    let command = format!(
        "cargo install bpf-linker --version {LINKER_VERSION} --locked --no-default-features --features llvm-{llvm}"
    );
    if !llvm_config.is_file() && may_install && is_root() && has_debian_packages() {
        let packages = [format!("llvm-{llvm}-dev"), format!("libpolly-{llvm}-dev")];
        eprintln!("build-ebpf: bpf-linker is built with LLVM {llvm}; installing {}", packages.join(" "));
        run_visibly(
            Command::new("apt-get")
                .args(["install", "-y", "--no-install-recommends"])
                .args(packages)
                .env("DEBIAN_FRONTEND", "noninteractive"),
        )?;
    }
    if !may_install || !llvm_config.is_file() {
        bail!(
            "bpf-linker is not installed. It must hold LLVM {llvm} or newer. With LLVM {llvm}'s development \
             files and llvm-config on PATH:\n\n  {command}\n\n\
             or without them, prebuilt:\n\n  cargo binstall bpf-linker@{LINKER_VERSION}\n\n\
             then run cargo xtask build-ebpf again"
        );
    }
    eprintln!("build-ebpf: installing bpf-linker (once, a minute or two): {command}");
    let mut words = command.split(' ').skip(1);
    run_visibly(
        Command::new(own_cargo())
            .args(words.by_ref())
            .env("PATH", path_with(llvm_config.parent().context("llvm-config lies in a folder")?)?)
            // LLVM, which comes compiled, does nearly all of the work. Optimised and with debug information for
            // itself, bpf-linker would take several times as long to build.
            .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0")
            // With these variables, bpf-linker would be built with the settings of the BPF programs
            // or of the workspace.
            .env_remove("RUSTC")
            .env_remove("RUSTFLAGS"),
    )?;
    find_linker().context("bpf-linker is installed, but neither on PATH nor in ~/.cargo/bin")
}

fn find_linker() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let cargo_home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo"));
    std::env::split_paths(&path)
        .chain(cargo_home.or(home).map(|folder| folder.join("bin")))
        .map(|folder| folder.join("bpf-linker"))
        // The linker may be installed but unable to run, if its libLLVM is missing.
        .find(|linker| linker.is_file() && output(Command::new(linker).arg("--version")).is_some())
}

fn path_with(first: &Path) -> Result<std::ffi::OsString> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(first.to_owned()).chain(std::env::split_paths(&path));
    std::env::join_paths(folders).context("PATH cannot be extended")
}

/// The cargo that runs this task.
fn own_cargo() -> std::ffi::OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

fn is_root() -> bool {
    // SAFETY: no arguments, no memory, cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// Whether apt is there and offers the packages; brings its lists up to date first.
fn has_debian_packages() -> bool {
    if output(Command::new("apt-get").arg("--version")).is_none() {
        return false;
    }
    eprintln!("build-ebpf: apt-get update");
    // Without a network, the package lists of the last update may be enough.
    run_visibly(Command::new("apt-get").args(["--quiet", "update"])).ok();
    output(Command::new("apt-cache").arg("show").args(DEBIAN_PACKAGES)).is_some()
}

/// What a command prints; `None` if it cannot be run or fails.
fn output(command: &mut Command) -> Option<String> {
    let output = command.stderr(std::process::Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llvm_version_is_read_from_rustc() {
        let debian = "rustc 1.96.0 (built from a source tarball)\nhost: x86_64\nLLVM version: 22.1.8\n";
        assert_eq!(parse_llvm_version(debian), Some(22));
        assert_eq!(parse_llvm_version("rustc 1.96.0\n"), None);
    }

    #[test]
    fn a_rustc_without_core_for_bpf_is_not_taken() {
        assert!(prebuilt("/nonexistent/rustc".into()).is_none());
        assert!(prebuilt("/bin/true".into()).is_none());
    }
}
