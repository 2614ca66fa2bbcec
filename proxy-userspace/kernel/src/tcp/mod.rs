//! TCP sockets: their state, their sequence numbers, what they receive, their options, and segments
//! that no socket sends.

pub mod clock;
pub mod hold;
pub mod raw;
pub mod receive;
pub mod repair;
pub mod socket;
pub mod tcp_info;
