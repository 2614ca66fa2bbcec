//! TCP options. The BPF programs walk byte by byte. The model reads option by option. Both have to
//! agree.
#![no_main]

use bytemuck::{Pod, Zeroable};
use libfuzzer_sys::fuzz_target;
use proxy_common::flow::{Flow, flags};
use proxy_common::packet::options::{MAX_LEN, SackBlock, SackHead, TimestampsOption, Translation, Walk};
use proxy_common::packet::rewrite::Timestamps;
use proxy_common::shared::Share as _;
use steer_fuzz::{sum, take};

/// The front of an input. The options follow.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Numbers {
    /// Bit 0: the stream has timestamps; bit 1: it has SACK.
    has: u32,
    ack_delta: u32,
    shift: u32,
    floor: u32,
    other_shift: u32,
    other_latest: u32,
}

impl Numbers {
    fn has_timestamps(&self) -> bool {
        self.has & 1 != 0
    }

    fn has_sack(&self) -> bool {
        self.has & 2 != 0
    }

    fn translation(&self) -> Translation {
        let (mut flow, mut other) = (Flow::zeroed(), Flow::zeroed());
        flow.fixed.ack_delta = self.ack_delta;
        flow.fixed.ts_shift = self.shift;
        flow.fixed.ts_floor = self.floor;
        other.fixed.ts_shift = self.other_shift;
        other.live.ts_value = self.other_latest;
        let timestamps = if self.has_timestamps() { flags::TIMESTAMPS } else { 0 };
        let sack = if self.has_sack() { flags::SACK } else { 0 };
        Translation::of(timestamps | sack, &flow.to_shared(), &other.to_shared())
    }

    /// The TSval that is sent on for `value`.
    fn value(&self, value: u32) -> u32 {
        let shifted = value.wrapping_add(self.shift);
        let below = self.floor.wrapping_sub(shifted);
        if self.shift == 0 || below < 1 << 18 { self.floor } else { shifted }
    }

    /// The TSecr that is sent on for `echo`.
    fn echo(&self, echo: u32) -> u32 {
        if self.other_shift == 0 { self.other_latest } else { echo.wrapping_sub(self.other_shift) }
    }
}

/// The state after a walk.
#[derive(Debug, PartialEq, Eq)]
struct Walked {
    options: Vec<u8>,
    ts_value: Option<u32>,
    blanked: bool,
}

fn model(options: &[u8], numbers: &Numbers) -> Walked {
    let mut walked = Walked { options: options.to_vec(), ts_value: None, blanked: false };
    let mut at = 0;
    while at < options.len() && options[at] != 0 {
        let rest = &options[at..];
        let kind = rest[0];
        if kind == 1 {
            at += 1;
            continue;
        }
        // An option with an invalid length makes everything after it unreadable.
        let honest = rest.get(1).map(|len| usize::from(*len)).filter(|len| (2..=rest.len()).contains(len));
        let len = honest.unwrap_or(rest.len());
        let option = &mut walked.options[at..at + len];
        let sizes: &[usize] = match kind {
            2 => &[4],
            3 => &[3],
            4 => &[2],
            5 if numbers.has_sack() => &[10, 18, 26, 34],
            8 if numbers.has_timestamps() => &[10],
            _ => &[],
        };
        if honest.is_none_or(|len| !sizes.contains(&len)) {
            option.fill(1);
            walked.blanked = true;
        } else if kind == 5 {
            option[2..]
                .chunks_mut(4)
                .for_each(|edge| change(edge, |edge| edge.wrapping_add(numbers.ack_delta)));
        } else if kind == 8 {
            change(&mut option[2..6], |value| {
                walked.ts_value = Some(value);
                numbers.value(value)
            });
            change(&mut option[6..], |echo| numbers.echo(echo));
        }
        at += len;
    }
    walked
}

fn change(word: &mut [u8], by: impl FnOnce(u32) -> u32) {
    let old = u32::from_be_bytes([word[0], word[1], word[2], word[3]]);
    word.copy_from_slice(&by(old).to_be_bytes());
}

/// Walks as the BPF programs do. The bytes after the options must not change.
fn walk(options: &[u8], to: Translation) -> Walked {
    const AFTER: u8 = 0xa5;
    let mut walk = Walk::new(options.len() as u32, to);
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut walk.words);
    bytes.fill(AFTER);
    bytes[..options.len()].copy_from_slice(options);
    let steps = (0..).take_while(|i| walk.step(*i)).count();
    assert!(steps <= options.len(), "{steps} steps");
    let bytes: &[u8] = bytemuck::cast_slice(&walk.words);
    let (options, after) = bytes.split_at(options.len());
    assert!(after.iter().all(|byte| *byte == AFTER), "wrote after the options");
    Walked { options: options.to_vec(), ts_value: walk.ts_value, blanked: walk.blanked }
}

/// The fast path for timestamps, for the layout that nearly all stacks send.
fn only_timestamps(options: &[u8], to: &Timestamps) -> Option<Walked> {
    let mut option: TimestampsOption = bytemuck::try_pod_read_unaligned(options).ok()?;
    if option.head != TimestampsOption::HEAD {
        return None;
    }
    let (difference, value) = option.translate(to);
    let walked =
        Walked { options: bytemuck::bytes_of(&option).to_vec(), ts_value: Some(value), blanked: false };
    same_sum(options, &walked.options, difference.apply(0x1234));
    Some(walked)
}

/// The fast path for SACK blocks, for the layout that nearly all stacks send.
fn only_sack(mut options: &[u8], ack_delta: u32) -> Option<Walked> {
    let len = options.len() as u32;
    let mut walked =
        Walked { options: options.get(..SackHead::LEN)?.to_vec(), ts_value: None, blanked: false };
    let blocks = take::<SackHead>(&mut options)?.blocks(len);
    if blocks == 0 {
        return None;
    }
    assert_eq!(options.len(), blocks as usize * SackBlock::LEN, "all of the options");
    while let Some(mut block) = take::<SackBlock>(&mut options) {
        let old = block;
        let difference = block.translate(ack_delta);
        same_sum(bytemuck::bytes_of(&old), bytemuck::bytes_of(&block), difference.apply(0x1234));
        walked.options.extend(bytemuck::bytes_of(&block));
    }
    Some(walked)
}

/// Whether the update of a checksum of 0x1234 (wire order) makes up for the change from `old` to
/// `new`.
fn same_sum(old: &[u8], new: &[u8], check: u16) {
    let with = |bytes: &[u8], check: u16| sum(&[bytes, &check.to_ne_bytes()].concat());
    assert_eq!(with(old, 0x1234), with(new, check), "the checksum");
}

fuzz_target!(|input: &[u8]| {
    let mut input = input;
    let Some(numbers) = take::<Numbers>(&mut input) else { return };
    // A header consists of whole 32-bit words.
    let options = &input[..input.len().min(MAX_LEN) & !3];
    let to = numbers.translation();
    let walked = walk(options, to);
    assert_eq!(walked, model(options, &numbers), "(walk, model) of {options:02x?} by {numbers:?}");
    if numbers.has_timestamps()
        && let Some(short) = only_timestamps(options, &to.timestamps)
    {
        assert_eq!(short, walked, "(short way, walk)");
    }
    if numbers.has_sack()
        && let Some(short) = only_sack(options, numbers.ack_delta)
    {
        assert_eq!(short, walked, "(short way, walk)");
    }
});
