//! `cargo xtask test`: runs every check and every test, one after the other, and prints the
//! results.

use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use steer_tests::require::is_root;

use crate::exec::root;
use crate::suite::{Suite, Work, summarize};
use crate::{build_ebpf, check, setup};

/// A suite that takes longer than this hangs; it is ended and counts as failed.
const LIMIT: Duration = Duration::from_secs(25 * 60);
const LIMIT_LONG: Duration = Duration::from_secs(60 * 60);

/// The suite that runs in virtual machines.
const KERNELS: &str = "kernels";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The long forms of the tests that have one
    #[arg(long)]
    long: bool,
    /// Only this suite (may be repeated): see `--list`
    #[arg(long, value_name = "SUITE")]
    only: Vec<String>,
    /// Print the suites' names
    #[arg(long)]
    list: bool,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let suites = chosen(suites()?, &options.only)?;
    if options.list {
        suites.iter().for_each(|suite| println!("{}", suite.name));
        return Ok(ExitCode::SUCCESS);
    }
    let environment = set_up(&suites, options.long)?;
    let limit = if options.long { LIMIT_LONG } else { LIMIT };
    let outcomes =
        suites.iter().map(|suite| suite.execute(&environment, limit)).collect::<Result<Vec<_>>>()?;
    Ok(if summarize(&outcomes) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// All suites, cheapest first: the checks, then the tests. The integration tests are found by their
/// files.
fn suites() -> Result<Vec<Suite>> {
    let mut suites = check::suites();
    for name in test_files("proxy-userspace/daemon/tests")? {
        suites.push(Suite::cargo(&name, false, &format!("test --locked --package steer --test {name}")));
    }
    suites.push(Suite::cargo("fuzz", false, "run --quiet --locked --package xtask -- fuzz"));
    let harness = "test --locked --package steer-tests --features bench --lib --bins";
    suites.push(Suite::cargo("harness", true, harness));
    for name in test_files("tests/tests")? {
        // One test at a time: the tests count the machine's namespaces, descriptors and memory.
        let args = format!("test --locked --package steer-tests --test {name} -- --test-threads=1");
        suites.push(Suite::cargo(&name, true, &args));
    }
    Ok(suites)
}

/// The names of the test targets in `directory`: files, and directories with a `main.rs`.
fn test_files(directory: &str) -> Result<Vec<String>> {
    let path = root().join(directory);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(&path).with_context(|| format!("cannot list {directory}"))? {
        let entry = entry.with_context(|| format!("cannot list {directory}"))?.path();
        if entry.extension().is_some_and(|extension| extension == "rs") || entry.join("main.rs").exists() {
            names.extend(entry.file_stem().and_then(|name| name.to_str()).map(str::to_owned));
        }
    }
    names.sort();
    Ok(names)
}

fn chosen(suites: Vec<Suite>, only: &[String]) -> Result<Vec<Suite>> {
    let known: Vec<_> = suites.iter().map(|suite| suite.name.clone()).collect();
    if let Some(unknown) = only.iter().find(|name| !known.contains(name)) {
        anyhow::bail!("there is no suite {unknown}; there are: {}", known.join(", "));
    }
    Ok(suites.into_iter().filter(|suite| only.is_empty() || only.contains(&suite.name)).collect())
}

/// Does the set-up that these suites need; returns the variables that tell the tests of it.
fn set_up(suites: &[Suite], long: bool) -> Result<Vec<(&'static str, String)>> {
    let mut environment = vec![("STEER_TESTS_LONG", u8::from(long).to_string())];
    if suites.iter().any(|suite| suite.needs_setup) {
        anyhow::ensure!(
            is_root(),
            "the integration tests make network namespaces and load BPF programs, which needs root. Run:\n  \
             sudo env \"PATH=$PATH\" \"HOME=$HOME\" cargo xtask test\n\
             (without root: cargo xtask check)"
        );
        environment.push(("STEER_BIN", setup::steer(setup::Build::Release)?.display().to_string()));
        environment.push(("STEER_TESTS_REQUIRE", "1".to_owned()));
        // Guests have their own peers.
        if suites.iter().any(|suite| suite.needs_setup && suite.name != KERNELS) {
            setup::socketio()?;
            let peers = setup::peers()?;
            let bench = setup::bench()?;
            environment.push(("STEER_ENVOY_BIN", peers.envoy.display().to_string()));
            environment.push(("STEER_WSTEST", peers.wstest.display().to_string()));
            environment.push(("STEER_BENCH_BIN", bench.binary.display().to_string()));
        }
        if suites.iter().any(|suite| matches!(&*suite.name, "outlive" | "takeover")) {
            setup::steers_of_outlive()?;
        }
        if suites.iter().any(|suite| suite.name == KERNELS) {
            environment.push(("STEER_KERNELS", setup::kernels(long)?.display().to_string()));
        }
    }
    setup::lint_components()?;
    if suites.iter().any(|suite| matches!(&*suite.name, "clippy" | "doc" | "fuzz")) {
        setup::libfuzzer()?;
    }
    if suites.iter().any(|suite| matches!(suite.work, Work::Tool(_))) {
        setup::lint_tools()?;
    }
    if suites.iter().any(|suite| suite.name == build_ebpf::clippy::CHECK) {
        build_ebpf::clippy::install()?;
    }
    Ok(environment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_suite_is_explained() {
        let page = include_str!("../../docs/testing.md");
        for suite in suites().unwrap() {
            assert!(
                page.contains(&format!("`{}`", suite.name)),
                "docs/testing.md has no row for {}",
                suite.name
            );
        }
    }
}
