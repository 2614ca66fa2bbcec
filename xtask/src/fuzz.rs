//! `cargo xtask fuzz`: builds the targets of `fuzz/` with libFuzzer, and lets each look for inputs
//! that its oracle refuses.
//!
//! cargo-fuzz needs a nightly compiler for its sanitizers. The targets need none: what they test is
//! safe Rust. The coverage that libFuzzer goes by is a pass of LLVM, which stable compilers have.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;

use anyhow::{Context as _, Result, ensure};

use crate::exec::{answer, cargo, root, run_quietly, step, target};

const FLAGS: &[&str] = &[
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];
/// Limits of one execution. A parser that needs more for some kilobytes is a finding.
const LIMITS: &[&str] = &["-timeout=5", "-rss_limit_mb=1024", "-max_len=4096"];
/// Seconds for each target, by default and with `cargo xtask test --long`.
const SECONDS: u32 = 10;
const SECONDS_LONG: u32 = 600;

/// Looks for inputs of the parsers that break them (fuzz/targets), with libFuzzer
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only these targets: see fuzz/targets
    targets: Vec<String>,
    /// How long each target runs [default: 10]
    #[arg(long, value_name = "N")]
    seconds: Option<u32>,
    /// How many run at the same time [default: one for each processor]
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let targets = chosen(targets()?, &options.targets)?;
    let seconds = options.seconds.unwrap_or_else(default_seconds);
    let binaries = build()?;
    step(&format!("Fuzzing: {seconds} s for each target"));
    println!("  {:<8} {:>10} {:>8} {:>7} {:>7}", "target", "runs", "runs/s", "edges", "corpus");
    let jobs = options.jobs.unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from));
    let (mut waiting, mut running, mut findings) = (VecDeque::from(targets), VecDeque::new(), Vec::new());
    let all = waiting.len();
    loop {
        while running.len() < jobs.max(1)
            && let Some(target) = waiting.pop_front()
        {
            running.push_back(Running::start(target, &binaries, seconds)?);
        }
        let Some(oldest) = running.pop_front() else { break };
        findings.extend(oldest.finish()?);
    }
    findings.iter().for_each(Finding::print);
    // As libtest says it, so that a suite counts the targets.
    let failed = findings.len();
    let result = if failed == 0 { "ok" } else { "FAILED" };
    println!("\ntest result: {result}. {} passed; {failed} failed", all - failed);
    println!("{}", next(&findings));
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn default_seconds() -> u32 {
    let is_long = std::env::var("STEER_TESTS_LONG").is_ok_and(|long| long == "1");
    if is_long { SECONDS_LONG } else { SECONDS }
}

/// The names of the files in `fuzz/targets`.
fn targets() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(root().join("fuzz/targets")).context("cannot list fuzz/targets")? {
        let path = entry.context("cannot list fuzz/targets")?.path();
        names.extend(path.file_stem().and_then(|name| name.to_str()).map(str::to_owned));
    }
    names.sort();
    Ok(names)
}

fn chosen(targets: Vec<String>, only: &[String]) -> Result<Vec<String>> {
    for name in only {
        ensure!(targets.contains(name), "there is no target {name}; there are: {}", targets.join(", "));
    }
    Ok(targets.into_iter().filter(|name| only.is_empty() || only.contains(name)).collect())
}

/// Everything that `cargo xtask fuzz` makes.
fn directory() -> PathBuf {
    target().join("fuzz")
}

/// Builds all targets; returns where they are.
fn build() -> Result<PathBuf> {
    step("Fuzz targets, with the coverage that libFuzzer goes by (two minutes the first time)");
    let host = answer(Command::new("rustc").arg("-vV"))
        .and_then(|text| text.lines().find_map(|line| line.strip_prefix("host: ").map(str::to_owned)))
        .context("`rustc -vV` does not name the host")?;
    // With a named target, Cargo compiles build scripts and macros without these flags.
    let mut command = cargo(&["build", "--locked", "--package", "steer-fuzz", "--bins", "--profile", "fuzz"]);
    command.args(["--target", &host, "--target-dir"]).arg(directory());
    command.env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"));
    run_quietly(&mut command)?;
    Ok(directory().join(host).join("fuzz"))
}

/// A target that runs.
struct Running {
    target: String,
    command: PathBuf,
    child: Child,
    log: PathBuf,
}

impl Running {
    fn start(target: String, binaries: &Path, seconds: u32) -> Result<Self> {
        let corpus = directory().join("corpus").join(&target);
        let findings = directory().join("findings");
        for directory in [&corpus, &findings] {
            fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
        }
        let log = directory().join(format!("{target}.log"));
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let command = binaries.join(&target);
        let child = Command::new(&command)
            .args(LIMITS)
            .args([format!("-max_total_time={seconds}"), "-print_final_stats=1".to_owned()])
            .arg(format!("-artifact_prefix={}/{target}-", findings.display()))
            // What is found goes to the first one; the others are only read.
            .arg(corpus)
            .args(seeds(&target))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot run {}", command.display()))?;
        Ok(Self { target, command, child, log })
    }

    /// Waits for its end, and prints a row of the table.
    fn finish(mut self) -> Result<Option<Finding>> {
        let status = self.child.wait().with_context(|| format!("cannot wait for {}", self.target))?;
        let text = fs::read(&self.log).with_context(|| format!("cannot read {}", self.log.display()))?;
        let text = String::from_utf8_lossy(&text);
        let Stats { runs, rate, edges, corpus } = Stats::of(&text);
        let name = &self.target;
        let end = if status.success() { "" } else { "  FOUND" };
        println!("  {name:<8} {runs:>10} {rate:>8} {edges:>7} {corpus:>7}{end}");
        Ok((!status.success()).then(|| Finding::of(self.command, self.log, &text)))
    }
}

/// Where a target's seeds are.
fn seeds(target: &str) -> Vec<PathBuf> {
    let own = root().join("fuzz/seeds").join(target);
    let examples = (target == "config").then(|| root().join("examples"));
    [own].into_iter().chain(examples).collect()
}

/// What libFuzzer says at the end, as it says it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Stats {
    runs: String,
    rate: String,
    edges: String,
    corpus: String,
}

impl Stats {
    /// Of lines like `#1234 DONE cov: 56 ft: 78 corp: 9/10b ...` and `stat::average_exec_per_sec:
    /// 123`.
    fn of(text: &str) -> Self {
        let stat = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix("stat::")?.strip_prefix(name));
            line.map_or_else(|| "-".to_owned(), |value| value.trim_start_matches(':').trim().to_owned())
        };
        let status = text.lines().rev().find(|line| line.starts_with('#') && line.contains(" cov: "));
        let after = |name: &str| {
            let words = status.unwrap_or_default().split_whitespace();
            words.skip_while(|word| *word != name).nth(1).map_or_else(|| "-".to_owned(), str::to_owned)
        };
        let corpus = after("corp:");
        Self {
            runs: stat("number_of_executed_units"),
            rate: stat("average_exec_per_sec"),
            edges: after("cov:"),
            corpus: corpus.split('/').next().unwrap_or_default().to_owned(),
        }
    }
}

/// An input that a target's oracle refuses.
#[derive(Debug)]
struct Finding {
    why: String,
    /// The command that shows it again.
    replay: Option<String>,
    log: PathBuf,
}

impl Finding {
    fn of(command: PathBuf, log: PathBuf, text: &str) -> Self {
        let file = text.lines().find_map(|line| Some(line.split_once("Test unit written to ")?.1));
        // The message of a panic begins on the line after its place, and may have several.
        let mut lines =
            text.lines().skip_while(|line| !line.contains("panicked at ") && !line.contains("ERROR: "));
        let why = lines
            .by_ref()
            .take_while(|line| !line.starts_with("note: ") && *line != "stack backtrace:")
            .take(6);
        Self {
            why: why.collect::<Vec<_>>().join("\n    "),
            replay: file.map(|file| format!("{} {}", command.display(), file.trim())),
            log,
        }
    }

    fn print(&self) {
        println!("\n  {}", self.why);
        match &self.replay {
            Some(replay) => println!("  replay: {replay}"),
            None => println!("  it ended without an input"),
        }
        println!("  all of its output: {}", self.log.display());
    }
}

/// What to do after these findings.
fn next(findings: &[Finding]) -> String {
    if findings.is_empty() {
        return format!(
            "next: `cargo xtask fuzz --seconds {SECONDS_LONG}` looks longer; what was learned is kept in {}",
            directory().join("corpus").display()
        );
    }
    "next: run the replay, correct the code, and keep the input in fuzz/seeds/TARGET or as a unit test"
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_built_and_has_seeds() {
        let manifest = fs::read_to_string(root().join("fuzz/Cargo.toml")).unwrap();
        let found = targets().unwrap();
        assert!(!found.is_empty());
        for target in found {
            assert!(manifest.contains(&format!("path = \"targets/{target}.rs\"")), "{target}");
            for directory in seeds(&target) {
                assert!(fs::read_dir(&directory).unwrap().next().is_some(), "{}", directory.display());
            }
        }
    }

    #[test]
    fn targets_are_chosen_by_name() {
        let all = || vec!["http".to_owned(), "wire".to_owned()];
        assert_eq!(chosen(all(), &[]).unwrap(), all());
        assert_eq!(chosen(all(), &["wire".to_owned()]).unwrap(), ["wire"]);
        let error = chosen(all(), &["htp".to_owned()]).unwrap_err().to_string();
        assert_eq!(error, "there is no target htp; there are: http, wire");
    }

    #[test]
    fn what_libfuzzer_says_is_read() {
        let text = "#2\tINITED cov: 3 ft: 4 corp: 1/1b exec/s: 0\n\
            #99\tDONE   cov: 56 ft: 78 corp: 9/10b lim: 4 exec/s: 11 rss: 30Mb\n\
            Done 99 runs in 9 second(s)\n\
            stat::number_of_executed_units: 99\nstat::average_exec_per_sec:     11\n";
        let [runs, rate, edges, corpus] = ["99", "11", "56", "9"].map(str::to_owned);
        assert_eq!(Stats::of(text), Stats { runs, rate, edges, corpus });
    }

    #[test]
    fn a_finding_has_its_message_and_the_command_that_shows_it_again() {
        let text = "#9\tNEW cov: 1 ft: 1\n\nthread '<unnamed>' (7) panicked at fuzz/targets/a.rs:1:2:\n\
            assertion failed\nstack backtrace:\n   0: rust_begin_unwind\nTest unit written to /f/a-crash-1\n";
        let finding = Finding::of("/b/a".into(), "/l".into(), text);
        assert_eq!(finding.replay.as_deref(), Some("/b/a /f/a-crash-1"));
        assert!(finding.why.ends_with("a.rs:1:2:\n    assertion failed"), "{}", finding.why);
    }
}
