//! What the three parts of a downstream connection must agree on: the guard before hyper (which head
//! may pass), the service (which request is in flight), and the connection's task (what to
//! wait for, and how long). All three run in one task, so the lock is never contended.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use hyper::upgrade::OnUpgrade;

use super::fault::Fault;
use super::upgrade::Switched;

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

/// Whose turn it is to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing is in flight: the next head may pass.
    Open,
    /// One request is in flight; its body passes, the next head waits.
    Busy,
    /// An upgrade was accepted: no byte goes to hyper any more.
    Switched,
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

/// A connection that is to be closed with its next response is not waited for longer than this, which is more than the time
/// between two polls of socket.io (25 s).
const LEAVING_IDLE: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(super) struct Exchange {
    timeouts: ConnectionTimeouts,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    passed: Passed,
    waiting: Waiting,
    waiting_since: Instant,
    /// When a byte last moved on the downstream connection.
    moved: Instant,
    request: RequestTimeouts,
    responded: bool,
    framed: bool,
    broken_off: bool,
    /// Ends the request in flight.
    fault: Option<Fault>,
    head_overdue: bool,
    /// The connection was asked to close, being idle.
    closing: bool,
    /// The next response is to be the last: since then.
    leaving: Option<Instant>,
    on_upgrade: Option<OnUpgrade>,
    switched: Option<Switched>,
    reader: Option<Waker>,
}

impl Exchange {
    pub(super) fn new(timeouts: ConnectionTimeouts) -> Self {
        let now = Instant::now();
        Self {
            timeouts,
            state: Mutex::new(State {
                phase: Phase::Open,
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
                on_upgrade: None,
                switched: None,
                reader: None,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while the lock is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // What the guard says and asks.

    /// The phase. A guard that `holds` bytes is woken when they may pass.
    pub(super) fn phase(&self, cx: &Context<'_>, holds: bool) -> Phase {
        let mut state = self.lock();
        if state.phase == Phase::Busy && holds {
            match &mut state.reader {
                Some(reader) => reader.clone_from(cx.waker()),
                reader => *reader = Some(cx.waker().clone()),
            }
        }
        state.phase
    }

    /// A head goes to hyper.
    pub(super) fn pass(&self, passed: Passed) {
        let mut state = self.lock();
        state.phase = Phase::Busy;
        state.passed = passed;
        state.moved = Instant::now();
        state.waiting = Waiting::Response;
        state.request = RequestTimeouts::default();
        state.responded = false;
        state.fault = None;
        state.head_overdue = false;
    }

    pub(super) fn wait_for(&self, what: Waiting) {
        let mut state = self.lock();
        if state.waiting != what {
            state.waiting = what;
            state.waiting_since = Instant::now();
        }
    }

    /// Bytes of a body or of a response moved.
    pub(super) fn moved(&self) {
        self.lock().moved = Instant::now();
    }

    /// The request in flight cannot be completed: its body is broken.
    pub(super) fn fail(&self, fault: Fault) {
        self.lock().fault.get_or_insert(fault);
    }

    /// The head took too long; told once.
    pub(super) fn take_head_overdue(&self) -> bool {
        std::mem::take(&mut self.lock().head_overdue)
    }

    // What the service says and asks.

    /// What the guard made of the head in hand, and when.
    pub(super) fn passed(&self) -> (Passed, Instant) {
        let state = self.lock();
        (state.passed, state.moved)
    }

    /// Whether the response to the request in flight is the connection's last one.
    pub(super) fn is_leaving(&self) -> bool {
        self.lock().leaving.is_some()
    }

    /// Limits the request, which has just passed.
    pub(super) fn limit(&self, timeouts: RequestTimeouts) {
        self.lock().request = timeouts;
    }

    /// Why the request in flight must end, if it must.
    pub(super) fn fault(&self) -> Option<Fault> {
        self.lock().fault
    }

    /// The response head is known. `framed`: the client can tell where the body ends.
    pub(super) fn responded(&self, framed: bool) {
        let mut state = self.lock();
        state.responded = true;
        state.framed = framed;
    }

    /// The response's body ends before its end.
    pub(super) fn break_off(&self) {
        self.lock().broken_off = true;
    }

    /// The upgrade is accepted: after this response the connection carries a stream.
    pub(super) fn switch(&self, switched: Switched) {
        let mut state = self.lock();
        state.phase = Phase::Switched;
        state.switched = Some(switched);
    }

    /// Whether the connection is to carry a stream.
    pub(super) fn is_switched(&self) -> bool {
        self.lock().phase == Phase::Switched
    }

    /// The request in flight is over: its response has been handed to hyper whole, or dropped.
    pub(super) fn finish(&self) {
        let mut state = self.lock();
        if state.phase == Phase::Busy {
            state.phase = Phase::Open;
            // Unless the guard, when asked next, finds that there is more already.
            state.waiting = Waiting::FirstByte;
            state.waiting_since = Instant::now();
        }
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
    }

    /// hyper's promise to give the connection back, for each request that it takes for an upgrade.
    pub(super) fn keep_upgrade(&self, on_upgrade: OnUpgrade) {
        self.lock().on_upgrade = Some(on_upgrade);
    }

    // What the connection's task asks.

    pub(super) fn take_upgrade(&self) -> Option<OnUpgrade> {
        self.lock().on_upgrade.take()
    }

    pub(super) fn take_switched(&self) -> Option<Switched> {
        self.lock().switched.take()
    }

    /// Whether closing with a FIN would make a response that broke off look complete.
    pub(super) fn would_look_complete(&self) -> bool {
        let state = self.lock();
        state.broken_off && !state.framed
    }

    /// The connection is to be closed with its next response, or when it has been idle for a while.
    pub(super) fn leave(&self) {
        self.lock().leaving.get_or_insert_with(Instant::now);
    }

    /// When [`Self::overdue`] has something to do; `None`: not before something happens.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let state = self.lock();
        match state.waiting {
            // The last response may still be on its way out.
            Waiting::FirstByte => {
                let idle = state.waiting_since.max(state.moved);
                let overdue = self.timeouts.idle.map(|limit| idle + limit);
                let left = state.leaving.map(|since| idle.max(since) + LEAVING_IDLE);
                overdue.into_iter().chain(left).min()
            }
            Waiting::RestOfHead if state.head_overdue => None,
            Waiting::RestOfHead => Some(state.waiting_since + self.timeouts.head?),
            // The service is about to answer.
            Waiting::Body | Waiting::Response if state.fault.is_some() && !state.responded => None,
            Waiting::Body | Waiting::Response => {
                let response = state.request.response.filter(|_| !state.responded);
                let limit = match (response, state.request.idle) {
                    (Some(response), Some(idle)) => response.min(idle),
                    (response, idle) => response.or(idle)?,
                };
                Some(state.moved + limit)
            }
        }
    }

    /// The deadline has passed.
    pub(super) fn overdue(&self) -> Overdue {
        let mut state = self.lock();
        match state.waiting {
            Waiting::FirstByte if state.closing => Overdue::Abort,
            Waiting::FirstByte => {
                state.closing = true;
                state.waiting_since = Instant::now();
                Overdue::CloseIdle
            }
            Waiting::RestOfHead => {
                state.head_overdue = true;
                Overdue::Answer
            }
            Waiting::Body | Waiting::Response if state.responded => Overdue::Abort,
            Waiting::Body => {
                state.fault = Some(Fault::BodyTimeout);
                Overdue::Answer
            }
            Waiting::Response => {
                let idle_first = match (state.request.idle, state.request.response) {
                    (Some(idle), Some(response)) => idle < response,
                    (idle, _) => idle.is_some(),
                };
                state.fault = Some(if idle_first { Fault::StreamIdle } else { Fault::ResponseTimeout });
                Overdue::Answer
            }
        }
    }
}
