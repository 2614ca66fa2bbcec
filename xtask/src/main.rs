//! Tasks around the code: `cargo xtask <task>`.

mod build_ebpf;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Steer's tasks", disable_help_subcommand = true)]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    BuildEbpf(build_ebpf::Args),
}

fn main() -> anyhow::Result<()> {
    match Args::parse().task {
        Task::BuildEbpf(args) => build_ebpf::run(&args),
    }
}
