//! Makes the BPF object that `cargo xtask build-ebpf` has built part of `steer`.
//!
//! Without it a debug build gets an empty one, so that `cargo check` and the unit tests need no BPF
//! compiler; the splices then say that it is missing. A release build must not come to that.

use std::env;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

const OBJECT: &str = "target/bpf/steer-ebpf.o";
/// The same with the feature `other-layout`.
const OTHER_LAYOUT: &str = "target/bpf/steer-ebpf-other-layout.o";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if let Err(error) = embed() {
        println!("cargo::error={error}");
    }
}

fn embed() -> Result<(), String> {
    let variable = |name: &str| env::var(name).map_err(|error| format!("{name}: {error}"));
    let other_layout = env::var_os("CARGO_FEATURE_OTHER_LAYOUT").is_some();
    let name = if other_layout { OTHER_LAYOUT } else { OBJECT };
    let object = Path::new(&variable("CARGO_MANIFEST_DIR")?).join("../..").join(name);
    println!("cargo::rerun-if-changed={}", object.display());

    let is_built = std::fs::metadata(&object).is_ok_and(|object| object.len() > 0);
    if !is_built && variable("PROFILE")? == "release" {
        return Err(format!("the BPF object {name} is missing; run: cargo xtask build-ebpf"));
    }
    if !is_built {
        // A file that does not exist counts as changed at every build.
        leave_empty(&object).map_err(|error| format!("cannot create {}: {error}", object.display()))?;
    }
    let embedded = PathBuf::from(variable("OUT_DIR")?).join("steer-ebpf.o");
    std::fs::copy(&object, &embedded)
        .map(drop)
        .map_err(|error| format!("cannot copy {} to {}: {error}", object.display(), embedded.display()))
}

/// Creates an empty file that is older than this build.
fn leave_empty(object: &Path) -> std::io::Result<()> {
    if let Some(folder) = object.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::File::create(object)?.set_modified(SystemTime::UNIX_EPOCH)
}
