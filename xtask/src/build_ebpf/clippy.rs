//! Clippy over the BPF programs, for their own target: on the host, code of other targets is not looked at. It takes the
//! compiler that builds the programs, since a lint of another version reads another `core`.

use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::toolchain::{self, Toolchain};
use super::{PACKAGES, TARGET, TARGET_CPU, target_dir, workspace};
use crate::exec::{answer, run};

/// The name of the check.
pub(crate) const CHECK: &str = "clippy_bpf";
/// Debian's package of the clippy that belongs to its `rustc-web`.
const DEBIAN_PACKAGE: &str = "rust-web-clippy";

/// The command of the check.
///
/// # Errors
///
/// If the compiler or its clippy is missing. The error has the command that installs it.
pub(crate) fn command() -> Result<Command> {
    let without = format!("to leave this check out: cargo xtask check --without {CHECK}");
    let toolchain = toolchain::find_or_install(false).with_context(|| without.clone())?;
    let Some(mut clippy) = found(&toolchain) else {
        let install = installer(&toolchain);
        bail!("{toolchain} has no clippy. This installs it:\n  {}\n{without}", install.join(" "));
    };
    clippy
        .current_dir(workspace()?)
        .args(["--locked", "--bins", "--target", TARGET])
        .args(PACKAGES)
        .arg("--target-dir")
        .arg(target_dir()?)
        .args(["--", "-D", "warnings"])
        .env_remove("RUSTFLAGS")
        .env_remove("RUSTC_WRAPPER")
        .env("CARGO_ENCODED_RUSTFLAGS", TARGET_CPU);
    Ok(clippy)
}

/// Installs what [`command`] needs, as far as it is missing.
pub(crate) fn install() -> Result<()> {
    let toolchain = toolchain::find_or_install(true)?;
    if found(&toolchain).is_some() {
        return Ok(());
    }
    let words = installer(&toolchain);
    let (program, args) = words.split_first().context("an installer has a name")?;
    run(Command::new(program).args(args).env("DEBIAN_FRONTEND", "noninteractive"))
}

/// Clippy of this toolchain, if it can be run.
fn found(toolchain: &Toolchain) -> Option<Command> {
    let version = answer(toolchain.clippy().arg("--version"));
    version.map(|_| toolchain.clippy())
}

fn installer(toolchain: &Toolchain) -> Vec<&str> {
    match toolchain {
        Toolchain::Prebuilt { .. } => {
            vec!["apt-get", "install", "-y", "--no-install-recommends", DEBIAN_PACKAGE]
        }
        Toolchain::Nightly { name, .. } => vec!["rustup", "component", "add", "clippy", "--toolchain", name],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_toolchain_has_an_installer_of_its_own() {
        let debian = Toolchain::Prebuilt { rustc: "/usr/bin/rustc".into(), llvm: 22 };
        assert!(installer(&debian).ends_with(&["--no-install-recommends", "rust-web-clippy"]));
        let rustup = Toolchain::Nightly { name: "nightly-x".to_owned(), llvm: 22 };
        assert!(installer(&rustup).ends_with(&["clippy", "--toolchain", "nightly-x"]));
    }

    #[test]
    fn a_compiler_without_clippy_is_told_from_one_that_has_it() {
        let alone = Toolchain::Prebuilt { rustc: "/nonexistent/rustc".into(), llvm: 22 };
        assert!(found(&alone).is_none());
    }
}
