//! The kernel's side: loads the BPF programs, owns and writes their maps, reads TCP's state.
//!
//! The only place that names aya. Knows sockets by descriptor and cookie; knows nothing of
//! sessions, directions or HTTP. Used by `splice/`.

pub mod clock;
pub mod conntrack;
pub mod events;
mod filters;
pub mod grace;
pub mod hold;
pub mod host;
mod links;
pub mod loader;
pub mod maps;
mod netlink;
pub mod node;
pub mod packet;
pub mod pins;
mod presence;
pub mod probe;
pub mod raw;
pub mod receive;
mod refusal;
pub mod repair;
pub mod route;
pub mod tcp_info;
