//! A new process takes over from a running one, and no client notices.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bed;
mod deaths;
mod drain;
mod load;
mod refusals;
mod service;
mod under_load;
