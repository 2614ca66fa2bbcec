//! From a file to a [`Config`]: finds out which format it is, and reads it.

use std::fmt;
use std::fs::File;
use std::io::{Error, Read as _};
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
    let bytes = read_bytes(path).map_err(failed)?;
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

/// The bytes of a file, of which there may be [`MAX_BYTES`]. A pipe that has a name is refused,
/// since a read of it may wait forever, and so is a device. Descriptors that the process was
/// started with may be pipes: `/dev/stdin`, and what a shell's `<(...)` stands for.
fn read_bytes(path: &Path) -> Result<Vec<u8>, Error> {
    let inherited =
        ["/dev/stdin", "/dev/fd", "/proc/self/fd"].iter().any(|inherited| path.starts_with(inherited));
    if !inherited && !std::fs::metadata(path)?.is_file() {
        return Err(Error::other("not a regular file; give a file, or /dev/stdin"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Error::other(format!("larger than {MAX_BYTES} bytes")));
    }
    Ok(bytes)
}

/// Reads and checks a text; `file` is what messages call it.
pub fn parse(text: &str, file: &str) -> Result<Loaded, LoadError> {
    let invalid = |problems| LoadError::Invalid { file: file.to_owned(), problems };
    let tree = tree::parse(text).map_err(|problem| invalid(vec![problem]))?;
    let mut report = Report::default();
    let format = recognise(&Field::root(&tree, &report));
    report.protobuf_json = format == Format::EnvoyV3;
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
    let has = |names: &[&'static str]| names.iter().any(|name| root.peek(name).is_some());
    let first = |list: &'static str, names: &[&'static str]| {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_and_folders_are_no_configuration() {
        for path in ["/dev/zero", "/dev/null", "/proc"] {
            let error = read(Path::new(path)).unwrap_err().to_string();
            assert!(error.contains("not a regular file"), "{path}: {error}");
        }
        let error = read(Path::new("/nowhere/steer.yaml")).unwrap_err().to_string();
        assert!(error.contains("No such file"), "{error}");
    }

    #[test]
    fn a_file_without_an_end_is_not_read_to_its_end() {
        let zero = File::open("/dev/zero").unwrap();
        let path = format!("/dev/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&zero));
        let error = read(Path::new(&path)).unwrap_err().to_string();
        assert!(error.contains("larger than 67108864 bytes"), "{error}");
    }
}
