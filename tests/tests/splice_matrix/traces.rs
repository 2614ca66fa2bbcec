//! The settings and the packet filter of a host, to see whether Steer has changed them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use steer_tests::netns::NetNs;
use steer_tests::process::quiet;

/// Settings that only count something.
const COUNTERS: [&str; 1] = ["/proc/sys/net/netfilter/nf_conntrack_count"];

/// The names of all settings and their values, and the rules of the packet filter.
pub(crate) type Traces = BTreeMap<String, String>;

pub(crate) fn of(host: &NetNs) -> Result<Traces> {
    let settings = |traces: &mut Traces| {
        ["ipv4", "ipv6", "netfilter"]
            .iter()
            .try_for_each(|part| collect(&Path::new("/proc/sys/net").join(part), traces))
    };
    let mut traces = Traces::new();
    // The thread that opens a file decides whose setting it is.
    host.run(|| settings(&mut traces))??;
    let mut command = quiet("nft");
    command.args(["list", "ruleset"]);
    host.enter(&mut command)?;
    let output = command.output().context("cannot run nft")?;
    ensure!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr));
    traces.insert("nft list ruleset".to_owned(), String::from_utf8_lossy(&output.stdout).into_owned());
    Ok(traces)
}

fn collect(directory: &Path, traces: &mut Traces) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))? {
        let path = entry.with_context(|| format!("cannot list {}", directory.display()))?.path();
        if path.is_dir() {
            collect(&path, traces)?;
        } else if let Ok(value) = fs::read_to_string(&path) {
            // Some files can only be written.
            traces.insert(path.display().to_string(), value);
        }
    }
    COUNTERS.iter().for_each(|name| drop(traces.remove(*name)));
    Ok(())
}

/// What is not the same, with both values.
pub(crate) fn differences(before: &Traces, after: &Traces) -> Vec<String> {
    let mut names: Vec<_> = before.keys().chain(after.keys()).collect();
    names.sort();
    names.dedup();
    names.retain(|name| before.get(*name) != after.get(*name));
    names.iter().map(|name| format!("{name}: {:?}, then {:?}", before.get(*name), after.get(*name))).collect()
}
