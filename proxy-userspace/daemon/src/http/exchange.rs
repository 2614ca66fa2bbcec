//! What the three parts of a downstream connection must agree on: the guard before hyper (which head
//! may pass), the service (which request is in flight), and the connection's task (what to
//! wait for, and how long). All three run in one task, so the lock is never contended. [`Turns`] has
//! the rules; this file adds the lock, the clock and the wakers.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::time::Instant;

use hyper::upgrade::OnUpgrade;

use super::fault::Fault;
use super::turn::{ConnectionTimeouts, Overdue, Passed, RequestTimeouts, Turn, Turns, Waiting};
use super::upgrade::Switched;

#[derive(Debug)]
pub(super) struct Exchange {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    turns: Turns,
    on_upgrade: Option<OnUpgrade>,
    switched: Option<Switched>,
    /// The guard, which holds bytes that may not pass yet.
    reader: Option<Waker>,
}

impl Exchange {
    pub(super) fn new(timeouts: ConnectionTimeouts) -> Self {
        let turns = Turns::new(timeouts, Instant::now());
        Self { state: Mutex::new(State { turns, on_upgrade: None, switched: None, reader: None }) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while the lock is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // What the guard says and asks.

    /// Whose turn it is. A guard that `holds` bytes is woken when they may pass.
    pub(super) fn turn(&self, cx: &Context<'_>, holds: bool) -> Turn {
        let mut state = self.lock();
        if state.turns.turn == Turn::Service && holds {
            match &mut state.reader {
                Some(reader) => reader.clone_from(cx.waker()),
                reader => *reader = Some(cx.waker().clone()),
            }
        }
        state.turns.turn
    }

    /// A head goes to hyper.
    pub(super) fn pass(&self, passed: Passed) {
        self.lock().turns.pass(passed, Instant::now());
    }

    pub(super) fn wait_for(&self, what: Waiting) {
        self.lock().turns.wait_for(what, Instant::now());
    }

    /// Bytes of a body or of a response moved.
    pub(super) fn moved(&self) {
        self.lock().turns.moved = Instant::now();
    }

    /// The request in flight cannot be completed: its body is broken.
    pub(super) fn fail(&self, fault: Fault) {
        self.lock().turns.fault.get_or_insert(fault);
    }

    /// The head took too long; told once.
    pub(super) fn take_head_overdue(&self) -> bool {
        std::mem::take(&mut self.lock().turns.head_overdue)
    }

    // What the service says and asks.

    /// What the guard made of the head in hand, and when.
    pub(super) fn passed(&self) -> (Passed, Instant) {
        let state = self.lock();
        (state.turns.passed, state.turns.moved)
    }

    /// Whether the response to the request in flight is the connection's last one.
    pub(super) fn is_leaving(&self) -> bool {
        self.lock().turns.is_leaving()
    }

    /// Limits the request, which has just passed.
    pub(super) fn limit(&self, timeouts: RequestTimeouts) {
        self.lock().turns.limit(timeouts);
    }

    /// Why the request in flight must end, if it must.
    pub(super) fn fault(&self) -> Option<Fault> {
        self.lock().turns.fault
    }

    /// The response head is known. `framed`: the client can tell where the body ends.
    pub(super) fn responded(&self, framed: bool) {
        self.lock().turns.respond(framed);
    }

    /// The response's body ends before its end.
    pub(super) fn break_off(&self) {
        self.lock().turns.break_off();
    }

    /// The upgrade is accepted: after this response the connection carries a stream.
    pub(super) fn switch(&self, switched: Switched) {
        let mut state = self.lock();
        state.turns.turn = Turn::Stream;
        state.switched = Some(switched);
    }

    /// Whether the connection is to carry a stream.
    pub(super) fn is_switched(&self) -> bool {
        self.lock().turns.turn == Turn::Stream
    }

    /// The request in flight is over: its response has been handed to hyper whole, or dropped.
    pub(super) fn finish(&self) {
        let mut state = self.lock();
        state.turns.finish(Instant::now());
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

    /// See [`Turns::would_look_complete`].
    pub(super) fn would_look_complete(&self) -> bool {
        self.lock().turns.would_look_complete()
    }

    /// See [`Turns::leave`].
    pub(super) fn leave(&self) {
        self.lock().turns.leave(Instant::now());
    }

    /// See [`Turns::deadline`].
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.lock().turns.deadline()
    }

    /// See [`Turns::overdue`].
    pub(super) fn overdue(&self) -> Overdue {
        self.lock().turns.overdue(Instant::now())
    }
}
