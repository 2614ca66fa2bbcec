//! What Steer asks of the Linux kernel: BPF programs and maps (`bpf`), addresses, interfaces and
//! routes of the network namespace (`net`), and TCP sockets beyond what `std` knows (`tcp`).
//!
//! The only crate of the daemon that names aya, and the only one with unsafe code. Knows sockets by
//! descriptor and cookie; knows nothing of HTTP, clusters or the configuration.

pub mod bpf;
pub mod net;
pub mod tcp;

pub mod capability;
pub mod failpoint;
pub mod grace;
pub mod memory;
pub mod process;
pub mod ready;
