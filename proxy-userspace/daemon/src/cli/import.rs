//! `steer import`: prints a configuration of any format as native YAML.

use std::path::PathBuf;
use std::process::ExitCode;

use steer_policy::config;

use super::check::print_warnings;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The configuration: Envoy v3 bootstrap, Envoy v1 JSON or native YAML
    file: PathBuf,
}

pub(super) fn run(args: &Args) -> ExitCode {
    let file = args.file.display().to_string();
    match config::read(&args.file) {
        Ok(loaded) => {
            print_warnings(&file, &loaded.config);
            println!("# Imported from {file} ({} format)", loaded.format);
            print!("{}", config::to_yaml(&loaded.config));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
