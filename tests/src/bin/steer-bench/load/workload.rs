//! The interface between the driver, which is the same for all kinds of work, and each kind of
//! work.

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
    /// The number of the connection, from the start of this run.
    pub(super) number: u32,
    /// The time since which a message is under way, in nanoseconds of `CLOCK_MONOTONIC`. 0: no
    /// message is.
    pub(super) since: u64,
    /// The part of the answer to the upgrade that has come. `None` if no answer is awaited.
    pub(super) upgrading: Option<Partial>,
    /// Whether the first message has been echoed.
    pub(super) ready: bool,
    pub(super) state: S,
}

/// What the driver does next with a connection, after bytes have come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Wait for more.
    Wait,
    /// The first message has been echoed.
    Ready,
    /// The connection has done its work and can be closed.
    Done,
}

/// A kind of work. An error ends its connection, and is counted.
pub(super) trait Workload {
    /// State that is kept for each connection.
    type State: Default;

    /// Whether a connection that is done is closed and replaced by a new one, from the start of the
    /// run. If not, all connections are opened and have their first message echoed before the work
    /// begins.
    const CYCLES: bool = false;

    /// The path at which `WebSockets` are opened. `None`: connections stay plain HTTP.
    fn path(&self) -> Option<&str>;

    /// The connection is open: sends the first message.
    fn opened(&mut self, connection: &mut Connection<Self::State>) -> Result<()>;

    /// All connections are ready: begins the work on this one, at the time `now`.
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
        bail!("the peer closed the connection")
    }

    /// Sends what the socket takes. Returns whether the connection's turn ended first.
    fn pump(&mut self, _: &mut Connection<Self::State>) -> Result<bool> {
        Ok(false)
    }

    /// Is called at least every millisecond while it returns true.
    fn pace(&mut self, _: &mut Slab<Connection<Self::State>>, _now: u64) -> bool {
        false
    }
}

/// The value of the header that is hashed: different for each connection, the same in each run.
pub(super) fn forwarded_for(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(10 << 24 | number & 0xff_ffff)
}
