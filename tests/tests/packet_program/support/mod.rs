//! What the tables use: packets, sessions, and the programs in the kernel.

pub(crate) mod lab;
pub(crate) mod packet;
pub(crate) mod session;
