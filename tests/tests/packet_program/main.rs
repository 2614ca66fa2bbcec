//! The programs of the packet splice, packet by packet: `BPF_PROG_TEST_RUN` on tables. A row has
//! the packet that arrives, the packet that leaves, and the record, the counters and the events
//! afterwards. Needs root and the BPF object.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod ends;
mod expiry;
mod family;
mod forward;
mod hand_over;
mod icmp;
mod odd;
mod offer;
mod options;
mod passed;
mod pieces;
mod plausible;
mod random;
mod support;
mod syn;
mod table;
