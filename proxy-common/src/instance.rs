//! The name under which the streams of a Steer outlive its process.

use core::fmt;
use core::str::FromStr;

const MAX_LEN: usize = 64;

/// Names one Steer of a host: 1 to 64 letters, digits, `-` and `_`, since it is the name of a
/// directory.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Instance {
    /// What follows the name is 0.
    bytes: [u8; MAX_LEN],
    /// Bytes of the name.
    len: usize,
}

/// The text is not the name of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InvalidInstance;

impl Instance {
    /// The name.
    pub fn as_str(&self) -> &str {
        // The name is ASCII.
        core::str::from_utf8(&self.bytes[..self.len]).unwrap_or_default()
    }
}

impl Default for Instance {
    fn default() -> Self {
        let name = b"default";
        let mut bytes = [0; MAX_LEN];
        bytes[..name.len()].copy_from_slice(name);
        Self { bytes, len: name.len() }
    }
}

impl FromStr for Instance {
    type Err = InvalidInstance;

    fn from_str(text: &str) -> Result<Self, InvalidInstance> {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if text.is_empty() || text.len() > MAX_LEN || !text.bytes().all(good) {
            return Err(InvalidInstance);
        }
        let mut bytes = [0; MAX_LEN];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        Ok(Self { bytes, len: text.len() })
    }
}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Instance").field(&self.as_str()).finish()
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for InvalidInstance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("must be 1 to 64 letters, digits, `-` and `_`")
    }
}

impl core::error::Error for InvalidInstance {}

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
        assert_eq!(Instance::default(), "default".parse().unwrap());
    }
}
