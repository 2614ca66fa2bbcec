//! TCP options. Timestamps and SACK blocks contain numbers of a connection, so they are translated.
//! All other options are harmless, or are blanked.

use crate::flow::{SharedFlow, flags};
use crate::packet::checksum::Difference;
use crate::packet::rewrite::Timestamps;
use crate::packet::seq;

/// Bytes of options that a header has room for.
pub const MAX_LEN: usize = 40;

pub(super) mod kind {
    pub(in crate::packet) const END: u8 = 0;
    pub(in crate::packet) const NOP: u8 = 1;
    pub(in crate::packet) const MSS: u8 = 2;
    pub(in crate::packet) const WINDOW_SCALE: u8 = 3;
    pub(in crate::packet) const SACK_PERMITTED: u8 = 4;
    pub(in crate::packet) const SACK: u8 = 5;
    pub(in crate::packet) const TIMESTAMPS: u8 = 8;
}

/// How the options of one packet are translated.
#[derive(Debug, Clone, Copy)]
pub struct Translation {
    /// [`flags`] of the record: without [`flags::TIMESTAMPS`] or [`flags::SACK`] those options are
    /// overwritten.
    pub flags: u32,
    /// How TSval and TSecr are translated.
    pub timestamps: Timestamps,
    /// Added to the edges of SACK blocks.
    pub ack_delta: u32,
}

impl Translation {
    /// The translation for a packet of `flow`; see [`Timestamps::of`].
    #[inline(always)]
    pub fn of(flags: u32, flow: &SharedFlow, other: &SharedFlow) -> Self {
        let timestamps = Timestamps::of(flow, other);
        Self { flags, timestamps, ack_delta: flow.fixed.ack_delta.get() }
    }

    /// Whether any of these bits is set in `flags`.
    #[inline(always)]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// A bit that is none of the [`flags`] of a record.
    const ONLY_LOOKS: u32 = 1 << 31;

    /// Whether the options are only read, and stay as they are.
    #[inline(always)]
    pub const fn set_only_looks(&mut self, only_looks: bool) {
        self.flags = if only_looks { self.flags | Self::ONLY_LOOKS } else { self.flags & !Self::ONLY_LOOKS };
    }

    /// Whether the options are only read. False until [`Self::set_only_looks`] says so.
    #[inline(always)]
    pub const fn only_looks(&self) -> bool {
        self.has(Self::ONLY_LOOKS)
    }

    /// Whether an option of this kind and length (with kind and length byte) is passed on,
    /// translated if need be.
    #[inline(always)]
    const fn takes(&self, kind: u8, len: u8) -> bool {
        match kind {
            kind::MSS => len == 4,
            kind::WINDOW_SCALE => len == 3,
            kind::SACK_PERMITTED => len == 2,
            kind::SACK => self.has(flags::SACK) && len > 2 && len <= 34 && len & 7 == 2,
            kind::TIMESTAMPS => self.has(flags::TIMESTAMPS) && len == 10,
            _ => false,
        }
    }
}

/// Timestamps as nearly every stack writes them: `NOP NOP TIMESTAMPS 10`. Wire order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct TimestampsOption {
    /// [`Self::HEAD`], if timestamps stand here in the usual form.
    pub head: u32,
    /// TSval: the sender's clock (RFC 7323).
    pub value: u32,
    /// TSecr: a TSval that the sender has received. Valid with ACK.
    pub echo: u32,
}

impl TimestampsOption {
    /// Bytes of the option with both NOPs: 12.
    pub const LEN: usize = size_of::<Self>();
    /// The value of `head`.
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

/// The word before SACK blocks as practically every stack writes it: `NOP NOP SACK length`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct SackHead(pub u32);

impl SackHead {
    /// Bytes of the word: 4.
    pub const LEN: usize = size_of::<Self>();
    /// How many blocks fit into [`MAX_LEN`] bytes after this word.
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

/// One SACK block (RFC 2018), wire order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct SackBlock {
    /// The first sequence number that the receiver has.
    pub left: u32,
    /// One past the last sequence number that the receiver has.
    pub right: u32,
}

impl SackBlock {
    /// Bytes of a block: 8.
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

/// A walk over options in any order and at any place, one byte at a time. Options without numbers
/// of a connection stay; unknown and malformed ones become NOPs.
///
/// The walk is made of steps, not a loop: only with the kernel's own loop (bpf_loop) does the
/// verifier not follow every combination of bytes.
#[derive(Debug, Clone, Copy)]
pub struct Walk {
    /// The options, wire order; what follows them does not matter.
    pub words: [u32; MAX_LEN / 4],
    /// Bytes of options.
    len: u32,
    to: Translation,
    at: At,
    /// The option that the walk is in, and how many bytes of it are left.
    kind: u8,
    left: u32,
    /// The TSval as it was (host order), if there was one.
    pub ts_value: Option<u32>,
    /// Something was replaced by NOPs.
    pub blanked: bool,
}

/// Where a [`Walk`] stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Kind,
    Length,
    /// In the body of an option that stays as it is, or is translated.
    Body,
    /// In the body of an option that is overwritten.
    Blank,
    End,
}

impl Walk {
    /// Over `len` bytes of options, which are to be put into `words`.
    pub const fn new(len: u32, to: Translation) -> Self {
        let words = [0; MAX_LEN / 4];
        Self { words, len, to, at: At::Kind, kind: kind::NOP, left: 0, ts_value: None, blanked: false }
    }

    /// Like `new`, but leaves `words` as they are.
    #[inline(always)]
    pub fn restart(&mut self, len: u32, to: &Translation) {
        self.len = len;
        self.to = *to;
        self.at = At::Kind;
        self.left = 0;
        self.ts_value = None;
        self.blanked = false;
    }

    /// Replaces all options by NOPs, as if none could be translated.
    #[inline(always)]
    pub fn blank_all(&mut self) {
        self.words = [u32::from_ne_bytes([kind::NOP; 4]); MAX_LEN / 4];
        self.blanked = true;
    }

    /// Handles byte `i`, which is one more than in the step before; returns whether the walk goes
    /// on.
    #[inline(always)]
    pub fn step(&mut self, i: usize) -> bool {
        if i >= MAX_LEN || i as u32 >= self.len {
            return false;
        }
        let byte = self.bytes()[i];
        match self.at {
            At::Kind => self.kind(i, byte),
            At::Length => self.length(i, byte),
            At::Body => self.body(i),
            At::Blank => self.blank(i),
            At::End => {}
        }
        self.at != At::End
    }

    #[inline(always)]
    fn bytes(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.words)
    }

    #[inline(always)]
    fn kind(&mut self, i: usize, byte: u8) {
        self.kind = byte;
        match byte {
            kind::END => self.at = At::End,
            kind::NOP => {}
            // A kind without a length.
            _ if i as u32 + 1 == self.len => self.overwrite(i),
            _ => self.at = At::Length,
        }
    }

    #[inline(always)]
    fn length(&mut self, i: usize, byte: u8) {
        let room = self.len - i as u32 + 1;
        let honest = byte >= 2 && u32::from(byte) <= room;
        // After an impossible length, the following options cannot be found any more.
        self.left = if honest { u32::from(byte) - 2 } else { room - 2 };
        self.at = At::Body;
        if !honest || !self.to.takes(self.kind, byte) {
            self.at = At::Blank;
            self.overwrite(i);
            if i > 0 {
                self.overwrite(i - 1);
            }
        }
        if self.left == 0 {
            self.at = At::Kind;
        }
    }

    #[inline(always)]
    fn blank(&mut self, i: usize) {
        self.overwrite(i);
        self.advance();
    }

    #[inline(always)]
    fn overwrite(&mut self, i: usize) {
        self.bytes()[i] = kind::NOP;
        self.blanked = true;
    }

    /// The options that are translated consist of whole words.
    #[inline(always)]
    fn body(&mut self, i: usize) {
        if self.left & 3 == 1 && i >= 3 {
            let bytes = self.bytes();
            let word = u32::from_be_bytes([bytes[i - 3], bytes[i - 2], bytes[i - 1], bytes[i]]);
            let word = self.word(word).to_be_bytes();
            let bytes = self.bytes();
            [bytes[i - 3], bytes[i - 2], bytes[i - 1], bytes[i]] = word;
        }
        self.advance();
    }

    #[inline(always)]
    fn word(&mut self, word: u32) -> u32 {
        match self.kind {
            kind::SACK => word.wrapping_add(self.to.ack_delta),
            kind::TIMESTAMPS if self.left > 4 => {
                self.ts_value = Some(word);
                self.to.timestamps.value(word)
            }
            kind::TIMESTAMPS => self.to.timestamps.echo(word),
            _ => word,
        }
    }

    #[inline(always)]
    fn advance(&mut self) {
        self.left = self.left.wrapping_sub(1);
        if self.left == 0 {
            self.at = At::Kind;
        }
    }
}
