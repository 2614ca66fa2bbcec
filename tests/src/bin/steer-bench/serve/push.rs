//! Fan-out: groups of `WebSockets` to some of which the endpoint pushes of its own accord.
//!
//! All that join by the same path are a group. The endpoint echoes the first message of each. When as many as the path
//! says have sent theirs, it begins: `ACTIVE` of them, chosen anew each second, have one message of `BYTES` under way
//! each, which begins with the time it was written at (`CLOCK_MONOTONIC`, nanoseconds, little endian). Any message of
//! the client answers it, and is followed by the next while the connection is among the chosen.

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

/// How long the same connections are active.
const ACTIVE_FOR: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct Groups(Slab<Group>);

#[derive(Debug)]
struct Group {
    path: String,
    /// Keys of the connections.
    members: Vec<usize>,
    /// How many have sent their first message.
    present: usize,
    expected: usize,
    active: usize,
    /// What is pushed, and where in it the payload begins.
    frame: Vec<u8>,
    payload: usize,
    /// The number of the current choice; 0: not begun.
    choice: u64,
    next_choice: Instant,
}

/// One connection of a group.
#[derive(Debug)]
pub(super) struct Member {
    group: usize,
    /// Until the first message has come.
    echo: Option<Echo>,
    frames: Frames,
    /// The last choice that it was among.
    choice: u64,
    /// Whether a message is under way.
    waiting: bool,
}

impl Member {
    /// Takes `buffer[at]`; returns whether a message ended.
    pub(super) fn received(
        &mut self,
        link: &mut Link,
        buffer: &mut [u8],
        mut at: Range<usize>,
    ) -> Result<bool> {
        // The client waits for the echo, so nothing else is in these bytes.
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

    /// How long until [`Self::choose`] has something to do; nothing: until somebody joins.
    pub(super) fn until_next_choice(&self) -> Option<Duration> {
        let running = self.0.iter().filter(|(_, group)| group.choice > 0);
        running.map(|(_, group)| group.next_choice.saturating_duration_since(Instant::now())).min()
    }

    /// Chooses who is active where it is time to. Returns the keys of the connections that turned out to be broken.
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
        let [bytes, active, expected, ..] = numbers[..] else { bail!("no group is named {path}") };
        ensure!((8..=1 << 24).contains(&bytes), "no room for the time in {bytes} bytes");
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
