//! A guest, from its boot to its end.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use steer_tests::kernels::Kernel;
use steer_tests::process::{Orphan, Process, quiet};

use crate::initramfs;

/// The guest's second serial port, which findings go to; the first one is its console.
pub(crate) const REPORT: &str = "/dev/ttyS1";
/// Of the guest, in MiB.
const MEMORY: u32 = 1024;
/// For the whole run of a guest.
const PATIENCE: Duration = Duration::from_secs(10 * 60);
/// How much of the end of the console is shown when something is wrong, in lines.
const SHOWN_LINES: usize = 80;

/// Boots `kernel`, found in `directory`, runs `phases` of `steer-guest` in it, and returns the findings.
pub(crate) fn run(directory: &Path, kernel: Kernel, phases: &str) -> Result<Vec<Value>> {
    let work = tempfile::tempdir().context("cannot make a directory")?;
    let [initrd, console, report] = ["initrd", "console", "report"].map(|name| work.path().join(name));
    let place = directory.join(kernel.debian);
    initramfs::write(&initrd, &place.join("modules.cpio"), phases)
        .with_context(|| format!("cannot write {}", initrd.display()))?;
    let mut qemu = quiet("qemu-system-x86_64");
    // Emulated, so that it runs where there is no KVM, as in most of CI.
    qemu.args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-display", "none"]);
    qemu.args(["-no-reboot", "-nodefaults", "-m", &MEMORY.to_string(), "-smp", &kernel.cpus.to_string()]);
    for port in [&console, &report] {
        qemu.arg("-serial").arg(format!("file:{}", port.display()));
    }
    qemu.arg("-kernel").arg(place.join("vmlinuz")).arg("-initrd").arg(&initrd);
    qemu.args(["-append", "console=ttyS0 loglevel=4 panic=-1 oops=panic random.trust_cpu=on"]);
    let mut process = Process::start("qemu", qemu, work.path(), None, Orphan::Dies)?;
    let ended = process.wait(PATIENCE);
    let said = fs::read(&report).unwrap_or_default();
    let findings = findings(&String::from_utf8_lossy(&said));
    let tail = || {
        let console = fs::read(&console).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        let skipped = console.lines().count().saturating_sub(SHOWN_LINES);
        let console: Vec<_> = console.lines().skip(skipped).collect();
        format!(
            "{}\n--- the findings\n{}\n--- the guest's console\n{}",
            process.tail(),
            String::from_utf8_lossy(&said),
            console.join("\n")
        )
    };
    let status = ended.with_context(tail)?;
    ensure!(status.success(), "QEMU failed ({status}): {}", tail());
    let findings = findings.with_context(tail)?;
    ensure!(
        findings.last().is_some_and(|finding| finding["finding"] == "done"),
        "the guest ended early: {}",
        tail()
    );
    Ok(findings)
}

/// Each line is one.
fn findings(report: &str) -> Result<Vec<Value>> {
    let lines = report.lines().map(str::trim).filter(|line| !line.is_empty());
    let parse = |line| serde_json::from_str(line).with_context(|| format!("this is no finding: {line}"));
    lines.map(parse).collect()
}
