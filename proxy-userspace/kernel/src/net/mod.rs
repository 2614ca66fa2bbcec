//! The network namespace: what this host is called, its interfaces, routes, and tracked connections.

pub mod conntrack;
pub mod host;
pub(crate) mod netlink;
pub mod node;
pub mod route;
