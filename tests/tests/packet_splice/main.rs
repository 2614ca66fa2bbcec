//! The packet splice as its peers see it: real `steer`, real sockets, each host a network namespace.
//! How streams end, who may end them, what is left afterwards; which streams are spliced at all, and
//! that those which are carry bulk. Needs root and the BPF object (`cargo xtask build-ebpf`).
//!
//! Where it makes sense a scenario runs through the relay too: what a peer learns must not depend on the path,
//! and a scenario that the relay fails proves nothing.

#![allow(clippy::unwrap_used, reason = "a failure ends the test, as it should")]

mod asked;
mod bridge;
mod eligibility;
mod ends;
mod flows;
mod forge;
mod injection;
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
mod urgent;
mod windows;
