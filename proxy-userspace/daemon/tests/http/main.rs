//! The HTTP proxy on loopback: real sockets on both sides, every byte written by hand.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod failures;
mod forwarding;
mod generations;
mod malformed;
mod support;
mod timeouts;
mod upgrades;
