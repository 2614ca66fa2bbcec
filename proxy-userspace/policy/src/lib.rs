//! What Steer decides, in reading order: what it is told (`config`), where a client belongs
//! (`affinity`, `routing`), and where requests begin and end (`http1`).
//!
//! Pure: bytes and typed configuration in, decisions out. No socket, no clock, no runtime; the only
//! file that is read is the configuration.
#![forbid(unsafe_code)]
// The order of a hash map differs from run to run; a decision must not.
#![warn(clippy::iter_over_hash_type)]

pub mod config;

pub mod affinity;
pub mod routing;

pub mod http1;
