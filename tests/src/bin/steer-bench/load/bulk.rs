//! As many bytes as possible, in frames of 64 KiB. The endpoint's side is `serve::streams::Bulk`.

use anyhow::{Result, ensure};

use super::echo::Numbered;
use super::tally::Tally;
use super::workload::{Connection, Next, Workload};
use crate::link::{BULK_FRAME, Source, bulk_frame};
use crate::spec::Way;
use crate::ws::Frames;

pub(super) struct Bulk {
    direction: Way,
    /// The first message, which the endpoint echoes, and the second message, which starts the
    /// download.
    sign: Numbered,
    upload: Vec<u8>,
}

pub(super) struct State {
    frames: Frames,
    source: Source,
    uploading: bool,
    /// How many frames of the upload the endpoint has received.
    acknowledged: u64,
}

impl Default for State {
    fn default() -> Self {
        let frames = Frames::from_endpoint();
        Self { frames, source: Source::default(), uploading: false, acknowledged: 0 }
    }
}

impl Bulk {
    pub(super) fn new(direction: Way) -> Result<Self> {
        let mask = fastrand::u32(..).to_ne_bytes();
        Ok(Self { direction, sign: Numbered::new(8)?, upload: bulk_frame(Some(mask)) })
    }
}

impl Workload for Bulk {
    type State = State;

    fn path(&self) -> Option<&str> {
        Some(match self.direction {
            Way::Upload => "/bulk/upload",
            Way::Download => "/bulk/download",
            Way::Both => "/bulk/both",
        })
    }

    fn opened(&mut self, connection: &mut Connection<State>) -> Result<()> {
        connection.link.send(self.sign.frame(0))?;
        Ok(())
    }

    fn begin(&mut self, connection: &mut Connection<State>, now: u64) -> Result<()> {
        connection.since = now;
        connection.state.uploading = self.direction != Way::Download;
        connection.link.send(self.sign.frame(1))?;
        Ok(())
    }

    fn received(
        &mut self,
        connection: &mut Connection<State>,
        bytes: &[u8],
        now: u64,
        tally: &mut Tally,
    ) -> Result<Next> {
        let Connection { state, since, ready, .. } = connection;
        let mut at = 0..bytes.len();
        while let Some(part) = state.frames.next(bytes, &mut at)? {
            if !part.last {
                continue;
            }
            if !*ready {
                self.sign.check(&part, 0)?;
                return Ok(Next::Ready);
            }
            // Time counts from the last sign of progress.
            *since = now;
            if part.head.length == BULK_FRAME as u64 {
                tally.count(1, BULK_FRAME);
            } else {
                ensure!(part.head.length == 8, "the message is not an acknowledgement: {:?}", part.head);
                let acknowledged = u64::from_le_bytes(part.start);
                let frames = acknowledged - state.acknowledged;
                state.acknowledged = acknowledged;
                tally.count(frames, frames as usize * BULK_FRAME);
            }
        }
        Ok(Next::Wait)
    }

    fn pump(&mut self, connection: &mut Connection<State>) -> Result<bool> {
        let Connection { state, link, .. } = connection;
        Ok(state.uploading && state.source.pump(link, &self.upload, |_| Ok(()))?)
    }
}
