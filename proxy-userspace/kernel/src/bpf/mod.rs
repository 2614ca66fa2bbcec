//! BPF: loads the programs, owns and writes their maps, and keeps both beyond the process.
//!
//! `packet` is what the packet splice has in the kernel, `sock` the socket splice; the other
//! modules serve both.

pub mod events;
mod filters;
mod links;
pub mod loader;
pub mod packet;
pub mod pins;
mod presence;
mod refusal;
pub mod sock;
