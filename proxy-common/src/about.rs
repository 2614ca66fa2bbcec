//! The description of the packet splice's maps, which is in a map itself. The maps can outlive the
//! process that made them. A process that finds the maps must know whether it can read them.

use bytemuck::{Pod, Zeroable};

/// How many ranges of ports [`About`] can hold. Further ranges are not remembered.
pub const MAX_RESERVED: usize = 32;

/// The only value of the map `STEER_ABOUT`. Zero until everything else is in place. Frozen: every
/// build reads the value of every other build. Anything new gets a map of its own.
/// ([`crate::layout`] has the layout of records.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct About {
    /// [`LAYOUT`](crate::layout::LAYOUT) of the process that made the maps.
    pub layout: u64,
    /// Cookie of the network namespace whose packets the maps are about (`SO_NETNS_COOKIE`).
    pub netns: u64,
    /// The process that owns the maps or, if no process does, the last owner. The number counts in
    /// the PID namespace where that process ran. For messages only.
    pub pid: u32,
    /// How many of `reserved` are used.
    pub reserved_count: u32,
    /// Ranges that were added to `net.ipv4.ip_local_reserved_ports`: first and last port of each.
    pub reserved: [[u16; 2]; MAX_RESERVED],
}

#[cfg(feature = "user")]
// SAFETY: `repr(C)`, integers only, no padding (checked by bytemuck's derive).
unsafe impl aya::Pod for About {}
