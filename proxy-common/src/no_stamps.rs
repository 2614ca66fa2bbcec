//! The local addresses and ports whose clients are to have no TCP timestamps, since the endpoints
//! of their listener have none. The programs take the timestamps out of the SYNs that arrive there
//! ([`crate::packet::offer`]).

use bytemuck::{Pod, Zeroable};

/// A local address with a port. The key of the map `STEER_NO_STAMPS`.
///
/// A listener on all addresses has one entry for each address that clients use. A key with the port
/// alone would also match SYNs that this host forwards to other hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct LocalEnd {
    /// Wire order; IPv4 in the first word.
    pub address: [u32; 4],
    /// Wire order.
    pub port: u16,
    /// [`Ethernet::kind`](crate::packet::headers::Ethernet::kind): the version of IP.
    pub kind: u16,
}

/// A value of the map `STEER_NO_STAMPS`. The entry ends by itself, even if no process is left that
/// could remove it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Until {
    /// By CLOCK_MONOTONIC, in nanoseconds.
    pub ns: u64,
}

impl Until {
    /// Whether the entry is over.
    #[inline(always)]
    pub const fn is_over(self, now_ns: u64) -> bool {
        now_ns >= self.ns
    }
}

#[cfg(feature = "user")]
// SAFETY: `repr(C)`, integers only, no padding (checked by bytemuck's derive).
unsafe impl aya::Pod for LocalEnd {}

#[cfg(feature = "user")]
// SAFETY: as above.
unsafe impl aya::Pod for Until {}
