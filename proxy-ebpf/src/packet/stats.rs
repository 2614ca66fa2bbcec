//! Counters and events.

use proxy_common::stat::Stat;

use crate::maps::STEER_STATS;

/// Counts one packet.
#[inline(always)]
pub(crate) fn count(stat: Stat) {
    if let Some(counter) = STEER_STATS.get_ptr_mut(stat.number()) {
        // SAFETY: a value of this CPU, which no other one writes; a program is not preempted by another
        // one that counts at this hook.
        unsafe { *counter += 1 };
    }
}
