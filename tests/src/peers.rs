//! The programs against which Steer is tested. `cargo xtask test` installs them under `target/` and
//! sets their variables. Without it, set the variable that the skip message names.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context as _, Result};

use crate::eventually::eventually;
use crate::netns::NetNs;
use crate::process::{Orphan, Process, quiet};
use crate::require::skip;
use crate::steer;

const READY_WITHIN: Duration = Duration::from_secs(30);

/// The Envoy binary: `STEER_ENVOY_BIN`.
pub fn envoy_binary() -> Option<PathBuf> {
    named("STEER_ENVOY_BIN", "a real Envoy")
}

/// The `wstest` of the Autobahn test suite: `STEER_WSTEST`.
pub fn wstest_binary() -> Option<PathBuf> {
    named("STEER_WSTEST", "the Autobahn test suite")
}

/// The benchmark that `cargo xtask bench` runs: `STEER_BENCH_BIN`.
pub fn steer_bench_binary() -> Option<PathBuf> {
    named("STEER_BENCH_BIN", "steer-bench")
}

/// Whether Debian's `nft`, which sets up firewalls, is installed.
pub fn nft() -> bool {
    has("nft", "--version", "nftables")
}

/// Whether HAProxy is installed.
pub fn haproxy() -> bool {
    has("haproxy", "-v", "haproxy")
}

/// A command for a program of `tests/apps`. `None` if the packages of `tests/apps` are not
/// installed.
pub fn node_app(script: &str) -> Option<Command> {
    let apps = apps_directory();
    if !apps.join("node_modules").exists() {
        skip("needs the packages of tests/apps: run `npm ci` there, or `cargo xtask test`");
        return None;
    }
    let mut command = quiet("node");
    command.arg(apps.join(script));
    Some(command)
}

/// The directory of the socket.io programs.
pub fn apps_directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("apps")
}

/// A running Envoy that is ready. It ends when the guard is dropped.
#[derive(Debug)]
pub struct Envoy {
    _process: Process,
}

impl Envoy {
    /// Starts `binary` with the bootstrap `config`. The bootstrap has the admin listener `admin`.
    /// Files are in `directory`.
    pub fn start(
        binary: &Path,
        directory: &Path,
        config: &str,
        admin: SocketAddr,
        netns: Option<&NetNs>,
    ) -> Result<Self> {
        let file = directory.join("envoy.yaml");
        fs::write(&file, config).with_context(|| format!("cannot write {}", file.display()))?;
        let mut command = quiet(binary);
        command.args(["--concurrency", "1", "--log-level", "warn", "--disable-hot-restart", "-c"]).arg(file);
        let mut process = Process::start("envoy", command, directory, netns, Orphan::Dies)?;
        let probe = || steer::get(admin, "/ready");
        let ready = eventually("readiness of envoy", READY_WITHIN, || {
            process.ensure_running()?;
            let answer = match netns {
                Some(netns) => netns.run(probe)?,
                None => probe(),
            };
            Ok(answer.ok().filter(|answer| answer.status == 200))
        });
        ready.with_context(|| process.tail())?;
        Ok(Self { _process: process })
    }
}

/// Whether `program`, of a Debian package, can be run.
fn has(program: &str, argument: &str, package: &str) -> bool {
    let there = quiet(program).arg(argument).output().is_ok_and(|output| output.status.success());
    if !there {
        skip(&format!("needs {program}: apt-get install {package}"));
    }
    there
}

fn named(variable: &str, what: &str) -> Option<PathBuf> {
    let path = env::var_os(variable).map(PathBuf::from).filter(|path| path.exists());
    if path.is_none() {
        skip(&format!("needs {what}: set {variable}, or run `cargo xtask test`"));
    }
    path
}
