//! The rules by which the kernel gives up streams that nobody looks after any more: no process of
//! the instance lives, and the peers have vanished or the stream is over.

use bytemuck::{Pod, Zeroable};

use crate::flow::state;

/// How often the kernel examines the records, in nanoseconds. A process sends its heartbeat about
/// as often.
pub const TICK_NS: u64 = 1_000_000_000;
/// Records examined per tick, at most, so that a tick does not occupy a CPU for long: about 15 ns
/// each.
pub const RECORDS_A_TICK: u32 = 4096;
/// Records expired per tick, at most: removing the keys of a stream takes about a microsecond.
pub const GIVEN_UP_A_TICK: u32 = 512;

/// The only value of the map `STEER_AGEING`. Times in nanoseconds, points in time by
/// CLOCK_MONOTONIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Expiry {
    /// When a process last sent a heartbeat; 0 = no process has.
    pub heartbeat_ns: u64,
    /// Without a heartbeat for this long, no process lives.
    pub gone_after_ns: u64,
    /// A stream without a plausible packet in either direction for this long has lost its peers;
    /// `u64::MAX` = never.
    pub orphan_timeout_ns: u64,
    /// How long the tuple of a stream stays after the stream is over.
    pub linger_ns: u64,
}

impl Expiry {
    /// Whether no process looks after the streams.
    #[inline(always)]
    pub const fn is_due(&self, now_ns: u64) -> bool {
        self.heartbeat_ns != 0 && now_ns.saturating_sub(self.heartbeat_ns) >= self.gone_after_ns
    }

    /// Whether a stream in this state has expired. Ask only when expiry [`is_due`](Self::is_due).
    /// `last_packet_ns` is the time of the last plausible packet in either direction. Silence
    /// counts only from the end of the process: until then, the process itself knew whether the
    /// peers were there.
    #[inline(always)]
    pub const fn has_come_for(&self, record_state: u32, last_packet_ns: u64, now_ns: u64) -> bool {
        let limit_ns = match record_state {
            state::OFF => return false,
            state::SPLICED => self.orphan_timeout_ns,
            state::FINISHED | state::RESET => self.linger_ns,
            // HAND_OVER: the sockets are gone, and their data with them. DEAD: the tuple belongs to
            // another connection.
            _ => 0,
        };
        let since_ns = if last_packet_ns > self.heartbeat_ns { last_packet_ns } else { self.heartbeat_ns };
        now_ns.saturating_sub(since_ns) >= limit_ns
    }
}

#[cfg(feature = "user")]
// SAFETY: `repr(C)`, integers only, no padding (checked by bytemuck's derive).
unsafe impl aya::Pod for Expiry {}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const EXPIRY: Expiry = Expiry {
        heartbeat_ns: 1000 * SECOND,
        gone_after_ns: 30 * SECOND,
        orphan_timeout_ns: 3600 * SECOND,
        linger_ns: 60 * SECOND,
    };

    #[test]
    fn nothing_expires_while_a_process_lives_or_before_the_first_one_did() {
        assert!(!EXPIRY.is_due(1029 * SECOND) && EXPIRY.is_due(1030 * SECOND));
        // The kernel uses a coarse clock, which is late.
        assert!(!EXPIRY.is_due(999 * SECOND));
        assert!(!Expiry::zeroed().is_due(1000 * SECOND));
    }

    #[test]
    fn each_state_has_its_time() {
        let after = |state, seconds: u64| EXPIRY.has_come_for(state, 0, (1000 + seconds) * SECOND);
        assert!(!after(state::SPLICED, 3599) && after(state::SPLICED, 3600));
        for over in [state::FINISHED, state::RESET] {
            assert!(!after(over, 59) && after(over, 60));
        }
        assert!(after(state::HAND_OVER, 30) && after(state::DEAD, 30));
        assert!(!after(state::OFF, 1_000_000));
    }

    #[test]
    fn a_packet_makes_a_stream_young_again() {
        let spliced = |last: u64, now: u64| EXPIRY.has_come_for(state::SPLICED, last * SECOND, now * SECOND);
        assert!(!spliced(2000, 5599) && spliced(2000, 5600));
        // Silence before the end of the process does not count.
        assert!(!spliced(1, 4599) && spliced(1, 4600));
    }

    #[test]
    fn never_is_never() {
        let never = Expiry { orphan_timeout_ns: u64::MAX, ..EXPIRY };
        assert!(!never.has_come_for(state::SPLICED, 0, u64::MAX - 1));
        assert!(never.has_come_for(state::FINISHED, 0, u64::MAX - 1));
    }
}
