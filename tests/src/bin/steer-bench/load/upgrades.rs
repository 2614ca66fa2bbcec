//! Short `WebSockets`: connect, upgrade, one echo, close.

use anyhow::{Result, ensure};

use super::echo::Numbered;
use super::tally::Tally;
use super::workload::{Connection, Next, Workload};
use crate::ws::Frames;

const BYTES: usize = 64;

pub(super) struct Upgrades(Numbered);

pub(super) struct State {
    frames: Frames,
    echoed: bool,
}

impl Default for State {
    fn default() -> Self {
        Self { frames: Frames::from_endpoint(), echoed: false }
    }
}

impl Upgrades {
    pub(super) fn new() -> Result<Self> {
        Ok(Self(Numbered::new(BYTES)?))
    }
}

impl Workload for Upgrades {
    type State = State;

    const CYCLES: bool = true;

    fn path(&self) -> Option<&str> {
        Some("/echo")
    }

    fn opened(&mut self, connection: &mut Connection<State>) -> Result<()> {
        connection.link.send(self.0.frame(u64::from(connection.number)))?;
        Ok(())
    }

    fn received(
        &mut self,
        connection: &mut Connection<State>,
        bytes: &[u8],
        _: u64,
        _: &mut Tally,
    ) -> Result<Next> {
        let mut at = 0..bytes.len();
        while let Some(part) = connection.state.frames.next(bytes, &mut at)? {
            if part.last {
                ensure!(!connection.state.echoed, "a second message came");
                self.0.check(&part, u64::from(connection.number))?;
                connection.state.echoed = true;
                connection.link.finish()?;
            }
        }
        Ok(Next::Wait)
    }

    /// The operation ends when the peer has closed the connection, too.
    fn ended(&mut self, connection: &mut Connection<State>, now: u64, tally: &mut Tally) -> Result<Next> {
        ensure!(connection.state.echoed, "the peer closed the connection before the echo");
        tally.done(connection.since, now, 2 * BYTES);
        Ok(Next::Done)
    }
}
