//! What the maps of the packet splice say of themselves, so that they can outlive the process that made them: the one
//! that finds them must know that it reads them as they were written.

use core::mem::{offset_of, size_of};

use bytemuck::{Pod, Zeroable};

use crate::abi::ABI_VERSION;
use crate::flow::{Conn, DirFixed, DirLive, Flow, FlowEvent, FlowKey4, FlowKey6};
use crate::stat::Stat;

/// How many ranges of ports [`About`] can hold; more are not remembered.
pub const MAX_RESERVED: usize = 32;

/// The only value of the map `STEER_ABOUT`. Zero until everything else is in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct About {
    /// [`LAYOUT`] of the process that made the maps.
    pub layout: u64,
    /// Cookie of the network namespace whose packets they are about (`SO_NETNS_COOKIE`).
    pub netns: u64,
    /// The process that owns or, if nobody does, last owned them, as it is numbered where it ran. For messages only.
    pub pid: u32,
    /// How many of `reserved` are used.
    pub reserved_count: u32,
    /// Ranges that were added to `net.ipv4.ip_local_reserved_ports`: first and last port of each.
    pub reserved: [[u16; 2]; MAX_RESERVED],
}

/// Tells layouts apart: a hash of all sizes and places in the maps, and of [`ABI_VERSION`], which is to be raised when the
/// meaning changes and the layout does not.
pub const LAYOUT: u64 = hash(&[
    ABI_VERSION as usize,
    size_of::<FlowKey4>(),
    size_of::<FlowKey6>(),
    size_of::<FlowEvent>(),
    Stat::ALL.len(),
    size_of::<Conn>(),
    offset_of!(Conn, state),
    offset_of!(Conn, flags),
    offset_of!(Conn, generation),
    offset_of!(Conn, idle_timeout_secs),
    offset_of!(Conn, key_hash),
    offset_of!(Conn, cluster),
    offset_of!(Conn, opened_unix_ms),
    offset_of!(Conn, relayed),
    offset_of!(Conn, has_key),
    offset_of!(Conn, family),
    offset_of!(Conn, flows),
    size_of::<Flow>(),
    offset_of!(Flow, fixed),
    offset_of!(Flow, live),
    offset_of!(DirFixed, to_source),
    offset_of!(DirFixed, to_destination),
    offset_of!(DirFixed, to_ports),
    offset_of!(DirFixed, seq_delta),
    offset_of!(DirFixed, ack_delta),
    offset_of!(DirFixed, ts_delta),
    offset_of!(DirFixed, ts_offset),
    offset_of!(DirFixed, ifindex),
    offset_of!(DirFixed, output),
    offset_of!(DirFixed, window_left),
    offset_of!(DirFixed, window_right),
    offset_of!(DirFixed, received),
    offset_of!(DirLive, packets),
    offset_of!(DirLive, bytes),
    offset_of!(DirLive, last_payload_ns),
    offset_of!(DirLive, last_packet_ns),
    offset_of!(DirLive, seq_end),
    offset_of!(DirLive, ack_end),
    offset_of!(DirLive, window),
    offset_of!(DirLive, window_max),
    offset_of!(DirLive, ts_value),
    offset_of!(DirLive, fin_end),
    offset_of!(DirLive, bits),
    offset_of!(DirLive, ts_state),
    offset_of!(DirLive, tick),
    offset_of!(DirLive, own_end),
]);

/// FNV-1a, a number at a time.
const fn hash(numbers: &[usize]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut index = 0;
    while index < numbers.len() {
        hash = (hash ^ numbers[index] as u64).wrapping_mul(0x0000_0100_0000_01b3);
        index += 1;
    }
    hash
}

#[cfg(feature = "user")]
// SAFETY: `repr(C)`, integers only, no padding (checked by bytemuck's derive).
unsafe impl aya::Pod for About {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_differ_in_places_and_in_their_order() {
        assert_ne!(LAYOUT, 0);
        assert_ne!(hash(&[0, 4]), hash(&[4, 0]));
        assert_ne!(hash(&[0, 4]), hash(&[0, 8]));
    }
}
