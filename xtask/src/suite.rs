//! A suite of `cargo xtask test` and a check of `cargo xtask check`: one shape, run and counted in
//! one way.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::exec::{cargo, root, step};
use crate::lint_tools::Tool;

#[derive(Debug)]
pub(crate) struct Suite {
    pub(crate) name: String,
    pub(crate) work: Work,
    /// Root, the release build of `steer` and its peers.
    pub(crate) needs_setup: bool,
}

/// What a suite does.
#[derive(Debug)]
pub(crate) enum Work {
    /// Runs cargo with these arguments.
    Cargo(Vec<String>),
    /// Runs a tool that is not part of a Rust toolchain.
    Tool(&'static Tool),
    /// Runs the command that this function finds. The function's error says how to install what is missing.
    Found(fn() -> Result<Command>),
    /// Calls a function of this program. The function's error says what is wrong.
    Own(fn() -> Result<()>),
}

impl Suite {
    /// A suite that runs cargo with `args`, which have blanks between them.
    pub(crate) fn cargo(name: &str, needs_setup: bool, args: &str) -> Self {
        let args = args.split(' ').map(str::to_owned).collect();
        Self { name: name.to_owned(), work: Work::Cargo(args), needs_setup }
    }

    /// Runs the suite with these variables, its output in sight. A suite that takes longer than
    /// `limit` is ended, and counts as failed.
    ///
    /// # Errors
    ///
    /// If the suite could not be run at all. A suite that fails is an [`Outcome`].
    pub(crate) fn execute(&self, environment: &[(&str, String)], limit: Duration) -> Result<Outcome> {
        step(&format!("Suite {}", self.name));
        let begin = Instant::now();
        let (passed, failed) = match &self.work {
            Work::Cargo(args) => {
                let args: Vec<_> = args.iter().map(String::as_str).collect();
                count(&cargo(&args), environment, limit)?
            }
            Work::Tool(tool) => count_if_found(tool.command(), environment, limit)?,
            Work::Found(find) => count_if_found(find(), environment, limit)?,
            Work::Own(check) => check().map_or_else(|wrong| failure(&wrong), |()| (1, 0)),
        };
        Ok(Outcome { name: self.name.clone(), passed, failed, took: begin.elapsed() })
    }
}

fn count_if_found(
    tested: Result<Command>,
    environment: &[(&str, String)],
    limit: Duration,
) -> Result<(u64, u64)> {
    tested.map_or_else(|missing| Ok(failure(&missing)), |command| count(&command, environment, limit))
}

/// Prints why a check failed; returns its numbers of passed and failed tests.
fn failure(why: &anyhow::Error) -> (u64, u64) {
    println!("{why:#}");
    (0, 1)
}

/// What became of a suite. A check without single tests counts as one.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) name: String,
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) took: Duration,
}

/// Runs `tested` and counts what libtest says.
fn count(tested: &Command, environment: &[(&str, String)], limit: Duration) -> Result<(u64, u64)> {
    // coreutils' timeout ends the whole process group.
    let mut command = Command::new("timeout");
    command.args(["--kill-after=10", &limit.as_secs().to_string()]);
    command.arg(tested.get_program()).args(tested.get_args()).current_dir(root());
    for (name, value) in tested.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.envs(environment.iter().map(|(name, value)| (name, value)));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run timeout(1) of coreutils")?;
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
    Ok((passed, failed))
}

/// The numbers of `test result: ok. 3 passed; 0 failed; ...`.
fn counts(line: &str) -> Option<(u64, u64)> {
    let numbers = line.strip_prefix("test result: ")?.split_once(". ")?.1;
    let number = |word: &str| numbers.split("; ").find_map(|part| part.strip_suffix(word)?.parse().ok());
    Some((number(" passed")?, number(" failed")?))
}

/// Prints the table and the closing line; returns whether all is well.
pub(crate) fn summarize(outcomes: &[Outcome]) -> bool {
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
    fn a_suite_runs_with_the_variables_of_its_command() {
        let mut command = Command::new("sh");
        command.args(["-c", r#"test "$SET" = yes && test -z "$HOME""#]).env("SET", "yes").env_remove("HOME");
        assert_eq!(count(&command, &[], Duration::from_secs(10)).unwrap(), (1, 0));
        assert_eq!(count(command.env("SET", "no"), &[], Duration::from_secs(10)).unwrap(), (0, 1));
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
