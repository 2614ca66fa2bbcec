//! The kernel's side: loads the BPF programs, owns and writes their maps, reads TCP's state.
//!
//! The only place that names aya. Knows sockets by descriptor and cookie; knows nothing of
//! sessions, directions or HTTP. Used by `splice/`.

pub mod events;
pub mod hold;
pub mod loader;
pub mod maps;
pub mod probe;
pub mod tcp_info;
