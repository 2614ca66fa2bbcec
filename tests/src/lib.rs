//! The harness of the integration tests and of `cargo xtask demo`: network namespaces (`netns`,
//! `topology`) with their counters (`counters`) and faults on the path (`faults`), processes that
//! end with their owner (`process`), a running `steer` (`steer`), and the peers of the tests
//! (`peers`, `socketio`). The tests are in `tests/`, one file for each subject.
//!
//! Every guard undoes what it did when it is dropped, also when a later step fails. Nothing sleeps
//! for a guessed time: see [`eventually::eventually`].
//!
//! A test that the machine cannot run says `SKIP`. With `STEER_TESTS_REQUIRE=1` it fails: see
//! [`require`].

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
