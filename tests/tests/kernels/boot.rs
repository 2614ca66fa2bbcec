//! A guest, from its boot to its end.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use steer_tests::eventually::eventually;
use steer_tests::kernels::Kernel;
use steer_tests::netns::NetNs;
use steer_tests::process::{Orphan, Process, quiet};
use tempfile::TempDir;

use crate::initramfs;

/// The guest's second serial port, which carries the findings. The first one is the console.
pub(crate) const REPORT: &str = "/dev/ttyS1";
/// The memory of the guest, in MiB.
const MEMORY: u32 = 1024;
/// The longest time of a guest's whole run.
const PATIENCE: Duration = Duration::from_secs(10 * 60);
/// How many lines from the end of the console are shown when a guest fails.
const SHOWN_LINES: usize = 80;

/// A running guest.
#[derive(Debug)]
pub(crate) struct Guest {
    process: Process,
    console: PathBuf,
    report: PathBuf,
    _work: TempDir,
}

impl Guest {
    /// Boots `kernel`, which is in `directory`, to run `phases` of `steer-guest`. QEMU runs in
    /// `netns`, or in the caller's namespace, and gets `more` arguments.
    pub(crate) fn boot(
        directory: &Path,
        kernel: Kernel,
        phases: &str,
        netns: Option<&NetNs>,
        more: &[&str],
    ) -> Result<Self> {
        let work = tempfile::tempdir().context("cannot make a directory")?;
        let [initrd, console, report] = ["initrd", "console", "report"].map(|name| work.path().join(name));
        let place = directory.join(kernel.name());
        initramfs::write(&initrd, &place.join("modules.cpio"), phases)
            .with_context(|| format!("cannot write {}", initrd.display()))?;
        let mut qemu = quiet("qemu-system-x86_64");
        // Emulation runs also where there is no KVM, as in most CI.
        qemu.args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-display", "none"]);
        qemu.args(["-no-reboot", "-nodefaults", "-m", &MEMORY.to_string(), "-smp", &kernel.cpus.to_string()]);
        for port in [&console, &report] {
            qemu.arg("-serial").arg(format!("file:{}", port.display()));
        }
        qemu.arg("-kernel").arg(place.join("vmlinuz")).arg("-initrd").arg(&initrd);
        qemu.args(["-append", "console=ttyS0 loglevel=4 panic=-1 oops=panic random.trust_cpu=on"]);
        qemu.args(more);
        let process = Process::start("qemu", qemu, work.path(), netns, Orphan::Dies)?;
        Ok(Self { process, console, report, _work: work })
    }

    /// Waits until the guest has reported a finding of this kind, and returns it.
    pub(crate) fn wait_for(&mut self, kind: &str) -> Result<Value> {
        let found = eventually(&format!("finding `{kind}`"), PATIENCE, || {
            self.process.ensure_running()?;
            Ok(self.findings()?.into_iter().find(|finding| finding["finding"] == kind))
        });
        found.with_context(|| self.tail())
    }

    /// Waits until the guest has ended, and returns its findings.
    pub(crate) fn finish(mut self) -> Result<Vec<Value>> {
        let status = self.process.wait(PATIENCE).with_context(|| self.tail())?;
        ensure!(status.success(), "QEMU failed ({status}): {}", self.tail());
        let findings = self.findings().with_context(|| self.tail())?;
        let is_whole = findings.last().is_some_and(|finding| finding["finding"] == "done");
        ensure!(is_whole, "the guest ended early: {}", self.tail());
        Ok(findings)
    }

    /// Each complete line of the report is one finding.
    fn findings(&self) -> Result<Vec<Value>> {
        let report = read(&self.report);
        let whole = report.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let lines = whole.lines().map(str::trim).filter(|line| !line.is_empty());
        let parse =
            |line| serde_json::from_str(line).with_context(|| format!("this line is not a finding: {line}"));
        lines.map(parse).collect()
    }

    /// The output of a guest that has failed.
    fn tail(&self) -> String {
        let console = read(&self.console);
        let skipped = console.lines().count().saturating_sub(SHOWN_LINES);
        let console: Vec<_> = console.lines().skip(skipped).collect();
        let (qemu, report) = (self.process.tail(), read(&self.report));
        format!("{qemu}\n--- the findings\n{report}\n--- the guest's console\n{}", console.join("\n"))
    }
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}
