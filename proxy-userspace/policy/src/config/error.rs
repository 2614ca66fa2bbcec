//! Why a configuration is refused: each problem with its place and its fix.

use std::fmt;
use std::path::PathBuf;

use thiserror::Error;

use super::tree::Position;

/// One thing that is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// 1-based; 0 when the setting came from a flag.
    pub line: usize,
    /// 1-based, in characters; 0 when the setting came from a flag.
    pub column: usize,
    /// What is wrong, beginning with the field's path where there is one.
    pub message: String,
    /// How to put it right.
    pub hint: Option<String>,
}

impl Problem {
    pub(super) fn at(at: Position, message: impl Into<String>) -> Self {
        Self { line: at.line, column: at.column, message: message.into(), hint: None }
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// Displays as it should stand on stderr: `file:line:column: message`, and the fix below it.
#[derive(Debug, Error)]
pub enum LoadError {
    #[error("cannot read {}: {error}", path.display())]
    Read { path: PathBuf, error: std::io::Error },
    #[error("{}", Listed { file, problems })]
    Invalid {
        file: String,
        /// In file order, at least one.
        problems: Vec<Problem>,
    },
}

struct Listed<'a> {
    file: &'a str,
    problems: &'a [Problem],
}

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            match problem.line {
                0 => write!(f, "{}: {}", self.file, problem.message)?,
                line => write!(f, "{}:{line}:{}: {}", self.file, problem.column, problem.message)?,
            }
            if let Some(hint) = &problem.hint {
                write!(f, "\n  hint: {hint}")?;
            }
        }
        Ok(())
    }
}
