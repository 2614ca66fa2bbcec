//! What the fault program of the tests and its loader agree on. No part of Steer.
#![no_std]

/// The object's names, as they stand in it.
pub const PROG_INGRESS: &str = "fault_ingress";
pub const PROG_EGRESS: &str = "fault_egress";
pub const PROG_RETURN: &str = "fault_return";
pub const MAP_SETTINGS: &str = "FAULT_SETTINGS";
pub const MAP_COUNTS: &str = "FAULT_COUNTS";

/// Indices of `FAULT_SETTINGS`, an array of u32.
pub mod setting {
    /// Packets that are dropped, per mille.
    pub const LOSS: u32 = 0;
    /// Packets that come twice, per mille.
    pub const DUPLICATION: u32 = 1;
    /// Packets that take the detour, per mille.
    pub const REORDERING: u32 = 2;
    /// Index of the device that the detour begins with.
    pub const DETOUR: u32 = 3;
    /// Index of the device that it comes back to.
    pub const HOME: u32 = 4;
    pub const LEN: u32 = 5;
}

/// Indices of `FAULT_COUNTS`, an array of u64 for each CPU.
pub mod count {
    /// All packets that a fault could have befallen.
    pub const SEEN: u32 = 0;
    pub const LOST: u32 = 1;
    pub const DUPLICATED: u32 = 2;
    /// Sent on the detour.
    pub const LEFT: u32 = 3;
    /// Come back from it; the rest was dropped on the way.
    pub const RETURNED: u32 = 4;
    pub const LEN: u32 = 5;
}
