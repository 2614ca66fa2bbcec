//! What the driver does for every kind of work, and what a kind of work does for itself.

use std::net::Ipv4Addr;

use anyhow::{Result, bail};
use slab::Slab;

use super::tally::Tally;
use crate::head::Partial;
use crate::link::Link;

/// One connection of the load.
pub(super) struct Connection<S> {
    pub(super) key: usize,
    pub(super) link: Link,
    /// Counts the connections of this run.
    pub(super) number: u32,
    /// Since when something is under way, in nanoseconds of `CLOCK_MONOTONIC`; 0: nothing is.
    pub(super) since: u64,
    /// What has come of the answer to the upgrade; nothing: there is none to come (any more).
    pub(super) upgrading: Option<Partial>,
    /// Whether the first message has gone there and back.
    pub(super) ready: bool,
    pub(super) state: S,
}

/// What follows for a connection from something that came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// More is to come.
    Wait,
    /// The first message has gone there and back.
    Ready,
    /// All is done, it can be closed.
    Done,
}

/// A kind of work. An error ends the connection that it happened on, and is counted.
pub(super) trait Workload {
    /// Kept with each connection.
    type State: Default;

    /// Whether connections are closed when they are done, and replaced by others, from the beginning. If not, all are
    /// opened and have their first message echoed before the work begins.
    const CYCLES: bool = false;

    /// Where `WebSockets` are opened; nothing: connections stay plain HTTP.
    fn path(&self) -> Option<&str>;

    /// The connection is open: sends the first message.
    fn opened(&mut self, connection: &mut Connection<Self::State>) -> Result<()>;

    /// All connections are ready: begins with the work on this one, at the time `now`.
    fn begin(&mut self, _: &mut Connection<Self::State>, _now: u64) -> Result<()> {
        Ok(())
    }

    /// `bytes` have come, at the time `now`.
    fn received(
        &mut self,
        connection: &mut Connection<Self::State>,
        bytes: &[u8],
        now: u64,
        tally: &mut Tally,
    ) -> Result<Next>;

    /// The peer has closed the connection.
    fn ended(&mut self, _: &mut Connection<Self::State>, _now: u64, _: &mut Tally) -> Result<Next> {
        bail!("closed by the peer")
    }

    /// Sends what the socket takes; returns whether the connection's turn ended before that.
    fn pump(&mut self, _: &mut Connection<Self::State>) -> Result<bool> {
        Ok(false)
    }

    /// Called every millisecond or more often, if true is returned.
    fn pace(&mut self, _: &mut Slab<Connection<Self::State>>, _now: u64) -> bool {
        false
    }
}

/// The value of the header that is hashed: another one for each connection, the same in each run.
pub(super) fn forwarded_for(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(10 << 24 | number & 0xff_ffff)
}
