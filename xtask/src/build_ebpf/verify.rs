//! What must be in the object besides code: bpf-linker silently leaves BTF out when a crate was
//! built without debug info, and the kernel refuses most helpers to a program without licence. The
//! programs must also not take more stack than the verifier of any kernel allows.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use object::{Object as _, ObjectSection as _};

use super::stack;

const LICENSE: &[u8] = b"Dual MIT/GPL\0";

/// The sections of the programs of each object.
pub(super) const STEER: &[&str] = &["sk_skb/stream_verdict", "classifier"];
pub(super) const FAULTS: &[&str] = &["classifier"];

pub(super) fn check(path: &Path, programs: &[&str]) -> Result<()> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    check_bytes(&bytes, programs).with_context(|| format!("{} cannot be loaded", path.display()))
}

fn check_bytes(bytes: &[u8], programs: &[&str]) -> Result<()> {
    let file = object::File::parse(bytes).context("not an object file")?;
    ensure!(file.architecture() == object::Architecture::Bpf, "it is for {:?}", file.architecture());
    let section = |name: &str| -> Result<&[u8]> {
        let section = file.section_by_name(name).with_context(|| format!("section {name} is missing"))?;
        let data = section.data().with_context(|| format!("section {name} cannot be read"))?;
        ensure!(!data.is_empty(), "section {name} is empty");
        Ok(data)
    };
    for name in [".BTF", ".BTF.ext", "maps"].iter().chain(programs) {
        section(name)?;
    }
    ensure!(section("license")? == LICENSE, "its licence is not {LICENSE:?}");
    let usages = stack::usages(&file).context("its stack cannot be measured")?;
    ensure!(!usages.is_empty(), "it has no program");
    usages.iter().for_each(|usage| eprintln!("build-ebpf: {usage}"));
    usages.iter().try_for_each(stack::Usage::check)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_files_are_refused() {
        assert!(check_bytes(b"", STEER).is_err());
        assert!(check_bytes(b"\x7fELF and nothing more", STEER).is_err());
        let host = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let error = check_bytes(&host, STEER).unwrap_err().to_string();
        assert!(error.starts_with("it is for"), "{error}");
    }
}
