//! Checksums of the segments that end a stream, or a direction of it. Other packets are not
//! verified: a damaged packet stays damaged when it is rewritten, and its receiver drops it. But a
//! damaged end must not change the record either.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::{bpf_csum_diff, bpf_skb_load_bytes};
use aya_ebpf::programs::TcContext;
use proxy_common::packet::checksum;
use proxy_common::packet::headers::{Ethernet, Ip, Tcp};

use crate::maps::STEER_CHUNK;
use crate::packet::access::{checked, read, tcp_offset};

/// The most bytes that the kernel sums in one call (before Linux 6.14).
const CHUNK: u32 = 512;
/// Enough for a segment of Ethernet's usual size. A longer one has been put together by the kernel,
/// which has verified it.
const CHUNKS: u32 = 3;

#[repr(transparent)]
pub(crate) struct Chunk([u64; CHUNK as usize / 8]);

/// Whether the checksum of a plain packet's segment is wrong. A checksum that the sender's device
/// still has to complete counts as right. A function of its own in the program, for its own stack.
#[inline(never)]
pub(super) fn is_damaged<I: Ip>(ctx: &TcContext) -> bool {
    is_right::<I>(ctx) == Some(false)
}

/// `None`: the checksum could not be verified.
#[inline(always)]
fn is_right<I: Ip>(ctx: &TcContext) -> Option<bool> {
    let ip = read::<I>(ctx, Ethernet::LEN)?;
    let check = read::<Tcp>(ctx, tcp_offset::<I>())?.check;
    let len = ip.segment_len(ctx.len() - Ethernet::LEN as u32);
    if ip.is_piece() || len > CHUNKS * CHUNK {
        return None;
    }
    let pseudo_sum = ip.pseudo_sum(len as u16);
    if check == !checksum::finish(pseudo_sum) {
        return Some(true);
    }
    // SAFETY: this CPU's own value; nothing else uses it while the program runs.
    let chunk = unsafe { &mut *STEER_CHUNK.get_ptr_mut(0)? };
    let mut sum = 0;
    for index in 0..CHUNKS {
        let begin = index * CHUNK;
        if begin >= len {
            break;
        }
        sum = sum_up(ctx, chunk, tcp_offset::<I>() as u32 + begin, len - begin, sum)?;
    }
    Some(checksum::finish(pseudo_sum + u64::from(sum)) == 0)
}

/// Adds the bytes from `offset` on, at most a chunk.
#[inline(always)]
fn sum_up(ctx: &TcContext, chunk: &mut Chunk, offset: u32, len: u32, sum: u32) -> Option<u32> {
    let len = checked(if len > CHUNK { CHUNK } else { len }, 1..=CHUNK)?;
    chunk.0.iter_mut().for_each(|word| *word = 0);
    let bytes = (&raw mut chunk.0).cast();
    // SAFETY: `chunk` has room for `len` bytes.
    if unsafe { bpf_skb_load_bytes(ctx.as_ptr(), offset, bytes, len) } != 0 {
        return None;
    }
    // SAFETY: `chunk` has `CHUNK` bytes, and nothing is subtracted.
    let sum = unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, bytes.cast(), CHUNK, sum) };
    u32::try_from(sum).ok()
}
