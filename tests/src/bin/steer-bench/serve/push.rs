//! Fan-out: the endpoint pushes messages to some members of a group of `WebSockets`.
//!
//! All `WebSockets` with the same path are one group. The endpoint echoes the first message of
//! each. It begins to push when as many members as the path says have sent their first message.
//! Every second it chooses `ACTIVE` members anew, and each of them has one message of `BYTES` under
//! way. A message begins with the time at which it was written (`CLOCK_MONOTONIC`, nanoseconds,
//! little endian). Any message of the client answers it. Then the next message follows, as long as
//! the member is among the chosen ones.

use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use slab::Slab;

use super::streams::Echo;
use super::{Connection, Role};
use crate::link::Link;
use crate::machine::monotonic_ns;
use crate::ws::{self, Frames};

/// How long the same members are active.
const ACTIVE_FOR: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct Groups(Slab<Group>);

#[derive(Debug)]
struct Group {
    path: String,
    /// Keys of the connections.
    members: Vec<usize>,
    /// How many members have sent their first message.
    present: usize,
    expected: usize,
    active: usize,
    /// The frame that is pushed, and the offset of its payload.
    frame: Vec<u8>,
    payload: usize,
    /// The number of the current choice. 0: the group has not begun.
    choice: u64,
    next_choice: Instant,
}

/// One connection of a group.
#[derive(Debug)]
pub(super) struct Member {
    group: usize,
    /// The echo of the first message. `None` after that message.
    echo: Option<Echo>,
    frames: Frames,
    /// The number of the last choice that included this connection.
    choice: u64,
    /// Whether a pushed message is under way.
    waiting: bool,
}

impl Member {
    /// Handles `buffer[at]`. Returns whether a message ended.
    pub(super) fn received(
        &mut self,
        link: &mut Link,
        buffer: &mut [u8],
        mut at: Range<usize>,
    ) -> Result<bool> {
        // The client waits for the echo, so these bytes contain nothing else.
        if let Some(echo) = &mut self.echo {
            echo.received(link, buffer, at)?;
            return Ok(true);
        }
        let mut answered = false;
        while let Some(part) = self.frames.next(buffer, &mut at)? {
            answered |= part.last;
        }
        Ok(answered)
    }
}

impl Groups {
    pub(super) fn join(&mut self, path: &str, key: usize) -> Result<Member> {
        let known = self.0.iter().find(|(_, group)| group.path == path).map(|(index, _)| index);
        let group = match known {
            Some(index) => index,
            None => self.0.insert(Group::new(path)?),
        };
        self.0[group].members.push(key);
        let frames = Frames::from_client();
        Ok(Member { group, echo: Some(Echo::default()), frames, choice: 0, waiting: false })
    }

    pub(super) fn leave(&mut self, member: &Member, key: usize) {
        let group = &mut self.0[member.group];
        group.members.retain(|other| *other != key);
        if group.members.is_empty() {
            self.0.remove(member.group);
        }
    }

    /// A message of `member` has come.
    pub(super) fn answered(&mut self, member: &mut Member, link: &mut Link) -> io::Result<()> {
        let group = &mut self.0[member.group];
        member.waiting = false;
        if member.echo.take().is_some() {
            group.present += 1;
        } else if member.choice == group.choice {
            group.push(member, link)?;
        }
        Ok(())
    }

    /// How long until [`Self::choose`] has to run again. `None` if no group has begun.
    pub(super) fn until_next_choice(&self) -> Option<Duration> {
        let running = self.0.iter().filter(|(_, group)| group.choice > 0);
        running.map(|(_, group)| group.next_choice.saturating_duration_since(Instant::now())).min()
    }

    /// Chooses the active members of each group for which a choice is due. Returns the keys of
    /// connections that are broken.
    pub(super) fn choose(&mut self, connections: &mut Slab<Connection>) -> Vec<usize> {
        let mut broken = Vec::new();
        if self.0.is_empty() {
            return broken;
        }
        let now = Instant::now();
        for (_, group) in &mut self.0 {
            let due =
                if group.choice == 0 { group.present == group.expected } else { now >= group.next_choice };
            if due {
                group.next_choice = now + ACTIVE_FOR;
                group.choose(connections, &mut broken);
            }
        }
        broken
    }
}

impl Group {
    fn new(path: &str) -> Result<Self> {
        let numbers: Vec<usize> = path.rsplit('/').map_while(|part| part.parse().ok()).collect();
        let [bytes, active, expected, ..] = numbers[..] else { bail!("{path} is not the path of a group") };
        ensure!(
            (8..=1 << 24).contains(&bytes),
            "{bytes} bytes is not a size for messages that begin with a time of 8 bytes"
        );
        let frame = ws::message(&vec![0; bytes], None);
        Ok(Self {
            path: path.to_owned(),
            members: Vec::new(),
            present: 0,
            expected,
            active,
            payload: frame.len() - bytes,
            frame,
            choice: 0,
            next_choice: Instant::now(),
        })
    }

    fn choose(&mut self, connections: &mut Slab<Connection>, broken: &mut Vec<usize>) {
        self.choice += 1;
        for index in 0..self.active.min(self.members.len()) {
            let other = fastrand::usize(index..self.members.len());
            self.members.swap(index, other);
            let key = self.members[index];
            let Connection { link, role: Role::Push(member) } = &mut connections[key] else { continue };
            member.choice = self.choice;
            if !member.waiting && self.push(member, link).is_err() {
                broken.push(key);
            }
        }
    }

    fn push(&mut self, member: &mut Member, link: &mut Link) -> io::Result<()> {
        member.waiting = true;
        self.frame[self.payload..][..8].copy_from_slice(&monotonic_ns().to_le_bytes());
        link.send(&self.frame)
    }
}
