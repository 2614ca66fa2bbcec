//! The programs of the packet splice, packet by packet: `BPF_PROG_TEST_RUN` on tables of what arrives, what leaves,
//! and what the record, the counters and the events say afterwards. Needs root and the BPF object.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod ends;
mod expiry;
mod forward;
mod hand_over;
mod icmp;
mod odd;
mod options;
mod passed;
mod pieces;
mod plausible;
mod random;
mod support;
mod table;
