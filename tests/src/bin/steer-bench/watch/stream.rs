//! A `WebSocket` that sends a message from time to time. Each byte depends on the stream and on its
//! position.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mio::net::TcpStream;
use mio::{Interest, Registry, Token};
use socket2::SockRef;

use crate::head::Partial;
use crate::link::{Link, READ, TURN};
use crate::load::handshake;
use crate::machine::monotonic_ns;
use crate::ws::{self, Frames};

/// The size of a message. Each [`EVERY`]th stream has messages of [`LARGE`] bytes instead.
const BYTES: usize = 256;
const LARGE: usize = 64 * 1024;
const EVERY: u32 = 20;

#[derive(Debug)]
pub(super) struct Stream {
    link: Link,
    number: u32,
    /// The part of the answer to the upgrade that has come. `None` after the whole answer has come.
    upgrading: Option<Partial>,
    frames: Frames,
    /// The payload bytes of all messages so far.
    sent: u64,
    received: u64,
    /// When the message that is under way was sent, in nanoseconds of `CLOCK_MONOTONIC`.
    since: Option<u64>,
}

/// What happened to a stream.
#[derive(Debug)]
pub(super) enum Fate {
    Lives,
    /// The stream is lost for this reason.
    Lost(String),
    /// A byte came back that was not sent at this position.
    Wrong,
}

impl Stream {
    pub(super) fn open(number: u32, target: SocketAddr, registry: &Registry, token: Token) -> Result<Self> {
        let mut socket = TcpStream::connect(target).with_context(|| format!("no connection to {target}"))?;
        socket.set_nodelay(true).context("no TCP_NODELAY")?;
        // Makes the close a reset: thousands of ports in TIME_WAIT would disturb the next run.
        SockRef::from(&socket).set_linger(Some(Duration::ZERO)).context("no SO_LINGER")?;
        registry
            .register(&mut socket, token, Interest::READABLE | Interest::WRITABLE)
            .context("cannot poll a socket")?;
        let mut link = Link::connecting(socket);
        let mut request = Vec::new();
        handshake::ask("/echo", number, &mut request);
        link.send(&request)?;
        Ok(Self {
            link,
            number,
            upgrading: Some(Partial::default()),
            frames: Frames::from_endpoint(),
            sent: 0,
            received: 0,
            since: None,
        })
    }

    pub(super) const fn is_open(&self) -> bool {
        self.upgrading.is_none()
    }

    pub(super) const fn waits_since(&self) -> Option<u64> {
        self.since
    }

    /// Sends the next message, at the time `now`. The message before has come back.
    pub(super) fn send(&mut self, now: u64) -> Result<()> {
        let size = if self.number.is_multiple_of(EVERY) { LARGE } else { BYTES };
        let payload: Vec<u8> = (self.sent..).take(size).map(|at| byte(self.number, at)).collect();
        self.sent += size as u64;
        self.since = Some(now);
        self.link.send(&ws::message(&payload, Some(self.number.to_le_bytes())))?;
        Ok(())
    }

    /// Handles what has come. Calls `came` for a message that has come back, with the time at which
    /// it was sent and the present time.
    pub(super) fn ready(&mut self, is_writable: bool, buffer: &mut [u8], came: impl FnMut(u64, u64)) -> Fate {
        match self.carry_on(is_writable, buffer, came) {
            Ok(true) => Fate::Lives,
            Ok(false) => Fate::Wrong,
            Err(error) => Fate::Lost(format!("{error:#}")),
        }
    }

    /// Returns whether all bytes are right.
    fn carry_on(
        &mut self,
        is_writable: bool,
        buffer: &mut [u8],
        mut came: impl FnMut(u64, u64),
    ) -> Result<bool> {
        if is_writable {
            self.link.flush()?;
        }
        // The poll reports only new bytes, and the largest message is smaller than what one turn
        // can read.
        for _ in 0..TURN {
            let Some(size) = self.link.receive(buffer)? else { break };
            ensure!(size > 0, "the peer closed the stream");
            let mut start = 0;
            if let Some(partial) = &mut self.upgrading {
                let Some((_, head)) = partial.response(&buffer[..size], handshake::check)? else { continue };
                self.upgrading = None;
                start = head;
            }
            if !self.compare(&buffer[start..size])? {
                return Ok(false);
            }
            if let Some(since) = self.since.filter(|_| self.received == self.sent) {
                self.since = None;
                came(since, monotonic_ns());
            }
            if size < READ {
                break;
            }
        }
        Ok(true)
    }

    fn compare(&mut self, bytes: &[u8]) -> Result<bool> {
        let mut at = 0..bytes.len();
        while let Some(part) = self.frames.next(bytes, &mut at)? {
            let payload = &bytes[part.payload];
            let is_right = |(at, it): (u64, &u8)| *it == byte(self.number, at);
            if self.received + payload.len() as u64 > self.sent
                || !(self.received..).zip(payload).all(is_right)
            {
                return Ok(false);
            }
            self.received += payload.len() as u64;
        }
        Ok(true)
    }
}

/// The byte of a stream at a position of its payload: SplitMix64 of both, so that no two pieces are
/// equal.
fn byte(stream: u32, at: u64) -> u8 {
    let mut word = ((u64::from(stream) << 40) ^ (at / 8)).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    (word ^ word >> 31).to_le_bytes()[(at % 8) as usize]
}
