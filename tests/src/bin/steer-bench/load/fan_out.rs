//! The endpoint pushes messages to a few of many connections. Module `serve::push` of the endpoint
//! chooses them.

use anyhow::{Result, ensure};

use super::echo::Numbered;
use super::tally::Tally;
use super::workload::{Connection, Next, Workload};
use crate::machine::monotonic_ns;
use crate::ws::Frames;

pub(super) struct FanOut {
    path: String,
    bytes: usize,
    /// The first message, which the endpoint echoes, and the answer to each pushed message.
    answer: Numbered,
}

pub(super) struct State(Frames);

impl Default for State {
    fn default() -> Self {
        Self(Frames::from_endpoint())
    }
}

impl FanOut {
    pub(super) fn new(connections: usize, active: usize, bytes: usize) -> Result<Self> {
        // The time makes the name of the group unique to this run.
        let path = format!("/push/{}/{connections}/{active}/{bytes}", monotonic_ns());
        Ok(Self { path, bytes, answer: Numbered::new(8)? })
    }
}

impl Workload for FanOut {
    type State = State;

    fn path(&self) -> Option<&str> {
        Some(&self.path)
    }

    fn opened(&mut self, connection: &mut Connection<State>) -> Result<()> {
        connection.link.send(self.answer.frame(0))?;
        Ok(())
    }

    fn received(
        &mut self,
        connection: &mut Connection<State>,
        bytes: &[u8],
        now: u64,
        tally: &mut Tally,
    ) -> Result<Next> {
        let (mut at, mut next) = (0..bytes.len(), Next::Wait);
        while let Some(part) = connection.state.0.next(bytes, &mut at)? {
            if !part.last {
                continue;
            }
            if !connection.ready && next == Next::Wait {
                self.answer.check(&part, 0)?;
                next = Next::Ready;
                continue;
            }
            ensure!(part.head.length == self.bytes as u64, "the message has another size: {:?}", part.head);
            let pushed_at = u64::from_le_bytes(part.start);
            ensure!(pushed_at <= now, "the message was sent in the future: {pushed_at}");
            tally.done(pushed_at, now, self.bytes);
            connection.link.send(self.answer.frame(1))?;
        }
        Ok(next)
    }
}
