//! The HTTP proxy on loopback: real sockets on both sides, every byte written by hand.

mod failures;
mod forwarding;
mod malformed;
mod support;
mod timeouts;
mod upgrades;
