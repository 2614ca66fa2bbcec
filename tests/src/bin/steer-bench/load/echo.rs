//! Messages that the endpoint echoes.

use std::collections::VecDeque;

use anyhow::{Result, ensure};
use slab::Slab;

use super::tally::Tally;
use super::workload::{Connection, Next, Workload};
use crate::ws::{self, BINARY, Frames, Part};

/// A message that begins with a number, and the check of its echo. All messages are equal except
/// for the number, so one buffer is enough, and it stays in the cache.
pub(super) struct Numbered {
    frame: Vec<u8>,
    /// The offset of the payload.
    payload: usize,
    mask: [u8; 4],
}

impl Numbered {
    /// Makes a message with a payload of `bytes`, at least 8.
    pub(super) fn new(bytes: usize) -> Result<Self> {
        ensure!(bytes >= 8, "no room for a number in {bytes} bytes");
        let mask = fastrand::u32(..).to_ne_bytes();
        let frame = ws::message(&vec![b'x'; bytes], Some(mask));
        Ok(Self { payload: frame.len() - bytes, frame, mask })
    }

    pub(super) fn bytes(&self) -> usize {
        self.frame.len() - self.payload
    }

    /// The frame of the message with this number.
    pub(super) fn frame(&mut self, number: u64) -> &[u8] {
        let place = &mut self.frame[self.payload..][..8];
        place.copy_from_slice(&number.to_le_bytes());
        ws::apply(self.mask, 0, place);
        &self.frame
    }

    /// # Errors
    /// When `part`, the last part of a frame, does not end the echo of the message with this
    /// number.
    pub(super) fn check(&self, part: &Part, number: u64) -> Result<()> {
        let (head, found) = (part.head, u64::from_le_bytes(part.start));
        let as_sent = head.fin && head.opcode == BINARY && head.length == self.bytes() as u64;
        ensure!(as_sent && found == number, "message {number} came back as {head:?} {found}");
        Ok(())
    }
}

pub(super) struct Echo {
    message: Numbered,
    pace: Option<Pace>,
}

struct Pace {
    /// Messages per second.
    rate: u32,
    /// When the first message was due. 0: the work has not begun.
    begin: u64,
    sent: u64,
    /// Connections on which no message is under way.
    idle: VecDeque<usize>,
}

pub(super) struct State {
    frames: Frames,
    /// The number of the last message.
    number: u64,
}

impl Default for State {
    fn default() -> Self {
        Self { frames: Frames::from_endpoint(), number: 0 }
    }
}

impl Echo {
    /// Messages of `bytes`. With `rate`, at most so many a second.
    pub(super) fn new(bytes: usize, rate: Option<u32>) -> Result<Self> {
        let pace = rate.map(|rate| Pace { rate, begin: 0, sent: 0, idle: VecDeque::new() });
        Ok(Self { message: Numbered::new(bytes)?, pace })
    }

    fn send(&mut self, connection: &mut Connection<State>, now: u64) -> Result<()> {
        connection.since = now;
        connection.state.number += 1;
        connection.link.send(self.message.frame(connection.state.number))?;
        Ok(())
    }

    /// The echo has come, so the next message may be sent.
    fn next(&mut self, connection: &mut Connection<State>, now: u64) -> Result<()> {
        match &mut self.pace {
            None => self.send(connection, now),
            Some(pace) => {
                connection.since = 0;
                pace.idle.push_back(connection.key);
                Ok(())
            }
        }
    }
}

impl Workload for Echo {
    type State = State;

    fn path(&self) -> Option<&str> {
        Some("/echo")
    }

    fn opened(&mut self, connection: &mut Connection<State>) -> Result<()> {
        self.send(connection, connection.since)
    }

    fn begin(&mut self, connection: &mut Connection<State>, now: u64) -> Result<()> {
        self.next(connection, now)
    }

    fn received(
        &mut self,
        connection: &mut Connection<State>,
        bytes: &[u8],
        now: u64,
        tally: &mut Tally,
    ) -> Result<Next> {
        let mut at = 0..bytes.len();
        while let Some(part) = connection.state.frames.next(bytes, &mut at)? {
            if !part.last {
                continue;
            }
            ensure!(connection.since != 0, "a message came while none was under way");
            self.message.check(&part, connection.state.number)?;
            if !connection.ready {
                return Ok(Next::Ready);
            }
            tally.done(connection.since, now, 2 * self.message.bytes());
            self.next(connection, now)?;
        }
        Ok(Next::Wait)
    }

    fn pace(&mut self, connections: &mut Slab<Connection<State>>, now: u64) -> bool {
        let Some(mut pace) = self.pace.take() else { return false };
        if pace.begin == 0 && !pace.idle.is_empty() {
            pace.begin = now;
        }
        while pace.is_due(now)
            && let Some(key) = pace.idle.pop_front()
        {
            pace.sent += 1;
            if let Some(connection) = connections.get_mut(key) {
                // If the connection is broken, the poll reports that.
                self.send(connection, now).ok();
            }
        }
        self.pace = Some(pace);
        true
    }
}

impl Pace {
    /// Whether more messages should have been sent by `now` than were sent.
    fn is_due(&self, now: u64) -> bool {
        let due = u128::from(now - self.begin) * u128::from(self.rate) / 1_000_000_000;
        self.begin != 0 && u128::from(self.sent) < due
    }
}
