//! Layouts of the headers, as they stand in a packet: every integer is wire order, as a native load reads it.
//!
//! Whole words where the crates for this have arrays of bytes: LLVM loads those byte by byte when it
//! compiles for BPF, and this is what every packet passes through.

use bytemuck::{Pod, Zeroable};

/// Ethernet II.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Ethernet {
    pub destination: [u16; 3],
    pub source: [u16; 3],
    pub kind: u16,
}

impl Ethernet {
    pub const LEN: usize = size_of::<Self>();
    /// Values of `kind`.
    pub const IPV4: u16 = 0x0800_u16.to_be();
    pub const IPV6: u16 = 0x86dd_u16.to_be();
}

/// IPv4 without options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Ipv4 {
    pub version_and_length: u8,
    pub traffic_class: u8,
    pub total_length: u16,
    pub identification: u16,
    pub fragment: u16,
    pub ttl: u8,
    pub protocol: u8,
    pub check: u16,
    pub source: u32,
    pub destination: u32,
}

/// IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Ipv6 {
    /// Version (4 bits), traffic class (8), flow label (20).
    pub version_class_label: u32,
    pub payload_length: u16,
    pub next_header: u8,
    pub hop_limit: u8,
    pub source: [u32; 4],
    pub destination: [u32; 4],
}

/// TCP without options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Tcp {
    /// Source port first.
    pub ports: u32,
    pub seq: u32,
    pub ack: u32,
    /// Length of the header in its upper four bits, in words.
    pub offset: u8,
    pub flags: u8,
    pub window: u16,
    pub check: u16,
    pub urgent: u16,
}

impl Tcp {
    pub const LEN: usize = size_of::<Self>();
    /// Where `check` stands.
    pub const CHECK: usize = core::mem::offset_of!(Self, check);

    /// Bytes of the header with its options: 0 to 60, honest if 20 or more.
    #[inline(always)]
    pub const fn header_len(&self) -> u32 {
        (self.offset >> 4) as u32 * 4
    }
}

/// Bits of [`Tcp::flags`].
pub mod tcp_flags {
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const PSH: u8 = 0x08;
    pub const ACK: u8 = 0x10;
    pub const ECE: u8 = 0x40;
    pub const CWR: u8 = 0x80;
}

/// `protocol` or `next_header`.
pub mod protocol {
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const ICMPV6: u8 = 58;
}
