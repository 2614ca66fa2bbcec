//! `cargo xtask test`: every check and every test, one after the other, and what became of them.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use steer_tests::require::is_root;

use crate::exec::{cargo, root, step};
use crate::setup;

/// A suite that takes longer than this hangs; it is ended and counts as failed.
const LIMIT: Duration = Duration::from_secs(15 * 60);
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

#[derive(Debug)]
struct Suite {
    name: String,
    /// After `cargo`.
    args: Vec<String>,
    /// Root, the release build of `steer` and its peers.
    needs_setup: bool,
}

/// What became of a suite. A check without single tests counts as one.
#[derive(Debug)]
struct Outcome {
    name: String,
    passed: u64,
    failed: u64,
    took: Duration,
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
        suites.iter().map(|suite| execute(suite, &environment, limit)).collect::<Result<Vec<_>>>()?;
    Ok(if summarize(&outcomes) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// All suites, cheapest first. The integration tests are found by their files.
fn suites() -> Result<Vec<Suite>> {
    let suite = |name: &str, needs_setup: bool, args: &str| Suite {
        name: name.to_owned(),
        args: args.split(' ').map(str::to_owned).collect(),
        needs_setup,
    };
    let mut suites = vec![
        suite("fmt", false, "fmt --all --check"),
        suite("clippy", false, "clippy --locked --workspace --all-targets --all-features -- -D warnings"),
        suite("unit", false, "test --locked --lib --bins"),
    ];
    for name in test_files("proxy-userspace/tests")? {
        suites.push(suite(&name, false, &format!("test --locked --package proxy-userspace --test {name}")));
    }
    suites.push(suite("harness", true, "test --locked --package steer-tests --features bench --lib --bins"));
    for name in test_files("tests/tests")? {
        // One at a time: they count the machine's namespaces, descriptors and memory.
        let args = format!("test --locked --package steer-tests --test {name} -- --test-threads=1");
        suites.push(suite(&name, true, &args));
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
             (without root: cargo xtask test --only fmt --only clippy --only unit)"
        );
        environment.push(("STEER_BIN", setup::steer()?.display().to_string()));
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
    setup::lint_tools()?;
    Ok(environment)
}

/// Runs a suite, its output in sight, and counts what libtest says.
fn execute(suite: &Suite, environment: &[(&str, String)], limit: Duration) -> Result<Outcome> {
    step(&format!("Suite {}", suite.name));
    let begin = Instant::now();
    let tested = cargo(&suite.args.iter().map(String::as_str).collect::<Vec<_>>());
    // coreutils' timeout ends the whole process group.
    let mut command = Command::new("timeout");
    command.args(["--kill-after=10", &limit.as_secs().to_string()]);
    command.arg(tested.get_program()).args(tested.get_args()).current_dir(root());
    command.envs(environment.iter().map(|(name, value)| (name, value)));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run timeout and cargo")?;
    let stdout = child.stdout.take().context("the suite has no standard output")?;
    let (mut passed, mut failed) = (0, 0);
    for line in BufReader::new(stdout).lines() {
        let line = line.context("cannot read the suite's output")?;
        println!("{line}");
        if let Some(counts) = counts(&line) {
            passed += counts.0;
            failed += counts.1;
        }
    }
    let status = child.wait().context("cannot wait for the suite")?;
    if passed + failed == 0 && status.success() {
        passed = 1;
    } else if failed == 0 && !status.success() {
        failed = 1;
    }
    Ok(Outcome { name: suite.name.clone(), passed, failed, took: begin.elapsed() })
}

/// The numbers of `test result: ok. 3 passed; 0 failed; ...`.
fn counts(line: &str) -> Option<(u64, u64)> {
    let numbers = line.strip_prefix("test result: ")?.split_once(". ")?.1;
    let number = |word: &str| numbers.split("; ").find_map(|part| part.strip_suffix(word)?.parse().ok());
    Some((number(" passed")?, number(" failed")?))
}

/// Prints the table and the closing line; returns whether all is well.
fn summarize(outcomes: &[Outcome]) -> bool {
    step("Summary");
    println!("  {:<20} {:>7} {:>7} {:>9}", "suite", "passed", "failed", "seconds");
    for Outcome { name, passed, failed, took } in outcomes {
        println!("  {name:<20} {passed:>7} {failed:>7} {:>9.1}", took.as_secs_f64());
    }
    let passed: u64 = outcomes.iter().map(|outcome| outcome.passed).sum();
    let failed: u64 = outcomes.iter().map(|outcome| outcome.failed).sum();
    println!("\n{passed} passed, {failed} failed");
    failed == 0
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

    #[test]
    fn libtest_lines_are_counted() {
        let ok =
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.13s";
        assert_eq!(counts(ok), Some((12, 0)));
        assert_eq!(counts("test result: FAILED. 6 passed; 2 failed; 0 ignored"), Some((6, 2)));
        assert_eq!(counts("test a ... ok"), None);
    }
}
