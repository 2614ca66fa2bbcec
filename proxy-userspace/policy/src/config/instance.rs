//! The name under which the streams of a Steer outlive its process.

use std::fmt;
use std::str::FromStr;

use super::reader::Field;

const MAX_LEN: usize = 64;

/// Names one Steer of a host: 1 to 64 letters, digits, `-` and `_`, since it is the name of a directory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Instance(String);

/// Not the name of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be 1 to 64 letters, digits, `-` and `_`")]
pub struct InvalidInstance;

impl Instance {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for Instance {
    fn default() -> Self {
        Self("default".to_owned())
    }
}

impl FromStr for Instance {
    type Err = InvalidInstance;

    fn from_str(text: &str) -> Result<Self, InvalidInstance> {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if (1..=MAX_LEN).contains(&text.len()) && text.bytes().all(good) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidInstance)
        }
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

pub(super) fn read(field: &Field<'_>) -> Option<Instance> {
    let read = field.string()?.parse();
    read.map_err(|error: InvalidInstance| field.error(error, "write a name such as `edge-1`")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_that_of_a_directory() {
        for good in ["default", "a", "Edge_1-b", &"x".repeat(64)] {
            assert_eq!(good.parse::<Instance>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "a/b", "a b", "ü", "a.b", &"x".repeat(65)] {
            assert_eq!(bad.parse::<Instance>(), Err(InvalidInstance), "{bad}");
        }
    }
}
