//! Compares Steer with the recorded behaviour of a real Envoy: every case of
//! `tests/fixtures/envoy/vectors.json` (see the README there), read as an Envoy v3 config.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod balancing;
mod fixture;
mod forwarding;
mod policies;
