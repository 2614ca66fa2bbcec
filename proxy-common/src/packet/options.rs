//! TCP options: timestamps and SACK blocks name numbers of a connection, so they are translated; the rest is harmless
//! or blanked.

use crate::packet::checksum::Difference;
use crate::packet::rewrite::Timestamps;
use crate::packet::seq;

/// Bytes of options that a header has room for.
pub const MAX_LEN: usize = 40;

mod kind {
    pub(super) const END: u8 = 0;
    pub(super) const NOP: u8 = 1;
    pub(super) const MSS: u8 = 2;
    pub(super) const WINDOW_SCALE: u8 = 3;
    pub(super) const SACK_PERMITTED: u8 = 4;
    pub(super) const SACK: u8 = 5;
    pub(super) const TIMESTAMPS: u8 = 8;
}

/// Timestamps as practically everybody writes them: `NOP NOP TIMESTAMPS 10`. Wire order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct TimestampsOption {
    pub head: u32,
    pub value: u32,
    pub echo: u32,
}

impl TimestampsOption {
    pub const LEN: usize = size_of::<Self>();
    /// What `head` is.
    pub const HEAD: u32 = u32::from_ne_bytes([kind::NOP, kind::NOP, kind::TIMESTAMPS, 10]);

    /// Returns what changed, and the TSval as it was (host order).
    #[inline(always)]
    pub fn translate(&mut self, timestamps: &Timestamps) -> (Difference, u32) {
        let old = *self;
        let value = u32::from_be(old.value);
        self.value = timestamps.value(value).to_be();
        self.echo = timestamps.echo(u32::from_be(old.echo)).to_be();
        let mut change = Difference::default();
        change.replace(old.value, self.value);
        change.replace(old.echo, self.echo);
        (change, value)
    }
}

/// The word in front of SACK blocks as practically everybody writes it: `NOP NOP SACK length`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct SackHead(pub u32);

impl SackHead {
    pub const LEN: usize = size_of::<Self>();
    pub const MAX_BLOCKS: usize = 4;

    /// How many blocks follow: 1 to 4 if they fill the `len` bytes of options from here on, else 0.
    #[inline(always)]
    pub const fn blocks(self, len: u32) -> u32 {
        let [first, second, kind, own] = self.0.to_ne_bytes();
        let canonical = first == kind::NOP && second == kind::NOP && kind == kind::SACK;
        // Two NOPs, and as many whole blocks as the length says.
        if canonical && own as u32 + 2 == len && own & 7 == 2 && len <= MAX_LEN as u32 { len >> 3 } else { 0 }
    }
}

/// One SACK block, wire order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct SackBlock {
    pub left: u32,
    pub right: u32,
}

impl SackBlock {
    pub const LEN: usize = size_of::<Self>();

    /// Moves both edges from one connection's numbers to the other's.
    #[inline(always)]
    pub fn translate(&mut self, ack_delta: u32) -> Difference {
        let old = *self;
        self.left = u32::from_be(old.left).wrapping_add(ack_delta).to_be();
        self.right = u32::from_be(old.right).wrapping_add(ack_delta).to_be();
        let mut change = Difference::default();
        change.replace(old.left, self.left);
        change.replace(old.right, self.right);
        change
    }

    /// Ends the block at `end` (host order) if it goes beyond.
    #[inline(always)]
    pub fn clip(&mut self, end: u32) {
        if seq::after(u32::from_be(self.right), end) && seq::before(u32::from_be(self.left), end) {
            self.right = end.to_be();
        }
    }
}

/// Options in any order and at any place.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Options(pub [u32; MAX_LEN / 4]);

/// What became of [`Options`].
#[derive(Debug, Clone, Copy, Default)]
pub struct OptionsChange {
    pub change: Difference,
    /// The TSval as it was (host order), if there was one.
    pub ts_value: Option<u32>,
    /// Something was replaced by NOPs.
    pub blanked: bool,
}

/// Where the walk over the options stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    Kind,
    Length,
    /// In the body of an option that stays as it is, or is translated.
    Body,
    /// In one that is overwritten.
    Blank,
}

impl Options {
    /// Translates the first `len` bytes. Options without numbers of a connection stay; unknown and malformed ones become
    /// NOPs, and so do timestamps or SACK blocks if they are not to be translated (`None`).
    #[inline(always)]
    pub fn translate(
        &mut self,
        len: u32,
        timestamps: Option<&Timestamps>,
        sack: Option<u32>,
    ) -> OptionsChange {
        let old = *self;
        let mut result = OptionsChange::default();
        self.walk(len, timestamps, sack, &mut result);
        for (old, new) in old.0.iter().zip(&self.0) {
            result.change.replace(*old, *new);
        }
        result
    }

    // One byte at a time, so that every index is one that the verifier knows.
    #[inline(always)]
    fn walk(
        &mut self,
        len: u32,
        timestamps: Option<&Timestamps>,
        sack: Option<u32>,
        result: &mut OptionsChange,
    ) {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.0);
        let (mut at, mut kind, mut index, mut left) = (At::Kind, kind::NOP, 0_u32, 0_u32);
        for i in 0..MAX_LEN {
            if i as u32 >= len {
                break;
            }
            let byte = bytes[i];
            match at {
                At::Kind if byte == kind::END => break,
                At::Kind if byte == kind::NOP => {}
                At::Kind if i as u32 + 1 == len => {
                    bytes[i] = kind::NOP;
                    result.blanked = true;
                }
                At::Kind => (at, kind) = (At::Length, byte),
                At::Length => {
                    let room = len - i as u32 + 1;
                    let known = is_translatable(kind, byte, timestamps.is_some(), sack.is_some());
                    // A length that cannot be true: nothing behind it can be told apart any more.
                    let honest = byte >= 2 && u32::from(byte) <= room;
                    left = if honest { u32::from(byte) - 2 } else { room - 2 };
                    index = 0;
                    at = if known && honest { At::Body } else { At::Blank };
                    if at == At::Blank {
                        result.blanked = true;
                        bytes[i] = kind::NOP;
                        if i > 0 {
                            bytes[i - 1] = kind::NOP;
                        }
                    }
                    if left == 0 {
                        at = At::Kind;
                    }
                }
                At::Body | At::Blank => {
                    if at == At::Blank {
                        bytes[i] = kind::NOP;
                    } else if index & 3 == 3 && i >= 3 {
                        let word = u32::from_be_bytes([bytes[i - 3], bytes[i - 2], bytes[i - 1], byte]);
                        let new = match (kind, timestamps, sack) {
                            (kind::SACK, _, Some(delta)) => word.wrapping_add(delta),
                            (kind::TIMESTAMPS, Some(timestamps), _) if index == 3 => {
                                result.ts_value = Some(word);
                                timestamps.value(word)
                            }
                            (kind::TIMESTAMPS, Some(timestamps), _) => timestamps.echo(word),
                            _ => word,
                        };
                        [bytes[i - 3], bytes[i - 2], bytes[i - 1], bytes[i]] = new.to_be_bytes();
                    }
                    index += 1;
                    left -= 1;
                    if left == 0 {
                        at = At::Kind;
                    }
                }
            }
        }
    }
}

/// Whether an option of this kind and length (with kind and length byte) is passed on, translated if need be.
#[inline(always)]
const fn is_translatable(kind: u8, len: u8, timestamps: bool, sack: bool) -> bool {
    match kind {
        kind::MSS => len == 4,
        kind::WINDOW_SCALE => len == 3,
        kind::SACK_PERMITTED => len == 2,
        kind::SACK => sack && len > 2 && len <= 34 && (len - 2) & 7 == 0,
        kind::TIMESTAMPS => timestamps && len == 10,
        _ => false,
    }
}
