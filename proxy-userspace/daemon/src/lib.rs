//! Steer's daemon, in reading order: what it is told (`config`), where a client belongs
//! (`affinity`, `routing`, `upstream`), how a request travels (`http`), how an upgraded stream is
//! carried (`splice`, `kernel`), and how all of it is seen (`telemetry`, `admin`, `cli`).

pub mod upstream;

pub mod http;

pub mod kernel;
pub mod splice;
pub mod takeover;

pub mod admin;
pub mod cli;
pub mod daemon;
mod failpoint;
mod systemd;
pub mod telemetry;
