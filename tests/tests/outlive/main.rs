//! Streams that outlive the process. Steer is killed, stopped and started again under checksummed
//! traffic. Its pins are damaged. What `steer detach` and `steer cleanup` leave is compared with
//! the state before. Needs root, the BPF object (`cargo xtask build-ebpf`) and Linux 6.6 (tcx).

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bed;
mod capabilities;
mod clsact;
mod death;
mod expiry;
mod latency;
mod layout;
mod leaving;
mod owners;
mod pairs;
mod probes;
mod restart;
mod steps;
mod traffic;
