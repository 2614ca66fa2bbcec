//! From a file to a [`Config`]: finds out which format it is, and reads it.

use std::fmt;
use std::path::Path;

use super::error::Problem;
use super::reader::{Field, Report};
use super::tree::{self, Position};
use super::{Config, LoadError, envoy_v1, envoy_v3, native};

/// Larger files are refused.
const MAX_BYTES: u64 = 64 * 1024 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Native,
    /// A bootstrap, as YAML or JSON.
    EnvoyV3,
    /// The JSON that Envoy read up to 1.8.
    EnvoyV1,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::EnvoyV3 => "Envoy v3",
            Self::EnvoyV1 => "Envoy v1",
        })
    }
}

/// A configuration and the format it was written in.
#[derive(Debug, Clone)]
pub struct Loaded {
    pub format: Format,
    pub config: Config,
}

/// Reads and checks a file of any format.
pub fn load(path: &Path) -> Result<Config, LoadError> {
    read(path).map(|loaded| loaded.config)
}

/// [`load`], which also tells the format.
pub fn read(path: &Path) -> Result<Loaded, LoadError> {
    let failed = |error| LoadError::Read { path: path.to_owned(), error };
    let size = std::fs::metadata(path).map_err(failed)?.len();
    if size > MAX_BYTES {
        return Err(failed(std::io::Error::other(format!("larger than {MAX_BYTES} bytes"))));
    }
    let bytes = std::fs::read(path).map_err(failed)?;
    let file = path.display().to_string();
    match String::from_utf8(bytes) {
        Ok(text) => parse(&text, &file),
        Err(error) => {
            let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            let line = good.iter().filter(|byte| **byte == b'\n').count() + 1;
            let problem =
                Problem::at(Position { line, column: 1 }, "not UTF-8 text").hint("save the file as UTF-8");
            Err(LoadError::Invalid { file, problems: vec![problem] })
        }
    }
}

/// Reads and checks a text; `file` is what messages call it.
pub fn parse(text: &str, file: &str) -> Result<Loaded, LoadError> {
    let invalid = |problems| LoadError::Invalid { file: file.to_owned(), problems };
    let tree = tree::parse(text).map_err(|problem| invalid(vec![problem]))?;
    let mut report = Report::default();
    let format = recognise(&Field::root(&tree, &report));
    report.camel_case = format == Format::EnvoyV3;
    let root = Field::root(&tree, &report);
    let config = match format {
        Format::EnvoyV3 => envoy_v3::read(&root),
        Format::EnvoyV1 => envoy_v1::read(&root),
        Format::Native => native::read(&root),
    };
    let mut problems = report.problems.take();
    problems.sort_by_key(|problem| (problem.line, problem.column));
    match config {
        Some(mut config) if problems.is_empty() => {
            config.warnings = report.warnings.take();
            config.warnings.sort_by_key(|warning| (warning.line, warning.column));
            Ok(Loaded { format, config })
        }
        _ => {
            if problems.is_empty() {
                problems.push(Problem::at(root.at(), "cannot be read as a configuration"));
            }
            Err(invalid(problems))
        }
    }
}

/// Tells the formats apart by the keys that only one of them has.
fn recognise(root: &Field<'_>) -> Format {
    let has = |names: &[&str]| names.iter().any(|name| root.peek(name).is_some());
    let first = |list: &str, names: &[&str]| {
        let item = root.peek(list).and_then(|list| list.first());
        item.is_some_and(|item| names.iter().any(|name| item.peek(name).is_some()))
    };
    if has(&["static_resources", "staticResources", "dynamic_resources", "dynamicResources"]) {
        Format::EnvoyV3
    } else if has(&["cluster_manager", "route_config"])
        || first("listeners", &["filters"])
        || first("clusters", &["hosts", "lb_type", "connect_timeout_ms"])
    {
        Format::EnvoyV1
    } else {
        Format::Native
    }
}
