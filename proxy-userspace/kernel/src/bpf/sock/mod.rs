//! The socket splice's part of the kernel: its maps, and a trial of all that it needs.

pub mod maps;
pub mod probe;
