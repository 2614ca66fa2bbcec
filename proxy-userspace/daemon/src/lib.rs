//! Steer's daemon. The modules in reading order:
//!
//! - `io`: a connection's socket and what was read from it. `turn`: how long a task may go on.
//! - `upstream`: the clusters in their current state.
//! - `http`: how a request is served.
//! - `streams`: the live streams.
//! - `splice`: how a stream is carried.
//! - `takeover`: how one process takes over from another.
//! - `daemon`, `cli`, `systemd`: how the process starts, runs and stops.
//! - `telemetry`, `admin`: how operators watch the process.
//!
//! Decisions without a socket are in [`steer_policy`]; everything that is asked of the kernel is in
//! [`steer_kernel`].
#![forbid(unsafe_code)]

pub mod io;
mod turn;
pub mod upstream;

pub mod http;

pub mod splice;
pub mod streams;
pub mod takeover;

pub mod admin;
pub mod cli;
pub mod daemon;
mod systemd;
pub mod telemetry;
