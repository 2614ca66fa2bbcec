//! Steer's daemon, in reading order: the clusters as they are now (`upstream`), how a request travels (`http`), which
//! streams there are (`streams`), how a stream is carried (`splice`), how one process follows another (`takeover`), and how all of it is started and
//! seen (`daemon`, `telemetry`, `admin`, `cli`).
//!
//! What is decided without a socket stands in [`steer_policy`], what is asked of the kernel in [`steer_kernel`].
#![forbid(unsafe_code)]

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
