//! The end of streams that a process has left, when no other process is to take them over.

use std::io;
use std::thread;

use proxy_common::flow::state;
use steer_kernel::bpf::packet::pinned::Pinned;
use steer_kernel::tcp::raw::RawSender;

use super::life::RESET_LINGER;
use super::record::{abort, abort_again};

/// How many of an instance's streams live.
pub fn living(found: &Pinned) -> usize {
    all_living(found).len()
}

/// Ends the streams that live with a RST to both peers of each, and returns how many there were. Takes a second: the RSTs are
/// repeated when what was under way has arrived, since a peer believes only one with the number that it expects.
///
/// # Errors
/// CAP_NET_RAW is missing.
pub fn reset_all(found: &Pinned) -> io::Result<usize> {
    let raw = RawSender::new()?;
    let living = all_living(found);
    if living.is_empty() {
        return Ok(0);
    }
    living.iter().for_each(|conn| abort(found.conns(), &raw, *conn));
    thread::sleep(RESET_LINGER);
    living.iter().for_each(|conn| abort_again(found.conns(), &raw, *conn));
    Ok(living.len())
}

fn all_living(found: &Pinned) -> Vec<u32> {
    let conns = found.conns();
    let lives = |conn: &u32| matches!(conns.state(*conn), state::HAND_OVER | state::SPLICED);
    conns.all_used().into_iter().filter(lives).collect()
}
