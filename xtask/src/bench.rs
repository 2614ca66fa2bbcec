//! `cargo xtask bench`: sets up what is missing and runs `steer-bench`
//! (`tests/src/bin/steer-bench`), which does the rest.

use std::ffi::OsString;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};

use crate::exec::step;
use crate::setup;

/// Sets up what is missing and measures Steer beside a direct connection, HAProxy, nginx and Envoy
#[derive(Debug, clap::Args)]
#[command(after_help = "\
What OPTION may be:
  --quick          the cases that say most, within four minutes
  --full           more and longer rounds, for numbers to publish
  --only NAME      only cases whose names begin so: echo, echo/100x64, bulk, fan_out,
                   upgrades, polling, memory, programs, outlive (several: with commas)
  --peers LIST     only these beside the direct connection: steer-packet,
                   steer-sockmap, steer-relay, haproxy, nginx, envoy
  --rounds N       rounds of each case
  --span-ms MS     what is measured in each round, after its warm-up
  --client-sysctl NAME=VALUE
                   a setting of the clients' host, for example
                   net.ipv4.tcp_timestamps=0, as Windows has it
  --json FILE      write the results
  --report [FILE]  make the plots and tables under docs/ from these results,
                   or from those of FILE without measuring
  --check FILE     compare the ratios with those in FILE; regressions are printed
                   and make the exit code 1

Numbers are of this machine, and of this run: compare ratios only.")]
pub(crate) struct Options {
    /// See below
    #[arg(value_name = "OPTION", trailing_var_arg = true, allow_hyphen_values = true)]
    options: Vec<OsString>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let mut command;
    if measures(&options.options) {
        let steer = setup::steer(setup::Build::Release)?;
        let bench = setup::bench()?;
        command = Command::new(bench.binary);
        command.env("STEER_BIN", steer).env("STEER_ENVOY_BIN", bench.envoy);
        step("Benchmark");
    } else {
        command = Command::new(setup::steer_bench()?);
    }
    let status = command.args(&options.options).status().context("cannot run steer-bench")?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Not if there is only a report to be made from what was measured before.
fn measures(options: &[OsString]) -> bool {
    let is_option = |option: &OsString| option.as_encoded_bytes().starts_with(b"--");
    let has_file = |(index, option): (usize, &OsString)| {
        option.as_encoded_bytes().starts_with(b"--report=")
            || (option == "--report" && options.get(index + 1).is_some_and(|next| !is_option(next)))
    };
    !options.iter().enumerate().any(has_file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_from_a_file_measures_nothing() {
        let options = |words: &str| words.split_whitespace().map(OsString::from).collect::<Vec<_>>();
        for measuring in ["", "--quick", "--report", "--report --quick", "--json report"] {
            assert!(measures(&options(measuring)), "{measuring}");
        }
        for reporting in ["--report a.json", "--report=a.json", "--quick --report a.json"] {
            assert!(!measures(&options(reporting)), "{reporting}");
        }
    }
}
