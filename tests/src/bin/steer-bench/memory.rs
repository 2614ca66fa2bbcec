//! What an idle `WebSocket` costs the proxy: its process, its BPF maps, and the kernel's memory for its sockets.

use anyhow::Result;

use crate::lanes::Lanes;
use crate::plan::Profile;
use crate::results::Series;
use crate::subjects::{Kind, Programs};

/// Measures each of `kinds` that is a proxy, and the direct connection for comparison if it has a lane.
///
/// Starts endpoints and subjects itself, afresh, so none may be running.
pub(crate) fn run(
    _lanes: &Lanes,
    _programs: &Programs,
    _kinds: &[Kind],
    _profile: Profile,
) -> Result<Vec<Series>> {
    Ok(Vec::new())
}
