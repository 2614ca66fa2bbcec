//! What the integration tests and `cargo xtask demo` stand on: network namespaces (`netns`,
//! `topology`) with their counters (`counters`) and faults on the way (`faults`), processes that die with their owner (`process`), a running `steer` (`steer`), and
//! the programs it is tried against (`peers`, `socketio`). The tests themselves are in `tests/`, one file for
//! each subject.
//!
//! Every guard undoes what it did when it is dropped, also when a later step fails. Nothing sleeps
//! for a guessed time: see [`eventually::eventually`].
//!
//! A test whose needs are not met says `SKIP`, or fails if `STEER_TESTS_REQUIRE=1`: see [`require`].

pub mod counters;
pub mod cpio;
pub mod eventually;
#[cfg(feature = "faults")]
pub mod faults;
pub mod instance;
pub mod kernels;
pub mod netns;
pub mod peers;
pub mod process;
pub mod require;
pub mod socketio;
pub mod sockets;
pub mod steer;
pub mod streams;
pub mod topology;
