//! Types and names that the BPF programs and the daemon share.
//!
//! Rules of this crate: `no_std`, no I/O, no BPF helpers. Map types are `repr(C)` with explicit
//! padding and only integers in them; integers are in host order unless a field says otherwise.
#![cfg_attr(not(test), no_std)]
#![warn(missing_docs)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

pub mod abi;
pub mod about;
pub mod expiry;
pub mod flow;
pub mod instance;
mod labels;
pub mod layout;
pub mod no_stamps;
pub mod packet;
pub mod reason;
pub mod shared;
pub mod sock;
pub mod stat;
