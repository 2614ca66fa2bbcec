//! The HTTP proxy on loopback. Both sides are real sockets, and the tests write every byte.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod bodies;
mod failures;
mod forwarding;
mod generations;
mod malformed;
mod support;
mod timeouts;
mod upgrades;
