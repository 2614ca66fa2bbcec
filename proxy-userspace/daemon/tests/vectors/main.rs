//! Steer against what a real Envoy did: every case of `tests/fixtures/envoy/vectors.json` (see the
//! README there), fed as an Envoy v3 config.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod balancing;
mod fixture;
mod forwarding;
mod policies;
