//! The packet splice as its peers see it: real `steer`, real sockets, each host a network
//! namespace. The tests check how streams end, who can end them, what remains afterwards, which
//! streams are spliced, and that spliced streams carry bulk. Needs root and the BPF object (`cargo
//! xtask build-ebpf`).
//!
//! Where possible, a scenario runs through the relay, too. What a peer learns must not depend on
//! the path, and a scenario that fails with the relay proves nothing.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod asked;
mod bridge;
mod eligibility;
mod ends;
mod families;
mod firewall;
mod flows;
mod forge;
mod injection;
mod instances;
mod leaves;
mod local;
mod maps;
mod net;
mod odd;
mod path_mtu;
mod ports;
mod reuse;
mod shapes;
mod silence;
mod stream;
mod timestamps;
mod urgent;
mod windows;
