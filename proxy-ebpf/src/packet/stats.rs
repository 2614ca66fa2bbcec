//! What userspace is told: counters and events.

use proxy_common::flow::FlowEvent;
use proxy_common::stat::Stat;

use crate::maps::{STEER_EVENTS, STEER_STATS};
use crate::packet::flows::RecordHandle;

/// Counts one packet.
#[inline(always)]
pub(crate) fn count(stat: Stat) {
    if let Some(counter) = STEER_STATS.get_ptr_mut(stat.number()) {
        // SAFETY: this CPU's own value, in a map that is never freed while a program runs.
        unsafe { *counter += 1 };
    }
}

/// Sends a [`proxy_common::flow::event`].
#[inline(always)]
pub(super) fn report(record: &RecordHandle, kind: u32) {
    match STEER_EVENTS.reserve::<FlowEvent>(0) {
        Some(mut entry) => {
            entry.write(FlowEvent { flow: record.flow, generation: record.generation(), kind, _pad: 0 });
            entry.submit(0);
        }
        None => count(Stat::EventLost),
    }
}
