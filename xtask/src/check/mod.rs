//! `cargo xtask check`: what a change has to pass before a review. Needs no root and installs
//! nothing.

mod markdown;
mod paths;
#[cfg(test)]
mod walls;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::build_ebpf::clippy;
use crate::lint_tools::{DENY, TYPOS, Tool};
use crate::suite::{Outcome, Suite, Work, summarize};

/// A check that takes longer than this hangs. A first build on a slow machine takes some minutes.
const LIMIT: Duration = Duration::from_secs(15 * 60);

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Leave these checks out (several: with commas)
    #[arg(long, value_name = "CHECK", value_delimiter = ',')]
    without: Vec<String>,
}

/// The checks, cheapest first. `cargo xtask test` begins with the same.
pub(crate) fn suites() -> Vec<Suite> {
    let tool = |tool: &'static Tool| Suite {
        name: tool.name.to_owned(),
        work: Work::Tool(tool),
        needs_setup: false,
    };
    vec![
        Suite::cargo("fmt", false, "fmt --all --check"),
        Suite { name: "markdown".to_owned(), work: Work::Own(markdown::check), needs_setup: false },
        tool(&TYPOS),
        tool(&DENY),
        Suite::cargo(
            "clippy",
            false,
            "clippy --locked --workspace --all-targets --all-features -- -D warnings",
        ),
        Suite { name: clippy::CHECK.to_owned(), work: Work::Found(clippy::command), needs_setup: false },
        Suite::cargo(
            "doc",
            false,
            r#"--config build.rustdocflags=["-Dwarnings"] doc --locked --workspace --all-features --no-deps --document-private-items"#,
        ),
        Suite::cargo("unit", false, "test --locked --lib --bins"),
    ]
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let suites = without(suites(), &options.without)?;
    let outcomes = suites.iter().map(|suite| suite.execute(&[], LIMIT)).collect::<Result<Vec<_>>>()?;
    let good = summarize(&outcomes);
    if !options.without.is_empty() {
        println!("left out: {}", options.without.join(", "));
    }
    println!("{}", next(&outcomes));
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn without(suites: Vec<Suite>, left_out: &[String]) -> Result<Vec<Suite>> {
    for name in left_out {
        let known: Vec<_> = suites.iter().map(|suite| &*suite.name).collect();
        ensure!(known.contains(&&**name), "there is no check {name}; there are: {}", known.join(", "));
    }
    Ok(suites.into_iter().filter(|suite| !left_out.contains(&suite.name)).collect())
}

/// What to do after these outcomes.
fn next(outcomes: &[Outcome]) -> String {
    let failed: Vec<_> =
        outcomes.iter().filter(|outcome| outcome.failed > 0).map(|outcome| &*outcome.name).collect();
    if failed.is_empty() {
        return "next: commit. As root, `cargo xtask test` runs every test; `--only SUITE` runs one"
            .to_owned();
    }
    let names = failed.join(", ");
    format!("next: correct what {names} found (look for \"==> Suite\" above), then cargo xtask check again")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_left_out_by_name() {
        let left = without(suites(), &["typos".to_owned(), "deny".to_owned()]).unwrap();
        assert_eq!(left.len(), suites().len() - 2);
        assert!(left.iter().all(|suite| suite.name != "typos" && suite.name != "deny"));
        let error = without(suites(), &["typo".to_owned()]).unwrap_err().to_string();
        assert!(error.starts_with("there is no check typo; there are: fmt, "), "{error}");
    }

    #[test]
    fn the_next_step_names_what_failed() {
        let outcome = |name: &str, failed| Outcome { name: name.to_owned(), passed: 1, failed, took: LIMIT };
        assert!(next(&[outcome("fmt", 0), outcome("doc", 0)]).starts_with("next: commit"));
        let text = next(&[outcome("fmt", 1), outcome("unit", 0), outcome("doc", 2)]);
        assert!(text.starts_with("next: correct what fmt, doc found"), "{text}");
    }
}
