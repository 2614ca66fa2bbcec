//! The command line: one module for each subcommand.
//!
//! Exit codes: 0 fine, 1 failed at run time (for `check`: the file is bad), 2 wrong usage, 78
//! (EX_CONFIG of sysexits.h) for `run` with a bad configuration.

mod check;
mod cleanup;
mod coverage;
mod detach;
mod flows;
mod import;
mod route;
mod run;
mod table;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "steer", version, about, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Check a configuration, without binding a port
    Check(check::Args),
    Cleanup(cleanup::Args),
    Detach(detach::Args),
    Flows(flows::Args),
    /// Print a configuration, such as Envoy's, in Steer's own format
    Import(import::Args),
    /// Say where requests would go, without opening a socket
    Route(Box<route::Args>),
    Run(Box<run::Run>),
}

/// Runs the command line. The message of an error goes to stderr.
pub fn main() -> ExitCode {
    let command = Cli::parse().command;
    if !matches!(command, Command::Run(_)) {
        // So that `steer route ... | head` ends quietly: otherwise printing to a closed pipe
        // panics.
        steer_kernel::process::end_with_the_reader();
    }
    match command {
        Command::Check(args) => check::run(&args),
        Command::Cleanup(args) => exit_code(cleanup::run(&args)),
        Command::Detach(args) => exit_code(detach::run(&args)),
        Command::Flows(args) => exit_code(flows::run(&args)),
        Command::Import(args) => import::run(&args),
        Command::Route(args) => exit_code(route::run(&args)),
        Command::Run(run) => run.run(),
    }
}

fn exit_code(done: anyhow::Result<()>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
