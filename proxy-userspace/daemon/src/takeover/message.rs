//! The messages of a takeover, and their bytes. Pure: `wire` sends and receives them.
//! (`fuzz/targets/wire.rs` compiles this file by itself.)

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// What this version speaks. [`Message::TakeOver`] and [`Message::Refused`] are the same in all.
pub(super) const PROTOCOL: u32 = 1;
/// How much of what is not understood an error repeats.
pub(super) const MAX_REPEATED: usize = 200;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Message {
    /// New to old, first.
    TakeOver {
        protocol: u32,
        /// Of the binary, for the log.
        version: String,
        /// The cookie of its network namespace.
        netns: u64,
    },
    /// Old to new, last.
    Refused { why: String },
    /// Old to new, with listening sockets. `more`: another such message follows.
    Sockets { more: bool },
    /// New to old: nothing is missing but the streams.
    Prepared,
    /// Old to new, with the lock of the instance, if there is one.
    Yours,
    /// New to old: it accepts, at these addresses.
    Ready { addresses: Vec<SocketAddr> },
}

impl Message {
    pub(super) fn encode(&self) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(self)
    }

    /// # Errors
    /// The beginning of what was said instead.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(bytes)
            .map_err(|_| String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_REPEATED)]).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said first, and what refuses, is to be understood by all versions.
    #[test]
    fn the_first_words_are_frozen() {
        let first = br#"{"take_over":{"protocol":1,"version":"0.1.0","netns":7,"more":"is passed over"}}"#;
        let expected = Message::TakeOver { protocol: 1, version: "0.1.0".to_owned(), netns: 7 };
        assert_eq!(Message::decode(first).unwrap(), expected);
        let refused = Message::Refused { why: "so".to_owned() }.encode().unwrap();
        assert_eq!(refused, br#"{"refused":{"why":"so"}}"#);
    }

    #[test]
    fn only_the_beginning_of_nonsense_is_repeated() {
        assert_eq!(Message::decode(b"{\"later\":{}}"), Err("{\"later\":{}}".to_owned()));
        assert_eq!(Message::decode(&[b'a'; 1000]), Err("a".repeat(MAX_REPEATED)));
    }
}
