//! The file system of a guest: a few programs of the host with their libraries, Steer, and
//! `steer-guest`.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use steer_tests::cpio::Archive;
use steer_tests::steer;

/// Programs of the host. `init` uses the first one, the harness uses the others.
const TOOLS: [&str; 3] = ["busybox", "ip", "tc"];
const DIRECTORIES: [&str; 7] = ["bin", "dev", "proc", "run", "sys", "tmp", "var"];

/// Writes the initramfs to `to`: first `modules`, an archive with `modules/*.ko`, then an archive
/// with everything else.
pub(crate) fn write(to: &Path, modules: &Path, phases: &str) -> Result<()> {
    fs::copy(modules, to).with_context(|| format!("cannot copy {}", modules.display()))?;
    let file = File::options().append(true).open(to).context("cannot open the initramfs")?;
    let mut archive = Archive::new(BufWriter::new(file));
    let mut programs =
        vec![("steer", steer::binary()?), ("steer-guest", PathBuf::from(env!("CARGO_BIN_EXE_steer-guest")))];
    for tool in TOOLS {
        programs.push((tool, on_path(tool)?));
    }
    let mut libraries = BTreeSet::new();
    for (_, path) in &programs {
        libraries.extend(libraries_of(path)?);
    }
    // In sorted order, a directory comes before its contents.
    let mut directories: BTreeSet<_> = DIRECTORIES.map(PathBuf::from).into();
    for library in &libraries {
        let parents = library.ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty());
        directories.extend(parents.map(Path::to_owned));
    }
    for directory in &directories {
        archive.directory(text(directory)?)?;
    }
    for library in &libraries {
        archive.file(text(library)?, &read(&Path::new("/").join(library))?)?;
    }
    for (name, path) in &programs {
        archive.file(&format!("bin/{name}"), &read(path)?)?;
    }
    // iproute2 keeps the names of namespaces there.
    archive.link("var/run", "/run")?;
    archive.file("init", init(phases).as_bytes())?;
    archive.end()?;
    Ok(())
}

/// The first program of the guest. The console shows its output.
fn init(phases: &str) -> String {
    format!(
        "\
#!/bin/busybox sh
export PATH=/bin STEER_BIN=/bin/steer RUST_BACKTRACE=0
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t devtmpfs dev /dev
busybox mount -t tmpfs run /run
for module in /modules/*.ko; do
    busybox insmod $module || echo \"cannot load $module\"
done
busybox ip link set lo up
busybox stty -F {REPORT} raw
steer-guest {REPORT} {phases}
busybox poweroff -f
",
        REPORT = crate::boot::REPORT
    )
}

/// The libraries of `program`, without the leading slash. None for a static program.
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    // A line is `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f...)`, or the path alone.
    let words = text.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    Ok(words.map(|path| PathBuf::from(path.trim_start_matches('/'))).collect())
}

fn on_path(program: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(program)).find(|path| path.is_file());
    found.with_context(|| format!("{program} is not on PATH"))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not valid UTF-8", path.display()))
}
