//! The life of a stream after its sockets are closed, or during a long hand-over, as a pure state
//! machine. The caller shows the stream's record to the state machine now and then, and takes the
//! steps that it returns.

use std::time::Duration;

use proxy_common::flow::{Direction, Record, bits, flags, state};
use steer_policy::config;

use crate::streams::End;

/// A RST is repeated after this time: the packets that were under way have arrived by then, so its
/// number is exact. After the same time again, the tuple of the stream is removed.
pub(super) const RESET_LINGER: Duration = Duration::from_secs(1);

/// Time limits of all streams.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) keepalive: config::Keepalive,
    /// How long the tuple of a finished stream stays, for late retransmissions.
    pub(super) linger: Duration,
}

/// The part of a record that [`Life::next`] looks at, with times in nanoseconds of the same clock.
#[derive(Debug, Clone, Copy)]
pub(super) struct Look {
    state: u32,
    /// 0: no timeout.
    idle_timeout: Duration,
    /// When the last payload came, in either direction.
    last_payload_ns: u64,
    /// By [`Direction`]: when the last packet came.
    last_packet_ns: [u64; 2],
    /// Both FINs were acknowledged.
    finished: bool,
    /// A packet that could not be carried came to the local stack, so the program has ended the
    /// stream.
    not_carried: bool,
    /// The end that was asked for, if any.
    asked: Option<End>,
}

impl From<&Record> for Look {
    fn from(record: &Record) -> Self {
        let [up, down] = record.flows.map(|flow| flow.live);
        Self {
            state: record.state,
            idle_timeout: Duration::from_secs(record.idle_timeout_secs.into()),
            last_payload_ns: up.last_payload_ns.max(down.last_payload_ns),
            last_packet_ns: [up.last_packet_ns, down.last_packet_ns],
            finished: up.bits & down.bits & bits::FIN_ACKED != 0,
            not_carried: record.flags & (flags::NOT_CARRIED_UP | flags::NOT_CARRIED_DOWN) != 0,
            asked: None,
        }
    }
}

impl Look {
    /// The same look, with the end that was asked for.
    pub(super) fn asked(self, asked: Option<End>) -> Self {
        Self { asked, ..self }
    }

    /// The look at a stream that still has its sockets. The record does not know when the sockets
    /// moved payload, so the idle timeout is left out.
    pub(super) fn of_hand_over(record: &Record) -> Self {
        Self { idle_timeout: Duration::ZERO, ..Self::from(record) }
    }
}

/// What is to be done with a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Do nothing before this time.
    Wait { until_ns: u64 },
    /// Send a keepalive probe to the peer that this direction comes from.
    Probe(Direction),
    /// The stream has ended, and its tuple lingers.
    Ended(End),
    /// End the stream: send a RST to both peers.
    Abort(End),
    /// Send one more RST to both peers.
    ResetAgain,
    /// Remove the stream, its record and its keys.
    Remove,
}

/// The state of a stream between two looks.
#[derive(Debug, Clone, Copy)]
pub(super) enum Life {
    /// By [`Direction`], the probes that were sent since the last packet; and the time before which
    /// silence does not count.
    Living { probes: [u32; 2], from_ns: u64 },
    /// At this time the RSTs are repeated.
    Reset { again_ns: u64 },
    /// At this time the stream is removed.
    Over { at_ns: u64 },
}

impl Life {
    pub(super) const fn new() -> Self {
        Self::adopted(0)
    }

    /// The state of a stream that no process has looked after before `now_ns`. Silence before that
    /// time does not mean that a peer is gone, since the peers were not probed.
    pub(super) const fn adopted(now_ns: u64) -> Self {
        Self::Living { probes: [0; 2], from_ns: now_ns }
    }

    /// Returns the next step. To be called again with the same look, until the step is
    /// [`Step::Wait`] or [`Step::Remove`]. `spread` (0 to 255) staggers the probes of streams that
    /// fell silent together.
    pub(super) fn next(&mut self, now_ns: u64, look: &Look, limits: &Limits, spread: u8) -> Step {
        let (probes, from_ns) = match self {
            Self::Over { .. } | Self::Reset { .. } if is_nobodys(look.state) => return Step::Remove,
            Self::Reset { again_ns } if *again_ns <= now_ns => {
                *self = Self::Over { at_ns: now_ns.saturating_add(nanoseconds(RESET_LINGER)) };
                return Step::ResetAgain;
            }
            Self::Reset { again_ns } => return Step::Wait { until_ns: *again_ns },
            Self::Over { at_ns } if *at_ns <= now_ns => return Step::Remove,
            Self::Over { at_ns } => return Step::Wait { until_ns: *at_ns },
            Self::Living { probes, from_ns } => (probes, *from_ns),
        };
        match look.state {
            state::FINISHED => return self.over(now_ns, End::Finished, limits.linger),
            state::RESET if look.not_carried => return self.abort(now_ns, End::NotCarried),
            // The peer's RST was forwarded. But if packets were under way to the other peer, the
            // RST may not have had the number that the other peer expects.
            state::RESET => return self.abort(now_ns, End::Reset),
            // A new connection has taken the tuple, which the program allows only after a stream is
            // over. Or the stream has expired in the kernel, since this process was stopped for
            // long.
            found if is_nobodys(found) => {
                let end = if look.finished { End::Finished } else { End::Reset };
                return self.over(now_ns, end, Duration::ZERO);
            }
            _ => {}
        }
        if let Some(end) = look.asked {
            return self.abort(now_ns, end);
        }
        let mut until_ns = u64::MAX;
        if !look.idle_timeout.is_zero() {
            let idle_at = look.last_payload_ns.saturating_add(nanoseconds(look.idle_timeout));
            if idle_at <= now_ns {
                return self.abort(now_ns, End::IdleTimeout);
            }
            until_ns = idle_at;
        }
        for direction in Direction::BOTH {
            let sent = &mut probes[direction as usize];
            let keepalive = &limits.keepalive;
            let (time, interval) = (nanoseconds(keepalive.time), nanoseconds(keepalive.interval).max(1));
            let last_packet_ns = look.last_packet_ns[direction as usize].max(from_ns);
            let silent = now_ns.saturating_sub(last_packet_ns);
            let first = time + interval / 256 * u64::from(spread);
            // The number of probes that should have been sent by now, one for each interval.
            let due = silent.checked_sub(first).map_or(0, |late| late / interval + 1);
            if due > u64::from(keepalive.probes) {
                return self.abort(now_ns, End::Reset);
            }
            if due == 0 {
                *sent = 0;
            } else if due > u64::from(*sent) {
                // After a pause of the process, one probe stands for all missed ones.
                *sent = due as u32;
                return Step::Probe(direction);
            }
            until_ns = until_ns.min(now_ns - silent + first + due * interval);
        }
        Step::Wait { until_ns }
    }

    fn over(&mut self, now_ns: u64, end: End, linger: Duration) -> Step {
        *self = Self::Over { at_ns: now_ns.saturating_add(nanoseconds(linger)) };
        Step::Ended(end)
    }

    fn abort(&mut self, now_ns: u64, end: End) -> Step {
        *self = Self::Reset { again_ns: now_ns.saturating_add(nanoseconds(RESET_LINGER)) };
        Step::Abort(end)
    }
}

/// Whether the stream has no tuple any more.
const fn is_nobodys(session_state: u32) -> bool {
    matches!(session_state, state::DEAD | state::OFF)
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    const LIMITS: Limits = Limits {
        keepalive: config::Keepalive {
            time: Duration::from_secs(60),
            interval: Duration::from_secs(15),
            probes: 4,
        },
        linger: Duration::from_secs(60),
    };

    /// The last packets and the last payload came at second 1000.
    fn look(state: u32) -> Look {
        Look {
            state,
            idle_timeout: Duration::ZERO,
            last_payload_ns: 1000 * SECOND,
            last_packet_ns: [1000 * SECOND; 2],
            finished: false,
            not_carried: false,
            asked: None,
        }
    }

    fn next(life: &mut Life, at: u64, look: Look) -> Step {
        life.next(at * SECOND, &look, &LIMITS, 0)
    }

    fn wait(until: u64) -> Step {
        Step::Wait { until_ns: until * SECOND }
    }

    #[test]
    fn a_finished_stream_ends_at_once_and_its_tuple_lingers() {
        let mut life = Life::new();
        assert_eq!(next(&mut life, 1000, look(state::SPLICED)), wait(1060));
        assert_eq!(next(&mut life, 1001, look(state::FINISHED)), Step::Ended(End::Finished));
        assert_eq!(next(&mut life, 1001, look(state::FINISHED)), wait(1061));
        assert_eq!(next(&mut life, 1061, look(state::FINISHED)), Step::Remove);
    }

    #[test]
    fn a_reset_is_repeated_and_lingers_for_a_moment() {
        let mut life = Life::new();
        assert_eq!(next(&mut life, 1001, look(state::RESET)), Step::Abort(End::Reset));
        assert_eq!(next(&mut life, 1001, look(state::RESET)), wait(1002));
        assert_eq!(next(&mut life, 1002, look(state::RESET)), Step::ResetAgain);
        assert_eq!(next(&mut life, 1002, look(state::RESET)), wait(1003));
        assert_eq!(next(&mut life, 1003, look(state::RESET)), Step::Remove);
    }

    #[test]
    fn a_stream_with_a_packet_that_was_not_carried_ends_as_not_carried() {
        let mut life = Life::new();
        let look = Look { not_carried: true, ..look(state::RESET) };
        assert_eq!(next(&mut life, 1001, look), Step::Abort(End::NotCarried));
        assert_eq!(next(&mut life, 1002, look), Step::ResetAgain);
    }

    #[test]
    fn a_stream_ends_as_it_was_asked_to_unless_it_has_ended() {
        let asked = |state| Look { asked: Some(End::IdleTimeout), ..look(state) };
        let mut life = Life::new();
        assert_eq!(next(&mut life, 1001, asked(state::SPLICED)), Step::Abort(End::IdleTimeout));
        assert_eq!(next(&mut life, 1001, asked(state::RESET)), wait(1002));
        let mut life = Life::new();
        assert_eq!(next(&mut life, 1001, asked(state::FINISHED)), Step::Ended(End::Finished));
        assert_eq!(next(&mut life, 1001, asked(state::FINISHED)), wait(1061));
    }

    #[test]
    fn a_reused_tuple_is_removed_at_once() {
        let mut life = Life::new();
        assert_eq!(next(&mut life, 1001, look(state::FINISHED)), Step::Ended(End::Finished));
        assert_eq!(next(&mut life, 1002, look(state::DEAD)), Step::Remove);
        // The same when the events before were lost:
        let ends = [(true, End::Finished), (false, End::Reset)];
        for (gone, (finished, end)) in [state::DEAD, state::OFF].into_iter().zip(ends) {
            let mut life = Life::new();
            let look = Look { finished, ..look(gone) };
            assert_eq!(next(&mut life, 1002, look), Step::Ended(end));
            assert_eq!(next(&mut life, 1002, look), Step::Remove);
        }
    }

    #[test]
    fn silence_without_payload_ends_at_the_idle_timeout() {
        let mut life = Life::new();
        let idle = Look { idle_timeout: Duration::from_secs(30), ..look(state::SPLICED) };
        assert_eq!(next(&mut life, 1010, idle), wait(1030));
        // Packets without payload do not count.
        let alive = Look { last_packet_ns: [1029 * SECOND; 2], ..idle };
        assert_eq!(next(&mut life, 1030, alive), Step::Abort(End::IdleTimeout));
        assert_eq!(next(&mut life, 1030, Look { state: state::RESET, ..alive }), wait(1031));
    }

    #[test]
    fn a_silent_peer_is_probed_and_then_given_up() {
        let mut life = Life::new();
        // The endpoint sends packets, the client is gone.
        let heard = |at| Look { last_packet_ns: [1000 * SECOND, at * SECOND], ..look(state::SPLICED) };
        assert_eq!(next(&mut life, 1059, heard(1059)), wait(1060));
        for (at, until) in [(1060, 1075), (1075, 1090), (1090, 1105), (1105, 1120)] {
            assert_eq!(next(&mut life, at, heard(at)), Step::Probe(Direction::ToUpstream));
            assert_eq!(next(&mut life, at, heard(at)), wait(until));
        }
        assert_eq!(next(&mut life, 1120, heard(1120)), Step::Abort(End::Reset));
    }

    #[test]
    fn the_silence_of_an_adopted_stream_begins_when_it_is_adopted() {
        let mut life = Life::adopted(5000 * SECOND);
        assert_eq!(next(&mut life, 5000, look(state::SPLICED)), wait(5060));
        assert_eq!(next(&mut life, 5060, look(state::SPLICED)), Step::Probe(Direction::ToUpstream));
    }

    #[test]
    fn an_answer_begins_the_silence_anew() {
        let mut life = Life::new();
        assert_eq!(next(&mut life, 1061, look(state::SPLICED)), Step::Probe(Direction::ToUpstream));
        assert_eq!(next(&mut life, 1061, look(state::SPLICED)), Step::Probe(Direction::ToDownstream));
        assert_eq!(next(&mut life, 1061, look(state::SPLICED)), wait(1075));
        let answered = Look { last_packet_ns: [1062 * SECOND; 2], ..look(state::SPLICED) };
        assert_eq!(next(&mut life, 1075, answered), wait(1122));
        assert_eq!(next(&mut life, 1122, answered), Step::Probe(Direction::ToUpstream));
    }

    #[test]
    fn probes_of_many_streams_are_spread() {
        let late = Life::new().next(1060 * SECOND, &look(state::SPLICED), &LIMITS, 128);
        assert_eq!(late, Step::Wait { until_ns: 1060 * SECOND + 15 * SECOND / 256 * 128 });
    }
}
