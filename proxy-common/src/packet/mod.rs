//! Packets, without I/O: what the programs do with headers, as functions that the tests run too.

pub mod icmp;
