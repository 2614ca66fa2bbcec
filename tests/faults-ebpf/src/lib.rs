//! Names and numbers that the fault program of the tests shares with its loader. Not a part of
//! Steer.
#![no_std]

/// The names of programs and maps in the object.
pub const PROG_INGRESS: &str = "fault_ingress";
pub const PROG_EGRESS: &str = "fault_egress";
pub const PROG_RETURN: &str = "fault_return";
pub const MAP_SETTINGS: &str = "FAULT_SETTINGS";
pub const MAP_COUNTS: &str = "FAULT_COUNTS";

/// Indices of `FAULT_SETTINGS`, an array of u32.
pub mod setting {
    /// How many packets are dropped, per mille.
    pub const LOSS: u32 = 0;
    /// How many packets are duplicated, per mille.
    pub const DUPLICATION: u32 = 1;
    /// How many packets take the detour, per mille.
    pub const REORDERING: u32 = 2;
    /// Index of the device where the detour begins.
    pub const DETOUR: u32 = 3;
    /// Index of the device where the detour ends.
    pub const HOME: u32 = 4;
    pub const LEN: u32 = 5;
}

/// Indices of `FAULT_COUNTS`, an array of u64 for each CPU.
pub mod count {
    /// All packets to which a fault could happen.
    pub const SEEN: u32 = 0;
    pub const LOST: u32 = 1;
    pub const DUPLICATED: u32 = 2;
    /// Packets that went on the detour.
    pub const LEFT: u32 = 3;
    /// Packets that came back from the detour. The others were dropped on it.
    pub const RETURNED: u32 = 4;
    pub const LEN: u32 = 5;
}
