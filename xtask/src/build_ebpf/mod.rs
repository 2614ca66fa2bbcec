//! `cargo xtask build-ebpf`: builds the BPF programs into [`OBJECT`], which `steer` embeds, and
//! those of the tests beside it.
//!
//! rustup ships no `core` for BPF, so a stable toolchain alone cannot build the programs. There are
//! two ways, tried in this order: a rustc with a `core` built for BPF (Debian has one), or a rustup
//! nightly with `rust-src`, which compiles `core` itself. Both link with bpf-linker.

pub(crate) mod clippy;
mod stack;
mod toolchain;
mod verify;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use toolchain::Toolchain;

pub(crate) const TARGET: &str = "bpfel-unknown-none";
/// Relative to the workspace; `proxy-userspace/kernel/build.rs` looks for the first two, the tests
/// load the third.
pub(crate) const OBJECT: &str = "target/bpf/steer-ebpf.o";
const OTHER_LAYOUT: &str = "target/bpf/steer-ebpf-other-layout.o";
const FAULTS: &str = "target/bpf/faults-ebpf.o";
/// The packages with BPF programs: those of `steer`, and those of the tests.
const PACKAGES: [&str; 2] = ["--package=proxy-ebpf", "--package=faults-ebpf"];

/// Version 3 of the instruction set (Linux 5.1) has 32-bit arithmetic: shorter programs, and bounds that the verifier sees
/// through.
const TARGET_CPU: &str = "-Ctarget-cpu=v3";

/// Build the BPF programs that `steer` embeds, installing the compiler for them where possible
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only say what would be installed
    #[arg(long)]
    no_install: bool,
    /// Let the programs write trace lines to steer's log (for debugging a program)
    #[arg(long)]
    log: bool,
    /// Build those of the feature `other-layout` instead, for tests
    #[arg(long, conflicts_with = "log")]
    other_layout: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let workspace = workspace()?;
    let toolchain = toolchain::find_or_install(!args.no_install)?;
    let linker = toolchain::find_or_install_linker(&toolchain, !args.no_install)?;
    eprintln!("build-ebpf: {toolchain}, linked by {}", linker.display());

    let (feature, object) = match args {
        Args { other_layout: true, .. } => (Some("other-layout"), OTHER_LAYOUT),
        Args { log: true, .. } => (Some("log"), OBJECT),
        _ => (None, OBJECT),
    };
    let built = compile(workspace, &toolchain, &linker, feature)?;
    for (binary, object, programs) in
        [("steer-ebpf", object, verify::STEER), ("faults-ebpf", FAULTS, verify::FAULTS)]
    {
        let built = built.join(binary);
        verify::check(&built, programs)?;
        install(&built, &workspace.join(object))?;
    }
    eprintln!("build-ebpf: {object} is ready; next: cargo build --release");
    Ok(())
}

fn workspace() -> Result<&'static Path> {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in the workspace")
}

/// Where cargo builds for BPF.
fn target_dir() -> Result<PathBuf> {
    Ok(workspace()?.join("target/bpf"))
}

/// Returns the directory of the linked objects.
fn compile(workspace: &Path, toolchain: &Toolchain, linker: &Path, feature: Option<&str>) -> Result<PathBuf> {
    let target_dir = target_dir()?;
    let mut cargo = toolchain.cargo();
    cargo
        .current_dir(workspace)
        .args(["build", "--locked", "--profile", "bpf", "--target", TARGET])
        .args(PACKAGES)
        .arg("--target-dir")
        .arg(&target_dir)
        // The flags of the host (a linker, a CPU) do not apply to BPF.
        .env_remove("RUSTFLAGS")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(linker));
    if let Some(feature) = feature {
        cargo.arg(format!("--features=proxy-ebpf/{feature}"));
    }
    run_visibly(&mut cargo)?;
    Ok(target_dir.join(TARGET).join("bpf"))
}

/// In Cargo's encoding, which unlike `RUSTFLAGS` has room for blanks in a path.
fn rustflags(linker: &Path) -> String {
    [
        format!("-Clinker={}", linker.display()),
        "-Clink-arg=--btf".into(),
        TARGET_CPU.into(),
        "-Cdebuginfo=2".into(),
    ]
    .join("\x1f")
}

/// Replaces the object only when it has changed, so that `steer` is not built again for nothing.
fn install(built: &Path, object: &Path) -> Result<()> {
    let bytes = std::fs::read(built).with_context(|| format!("cannot read {}", built.display()))?;
    if std::fs::read(object).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    // Renamed into place: a build that runs at the same time sees the old or the new one.
    let new = object.with_extension("o.new");
    std::fs::write(&new, bytes).with_context(|| format!("cannot write {}", new.display()))?;
    std::fs::rename(&new, object).with_context(|| format!("cannot write {}", object.display()))
}

/// Runs a command with its output on the terminal.
fn run_visibly(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {:?}", command.get_program()))?;
    if !status.success() {
        bail!("{:?} failed: {status}", command.get_program());
    }
    Ok(())
}
