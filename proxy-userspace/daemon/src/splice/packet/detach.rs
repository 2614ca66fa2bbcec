//! Ends the streams that a process has left, when no other process will take them over.

use std::io;
use std::thread;

use proxy_common::flow::state;
use steer_kernel::bpf::packet::pinned::Pinned;
use steer_kernel::tcp::raw::RawSender;

use super::life::RESET_LINGER;
use super::owned_record::{abort, abort_again};

/// The number of living streams of an instance.
pub fn living(found: &Pinned) -> usize {
    all_living(found).len()
}

/// Ends the living streams with a RST to both peers of each, and returns their number. Takes a
/// second: the RSTs are repeated after the packets under way have arrived, since a peer accepts a
/// RST only with the exact number that it expects.
///
/// # Errors
/// CAP_NET_RAW is missing.
pub fn reset_all(found: &Pinned) -> io::Result<usize> {
    let raw = RawSender::new()?;
    let living = all_living(found);
    if living.is_empty() {
        return Ok(0);
    }
    living.iter().for_each(|index| abort(found.records(), &raw, *index));
    #[expect(clippy::disallowed_methods, reason = "`steer detach` has no runtime")]
    thread::sleep(RESET_LINGER);
    living.iter().for_each(|index| abort_again(found.records(), &raw, *index));
    Ok(living.len())
}

fn all_living(found: &Pinned) -> Vec<u32> {
    let records = found.records();
    let lives = |index: &u32| matches!(records.state(*index), state::HAND_OVER | state::SPLICED);
    records.all_used().into_iter().filter(lives).collect()
}
