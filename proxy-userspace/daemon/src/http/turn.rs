//! Whose turn it is on a downstream connection, and until when, as a pure state machine: the time is given.

use std::time::{Duration, Instant};

use super::fault::Fault;

/// A connection that is to be closed with its next response is not waited for longer than this, which is more than the
/// time between two polls of socket.io (25 s).
const LEAVING_IDLE: Duration = Duration::from_secs(30);

/// Timeouts between requests, from the listener's options.
#[derive(Debug, Clone, Copy)]
pub(super) struct ConnectionTimeouts {
    /// From the first byte of a request head to its end.
    pub(super) head: Option<Duration>,
    /// Without a request in flight.
    pub(super) idle: Option<Duration>,
}

/// Timeouts of the request in flight.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RequestTimeouts {
    /// Until the response head; starts anew with each piece of the request's body, so that a long
    /// upload is not mistaken for a slow endpoint.
    pub(super) response: Option<Duration>,
    /// Nothing moves on the downstream connection, in either direction.
    pub(super) idle: Option<Duration>,
}

/// What the guard made of the head that it gave to hyper last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Passed {
    Request,
    /// Asks for an upgrade; the bytes after it are held back. `had_body`: it announced a body,
    /// which counts as payload of the stream.
    Upgrade {
        had_body: bool,
    },
    /// Stands in for a head that was refused: to be answered with this.
    Refused(Fault),
}

/// Who may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// The client: nothing is in flight, the next head may pass.
    Client,
    /// The service: one request is in flight; the request's body passes, the next head waits.
    Service,
    /// The stream: an upgrade was accepted, no byte goes to hyper any more.
    Stream,
}

/// What the guard waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waiting {
    FirstByte,
    RestOfHead,
    Body,
    /// The response, or its reader.
    Response,
}

/// What the connection's task has to do when time is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Overdue {
    /// Close the connection, nobody waits for anything.
    CloseIdle,
    /// The answer is on its way: poll the connection again.
    Answer,
    /// Break off: a response has begun and does not move any more.
    Abort,
}

/// How far a connection has got with its requests.
#[derive(Debug)]
pub(super) struct Turns {
    timeouts: ConnectionTimeouts,
    pub(super) turn: Turn,
    pub(super) passed: Passed,
    waiting: Waiting,
    waiting_since: Instant,
    /// When a byte last moved on the downstream connection.
    pub(super) moved: Instant,
    request: RequestTimeouts,
    responded: bool,
    /// The client can tell where the response's body ends.
    framed: bool,
    broken_off: bool,
    /// Ends the request in flight.
    pub(super) fault: Option<Fault>,
    pub(super) head_overdue: bool,
    /// The connection was asked to close, being idle.
    closing: bool,
    /// The next response is to be the last: since then.
    leaving: Option<Instant>,
}

impl Turns {
    pub(super) fn new(timeouts: ConnectionTimeouts, now: Instant) -> Self {
        Self {
            timeouts,
            turn: Turn::Client,
            passed: Passed::Request,
            waiting: Waiting::FirstByte,
            waiting_since: now,
            moved: now,
            request: RequestTimeouts::default(),
            responded: false,
            framed: true,
            broken_off: false,
            fault: None,
            head_overdue: false,
            closing: false,
            leaving: None,
        }
    }

    /// A head goes to the service.
    pub(super) fn pass(&mut self, passed: Passed, now: Instant) {
        self.turn = Turn::Service;
        self.passed = passed;
        self.moved = now;
        self.waiting = Waiting::Response;
        self.request = RequestTimeouts::default();
        self.responded = false;
        self.fault = None;
        self.head_overdue = false;
    }

    pub(super) fn wait_for(&mut self, what: Waiting, now: Instant) {
        if self.waiting != what {
            self.waiting = what;
            self.waiting_since = now;
        }
    }

    /// Limits the request, which has just passed.
    pub(super) fn limit(&mut self, timeouts: RequestTimeouts) {
        self.request = timeouts;
    }

    /// The response head is known. `framed`: the client can tell where the body ends.
    pub(super) fn respond(&mut self, framed: bool) {
        self.responded = true;
        self.framed = framed;
    }

    /// The response's body ends before its end.
    pub(super) fn break_off(&mut self) {
        self.broken_off = true;
    }

    /// Whether closing with a FIN would make a response that broke off look complete.
    pub(super) fn would_look_complete(&self) -> bool {
        self.broken_off && !self.framed
    }

    /// The request in flight is over.
    pub(super) fn finish(&mut self, now: Instant) {
        if self.turn == Turn::Service {
            self.turn = Turn::Client;
            // Unless the guard, when asked next, finds that there is more already.
            self.waiting = Waiting::FirstByte;
            self.waiting_since = now;
        }
    }

    /// The connection is to be closed with its next response, or when it has been idle for a while.
    pub(super) fn leave(&mut self, now: Instant) {
        self.leaving.get_or_insert(now);
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.leaving.is_some()
    }

    /// When [`Self::overdue`] has something to do; `None`: not before something happens.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.waiting {
            // The last response may still be on its way out.
            Waiting::FirstByte => {
                let idle = self.waiting_since.max(self.moved);
                let overdue = self.timeouts.idle.map(|limit| idle + limit);
                let left = self.leaving.map(|since| idle.max(since) + LEAVING_IDLE);
                overdue.into_iter().chain(left).min()
            }
            Waiting::RestOfHead if self.head_overdue => None,
            Waiting::RestOfHead => Some(self.waiting_since + self.timeouts.head?),
            // The service is about to answer.
            Waiting::Body | Waiting::Response if self.fault.is_some() && !self.responded => None,
            Waiting::Body | Waiting::Response => {
                let response = self.request.response.filter(|_| !self.responded);
                let limit = match (response, self.request.idle) {
                    (Some(response), Some(idle)) => response.min(idle),
                    (response, idle) => response.or(idle)?,
                };
                Some(self.moved + limit)
            }
        }
    }

    /// The deadline has passed.
    pub(super) fn overdue(&mut self, now: Instant) -> Overdue {
        match self.waiting {
            Waiting::FirstByte if self.closing => Overdue::Abort,
            Waiting::FirstByte => {
                self.closing = true;
                self.waiting_since = now;
                Overdue::CloseIdle
            }
            Waiting::RestOfHead => {
                self.head_overdue = true;
                Overdue::Answer
            }
            Waiting::Body | Waiting::Response if self.responded => Overdue::Abort,
            Waiting::Body => {
                self.fault = Some(Fault::BodyTimeout);
                Overdue::Answer
            }
            Waiting::Response => {
                let idle_first = match (self.request.idle, self.request.response) {
                    (Some(idle), Some(response)) => idle < response,
                    (idle, _) => idle.is_some(),
                };
                self.fault = Some(if idle_first { Fault::StreamIdle } else { Fault::ResponseTimeout });
                Overdue::Answer
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: u64 = 10;
    const IDLE: u64 = 60;

    /// A connection and the seconds since its accept.
    struct Clock {
        turns: Turns,
        start: Instant,
        now: u64,
    }

    impl Clock {
        fn new() -> Self {
            let seconds = |seconds| Some(Duration::from_secs(seconds));
            let (start, timeouts) =
                (Instant::now(), ConnectionTimeouts { head: seconds(HEAD), idle: seconds(IDLE) });
            Self { turns: Turns::new(timeouts, start), start, now: 0 }
        }

        fn at(&mut self, second: u64, change: impl FnOnce(&mut Turns, Instant)) -> &mut Self {
            self.now = second;
            change(&mut self.turns, self.start + Duration::from_secs(second));
            self
        }

        /// In seconds since the accept.
        fn deadline(&self) -> Option<u64> {
            self.turns.deadline().map(|deadline| (deadline - self.start).as_secs())
        }

        /// What is to be done when the deadline passes.
        fn overdue(&mut self) -> Overdue {
            let deadline = self.turns.deadline().expect("there is a deadline");
            self.turns.overdue(deadline)
        }
    }

    fn request(response: Option<u64>, idle: Option<u64>) -> impl FnOnce(&mut Turns, Instant) {
        move |turns, now| {
            turns.pass(Passed::Request, now);
            let seconds = |seconds: Option<u64>| seconds.map(Duration::from_secs);
            turns.limit(RequestTimeouts { response: seconds(response), idle: seconds(idle) });
        }
    }

    #[test]
    fn an_idle_connection_is_closed_and_then_broken_off() {
        let mut clock = Clock::new();
        assert_eq!(clock.deadline(), Some(IDLE));
        assert_eq!(clock.overdue(), Overdue::CloseIdle);
        assert_eq!(clock.deadline(), Some(2 * IDLE));
        assert_eq!(clock.overdue(), Overdue::Abort);
    }

    #[test]
    fn the_head_has_its_time_from_its_first_byte() {
        let mut clock = Clock::new();
        clock.at(5, |turns, now| turns.wait_for(Waiting::RestOfHead, now));
        clock.at(9, |turns, now| turns.wait_for(Waiting::RestOfHead, now));
        assert_eq!(clock.deadline(), Some(5 + HEAD), "a further byte does not prolong it");
        assert_eq!(clock.overdue(), Overdue::Answer);
        assert!(clock.turns.head_overdue);
        assert_eq!(clock.deadline(), None, "the answer is on its way");
        clock.at(16, |turns, now| turns.pass(Passed::Refused(Fault::HeadTimeout), now));
        assert!(!clock.turns.head_overdue);
    }

    #[test]
    fn the_shorter_limit_of_a_request_says_what_is_wrong() {
        // Limits of the response and of idleness; the deadline after a request at second 3, and the fault.
        let rows = [
            (Some(15), None, Some(18), Fault::ResponseTimeout),
            (Some(15), Some(300), Some(18), Fault::ResponseTimeout),
            (Some(15), Some(5), Some(8), Fault::StreamIdle),
            (None, Some(5), Some(8), Fault::StreamIdle),
        ];
        for (response, idle, deadline, fault) in rows {
            let mut clock = Clock::new();
            clock.at(3, request(response, idle));
            assert_eq!(clock.deadline(), deadline, "{response:?} {idle:?}");
            assert_eq!(clock.overdue(), Overdue::Answer);
            assert_eq!(clock.turns.fault, Some(fault), "{response:?} {idle:?}");
            assert_eq!(clock.deadline(), None, "the answer is on its way");
        }
        let mut clock = Clock::new();
        clock.at(3, request(None, None));
        assert_eq!(clock.deadline(), None);
    }

    #[test]
    fn a_body_that_moves_puts_the_deadline_off_and_one_that_stops_is_the_clients_fault() {
        let mut clock = Clock::new();
        clock.at(0, request(Some(15), None));
        clock.at(4, |turns, now| {
            turns.wait_for(Waiting::Body, now);
            turns.moved = now;
        });
        assert_eq!(clock.deadline(), Some(19));
        assert_eq!(clock.overdue(), Overdue::Answer);
        assert_eq!(clock.turns.fault, Some(Fault::BodyTimeout));
    }

    #[test]
    fn a_response_that_has_begun_is_limited_by_idleness_only_and_broken_off() {
        let mut clock = Clock::new();
        clock.at(0, request(Some(15), Some(40)));
        clock.at(1, |turns, _now| turns.respond(true));
        assert_eq!(clock.deadline(), Some(40));
        assert_eq!(clock.overdue(), Overdue::Abort);
        assert!(!clock.turns.would_look_complete());
        clock.at(41, |turns, _now| {
            turns.respond(false);
            turns.break_off();
        });
        assert!(clock.turns.would_look_complete());
    }

    #[test]
    fn after_a_response_the_idle_time_begins_anew() {
        let mut clock = Clock::new();
        clock.at(0, request(Some(15), None)).at(7, |turns, now| turns.finish(now));
        assert_eq!((clock.turns.turn, clock.deadline()), (Turn::Client, Some(7 + IDLE)));
        // The end of a request that became a stream changes nothing.
        clock.at(8, request(None, None)).turns.turn = Turn::Stream;
        clock.at(9, |turns, now| turns.finish(now));
        assert_eq!(clock.turns.turn, Turn::Stream);
    }

    #[test]
    fn a_connection_that_is_to_leave_is_not_waited_for_as_long() {
        let mut clock = Clock::new();
        clock.at(20, |turns, now| turns.leave(now));
        assert_eq!(clock.deadline(), Some(50));
        clock.at(25, |turns, now| turns.leave(now));
        assert_eq!(clock.deadline(), Some(50), "it was told already");
        clock.at(40, request(None, None)).at(45, |turns, now| turns.finish(now));
        assert_eq!(clock.deadline(), Some(75));
    }
}
