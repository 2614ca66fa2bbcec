//! `cargo xtask`: what a person or a machine does with this repository, one module for each task.

mod bench;
mod build_ebpf;
mod check;
mod demo;
mod exec;
mod fuzz;
mod lint_tools;
mod setup;
mod suite;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Tasks of the Steer repository")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    Bench(bench::Options),
    BuildEbpf(build_ebpf::Args),
    /// Runs the checks that need no root, within three minutes; installs nothing
    Check(check::Options),
    /// Sets up what is missing and shows Steer in front of three socket.io servers
    Demo(demo::Options),
    Fuzz(fuzz::Options),
    /// Sets up what is missing and runs every test
    Test(test::Options),
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Bench(options) => bench::run(&options),
        Task::BuildEbpf(args) => build_ebpf::run(&args).map(|()| ExitCode::SUCCESS),
        Task::Check(options) => check::run(&options),
        Task::Demo(options) => demo::run(&options),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Test(options) => test::run(&options),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
