//! Stock kernels, for the suite `kernels`. Each comes from the suite of Debian or Ubuntu that it
//! belongs to, by a state of apt of its own, so that the host's packages stay as they are, and is
//! only unpacked. Debian's mirror is the host's.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use steer_tests::cpio::Archive;
use steer_tests::kernels::{Distribution, Kernel, UBUNTU_MIRROR, of_form};

use super::{Package, debian_packages, text_of};
use crate::exec::{answer, run_quietly, step, target};

/// The dependencies of the metapackage that make up a kernel: one package for older kernels, and
/// more for newer ones.
const PARTS: [&str; 4] = ["linux-image-", "linux-base-", "linux-binary-", "linux-modules-"];
/// Modules that no guest needs.
const LEFT_OUT: &str = "linux-modules-extra-";
/// What the guests need beyond what is built in.
const MODULES: [&str; 5] = ["veth", "sch_ingress", "cls_bpf", "virtio_pci", "virtio_net"];

/// The directory with a directory for each suite: `vmlinuz`, `modules.cpio` (to be loaded in the
/// order of their names) and `release`.
pub(crate) fn kernels(long: bool) -> Result<PathBuf> {
    step("Set-up: QEMU and stock kernels");
    debian_packages(&[
        ("qemu-system-x86", has_qemu as fn() -> bool),
        ("busybox-static", has_busybox),
        ("kmod", has_depmod),
        ("xz-utils", has_xz),
        ("zstd", has_zstd),
    ] as &[Package])?;
    let directory = target().join("kernels");
    for kernel in of_form(long) {
        let name = kernel.name();
        let place = directory.join(&name);
        match text_of(&place.join("release")) {
            Ok(release) => println!("    {name} has {release} already"),
            Err(_) => prepare(&kernel, &place).with_context(|| format!("no kernel of {name}"))?,
        }
    }
    Ok(directory)
}

fn prepare(kernel: &Kernel, place: &Path) -> Result<()> {
    let work = place.join("work");
    if work.exists() {
        fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))?;
    }
    let apt = Apt::of_kernel(kernel, &work.join("apt"))?;
    for package in apt.packages(kernel.package)? {
        apt.extract(&package, &work.join("root"))?;
    }
    let root = work.join("root");
    let release = release(&root)?;
    let image =
        [root.join("boot").join(format!("vmlinuz-{release}")), modules(&root, &release).join("vmlinuz")];
    let image = image.iter().find(|path| path.exists()).context("the packages have no vmlinuz")?;
    fs::copy(image, place.join("vmlinuz")).context("cannot copy the kernel")?;
    write_modules(&root, &release, &place.join("modules.cpio"))?;
    fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))?;
    // This file comes last: it tells that everything is there.
    fs::write(place.join("release"), &release).context("cannot write the kernel's release")
}

/// The state of apt for one suite.
#[derive(Debug)]
struct Apt {
    directory: PathBuf,
}

impl Apt {
    fn of_kernel(kernel: &Kernel, directory: &Path) -> Result<Self> {
        for part in ["state/lists/partial", "cache/archives/partial", "packages"] {
            let part = directory.join(part);
            fs::create_dir_all(&part).with_context(|| format!("cannot make {}", part.display()))?;
        }
        let suite = kernel.suite;
        let sources = match kernel.distribution {
            Distribution::Debian => format!("deb {} {suite} main\n", mirror()?),
            Distribution::Ubuntu => {
                let mirror = std::env::var(UBUNTU_MIRROR).context("no mirror of Ubuntu")?;
                // Debian does not have Ubuntu's keys. The kernel only runs in a guest without a
                // network.
                format!("deb [trusted=yes] {mirror} {suite} main\n")
            }
        };
        fs::write(directory.join("sources.list"), sources).context("cannot write the list of sources")?;
        fs::write(directory.join("apt.conf"), Self::settings(directory))
            .context("cannot write apt's settings")?;
        let apt = Self { directory: directory.to_owned() };
        run_quietly(apt.command("apt-get").arg("update"))?;
        Ok(apt)
    }

    /// What makes apt use `directory` and nothing of the host but its keys.
    fn settings(directory: &Path) -> String {
        let place = directory.display();
        format!(
            "\
Dir::State \"{place}/state\";
Dir::State::Status \"/dev/null\";
Dir::Cache \"{place}/cache\";
Dir::Etc::SourceList \"{place}/sources.list\";
Dir::Etc::SourceParts \"-\";
Acquire::Languages \"none\";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";
// apt's own user may not be able to read this directory.
APT::Sandbox::User \"root\";
"
        )
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.directory.join("apt.conf"));
        command
    }

    /// The packages that make the newest kernel of the suite.
    fn packages(&self, metapackage: &str) -> Result<BTreeSet<String>> {
        let mut found = BTreeSet::new();
        let mut open = vec![metapackage.to_owned()];
        while let Some(package) = open.pop() {
            let text = answer(self.command("apt-cache").args(["depends", "--important", &package]))
                .with_context(|| format!("apt does not know {package}"))?;
            for name in text.lines().filter_map(|line| line.trim().strip_prefix("Depends: ")) {
                let is_wanted = PARTS.iter().any(|prefix| name.starts_with(prefix))
                    && name.contains(|c: char| c.is_ascii_digit())
                    && !name.starts_with('<')
                    && !name.starts_with(LEFT_OUT);
                if is_wanted && found.insert(name.to_owned()) {
                    open.push(name.to_owned());
                }
            }
        }
        ensure!(!found.is_empty(), "{metapackage} names no kernel");
        Ok(found)
    }

    fn extract(&self, package: &str, root: &Path) -> Result<()> {
        let packages = self.directory.join("packages");
        run_quietly(self.command("apt-get").args(["download", package]).current_dir(&packages))?;
        for entry in fs::read_dir(&packages).context("cannot list what was downloaded")? {
            let archive = entry.context("cannot list what was downloaded")?.path();
            run_quietly(Command::new("dpkg").arg("-x").arg(&archive).arg(root))?;
            fs::remove_file(&archive).with_context(|| format!("cannot remove {}", archive.display()))?;
        }
        Ok(())
    }
}

/// Where the host has its Debian from.
fn mirror() -> Result<String> {
    let format = "$(ORIGIN) $(LABEL) $(REPO_URI)";
    let text = answer(Command::new("apt-get").args(["indextargets", "--format", format]))
        .context("apt cannot say what its sources are")?;
    let mirror = text.lines().find_map(|line| line.strip_prefix("Debian Debian ")).map(str::to_owned);
    mirror.context("no source of apt here is Debian's: the kernels come from a host with Debian")
}

fn has_modules(tree: &Path) -> bool {
    fs::read_dir(tree).is_ok_and(|mut entries| entries.next().is_some())
}

/// Where the packages have `lib/modules`: newer ones under /usr.
fn base(root: &Path) -> PathBuf {
    let usr = root.join("usr");
    if has_modules(&usr.join("lib/modules")) { usr } else { root.to_owned() }
}

fn modules(root: &Path, release: &str) -> PathBuf {
    base(root).join("lib/modules").join(release)
}

fn release(root: &Path) -> Result<String> {
    let directory = base(root).join("lib/modules");
    let mut entries = fs::read_dir(&directory).context("the packages have no modules")?;
    let entry = entries.next().context("the packages have no modules")?.context("cannot list the modules")?;
    entry.file_name().into_string().ok().context("a kernel's release is no text")
}

/// Writes the modules that are wanted, and what they depend on, as `modules/00-NAME.ko` and so on.
fn write_modules(root: &Path, release: &str, to: &Path) -> Result<()> {
    run_quietly(Command::new("depmod").arg("-b").arg(base(root)).arg(release))?;
    let tree = modules(root, release);
    let dependencies = text_of(&tree.join("modules.dep"))?;
    let built_in = text_of(&tree.join("modules.builtin"))?;
    let mut order: Vec<&str> = Vec::new();
    for wanted in MODULES {
        if built_in.lines().any(|path| name_of(path) == wanted) {
            continue;
        }
        let line = dependencies.lines().find_map(|line| {
            let (path, needs) = line.split_once(':')?;
            (name_of(path) == wanted).then_some((path, needs))
        });
        let (path, needs) = line.with_context(|| format!("Linux {release} has no module {wanted}"))?;
        // In this list, a module comes before the modules that it needs.
        for path in needs.split_whitespace().rev().chain([path]) {
            if !order.contains(&path) {
                order.push(path);
            }
        }
    }
    let file = File::create(to).with_context(|| format!("cannot make {}", to.display()))?;
    let mut archive = Archive::new(file);
    let cannot_write = || format!("cannot write {}", to.display());
    archive.directory("modules").with_context(cannot_write)?;
    for (number, path) in order.iter().enumerate() {
        let name = format!("modules/{number:02}-{}.ko", name_of(path));
        archive.file(&name, &unpacked(&tree.join(path))?).with_context(cannot_write)?;
    }
    archive.end().with_context(cannot_write)?;
    Ok(())
}

/// `veth` of `kernel/drivers/net/veth.ko.xz`.
fn name_of(path: &str) -> &str {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file)
}

/// The content of a module: insmod does not unpack.
fn unpacked(module: &Path) -> Result<Vec<u8>> {
    let program = match module.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::read(module).with_context(|| format!("cannot read {}", module.display())),
    };
    let output = Command::new(program).arg("-dc").arg(module).output();
    let output = output.with_context(|| format!("cannot run {program}"))?;
    ensure!(output.status.success(), "{program} cannot unpack {}", module.display());
    Ok(output.stdout)
}

fn has_qemu() -> bool {
    answer(Command::new("qemu-system-x86_64").arg("--version")).is_some()
}

fn has_busybox() -> bool {
    answer(Command::new("busybox").args(["sh", "-c", "true"])).is_some()
}

fn has_depmod() -> bool {
    answer(Command::new("depmod").arg("--version")).is_some()
}

fn has_xz() -> bool {
    answer(Command::new("xz").arg("--version")).is_some()
}

fn has_zstd() -> bool {
    answer(Command::new("zstd").arg("--version")).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_named_by_their_files() {
        assert_eq!(name_of("kernel/drivers/net/veth.ko.xz"), "veth");
        assert_eq!(name_of("kernel/net/sched/cls_bpf.ko"), "cls_bpf");
    }
}
