//! What the tables stand on: packets, sessions, and the programs in the kernel.

pub mod lab;
pub mod packet;
pub mod session;
