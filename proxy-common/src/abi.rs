//! Names and sizes that both sides spell the same way.

/// Version of every map layout in this crate; raised by any change to a shared type.
pub const ABI_VERSION: u32 = 1;
