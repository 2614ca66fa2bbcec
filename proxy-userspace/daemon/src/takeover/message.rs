//! The messages of a takeover, and their bytes. Pure: `wire` sends and receives them.
//! (`fuzz/targets/wire.rs` compiles this file by itself.)

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// The protocol of this version. [`Message::TakeOver`] and [`Message::Refused`] are the same in all
/// protocols.
pub(super) const PROTOCOL: u32 = 1;
/// An error quotes at most this many bytes of a message that cannot be decoded.
pub(super) const MAX_REPEATED: usize = 200;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Message {
    /// New to old: the first message.
    TakeOver {
        protocol: u32,
        /// The version of the binary, for the log.
        version: String,
        /// The cookie of the new process' network namespace.
        netns: u64,
    },
    /// Old to new: the last message.
    Refused { why: String },
    /// Old to new, with listening sockets. `more`: another message with sockets follows.
    Sockets { more: bool },
    /// New to old: the new process needs only the streams.
    Prepared,
    /// Old to new, with the lock of the instance, if there is one.
    Yours,
    /// New to old: the new process accepts connections at these addresses.
    Ready { addresses: Vec<SocketAddr> },
}

impl Message {
    pub(super) fn encode(&self) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(self)
    }

    /// # Errors
    /// The beginning of the bytes, if they are no message.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(bytes)
            .map_err(|_| String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_REPEATED)]).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All versions have to understand the first message and the refusal.
    #[test]
    fn the_first_message_and_the_refusal_never_change() {
        let first = br#"{"take_over":{"protocol":1,"version":"0.1.0","netns":7,"more":"is ignored"}}"#;
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
