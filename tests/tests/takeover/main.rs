//! A new process takes over from a running one, and nobody notices.

#![allow(clippy::unwrap_used, reason = "a failure ends the test, as it should")]

mod bed;
mod deaths;
mod drain;
mod load;
mod refusals;
mod service;
mod under_load;
