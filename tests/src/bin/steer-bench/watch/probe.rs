//! Opens new connections at a steady pace, each with one request.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;

use anyhow::{Context as _, Result, bail, ensure};
use mio::event::Event;
use mio::net::TcpStream;
use mio::{Interest, Registry, Token};
use slab::Slab;

use super::{MILLISECOND, Probes};
use crate::head::{Partial, content_length};
use crate::link::Link;
use crate::machine::monotonic_ns;

/// The time from one connection to the next.
const PERIOD: u64 = 5 * MILLISECOND;
/// A connection that takes longer is slow. The time is shorter than the kernel's before it repeats
/// a SYN.
pub(super) const SLOW: u64 = 500 * MILLISECOND;
/// A connection that takes longer has failed.
const PATIENCE: u64 = 3000 * MILLISECOND;

const REQUEST: &[u8] =
    b"GET /bytes/64 HTTP/1.1\r\nhost: bench\r\nx-forwarded-for: 10.9.9.9\r\nconnection: close\r\n\r\n";

pub(super) struct Prober {
    probes: Slab<Probe>,
    made: usize,
    due: u64,
    /// When the last answer came.
    served: u64,
    unserved: u64,
    counts: Probes,
}

struct Probe {
    link: Link,
    since: u64,
    connected: bool,
    partial: Partial,
    /// How many bytes of the body have not come yet. `None`: the head has not come.
    left: Option<usize>,
}

impl Prober {
    pub(super) fn new(now: u64) -> Self {
        Self { probes: Slab::new(), made: 0, due: now, served: now, unserved: 0, counts: Probes::default() }
    }

    /// How many connections were made.
    pub(super) const fn made(&self) -> usize {
        self.made
    }

    /// What happened to the connections that ended since the last call.
    pub(super) fn take(&mut self, now: u64) -> Probes {
        let unserved = self.unserved.max(now - self.served);
        self.unserved = 0;
        Probes { unserved_ms: unserved as f64 / 1e6, ..std::mem::take(&mut self.counts) }
    }

    /// Makes the next connection if it is due, with a token after `first`. Gives up connections
    /// that take too long.
    pub(super) fn pace(
        &mut self,
        now: u64,
        target: SocketAddr,
        registry: &Registry,
        first: usize,
    ) -> Result<()> {
        if now < self.due {
            return Ok(());
        }
        // Connections that could not be made in time are not made later.
        self.due = now.max(self.due + PERIOD);
        let before = self.probes.len();
        self.probes.retain(|_, probe| now < probe.since + PATIENCE);
        self.counts.failed += (before - self.probes.len()) as u64;
        self.made += 1;
        let mut socket = match TcpStream::connect(target) {
            Ok(socket) => socket,
            Err(error) => {
                self.count(&error.into());
                return Ok(());
            }
        };
        let entry = self.probes.vacant_entry();
        let token = Token(first + entry.key());
        registry
            .register(&mut socket, token, Interest::READABLE | Interest::WRITABLE)
            .context("cannot poll a socket")?;
        let (link, partial) = (Link::connecting(socket), Partial::default());
        entry.insert(Probe { link, since: now, connected: false, partial, left: None });
        Ok(())
    }

    pub(super) fn ready(&mut self, key: usize, event: &Event, buffer: &mut [u8]) {
        let Some(probe) = self.probes.get_mut(key) else { return };
        match probe.ready(event, buffer) {
            Ok(false) => return,
            Ok(true) => {
                let now = monotonic_ns();
                self.counts.served += 1;
                self.counts.slow += u64::from(now - probe.since > SLOW);
                self.unserved = self.unserved.max(now - self.served);
                self.served = now;
            }
            Err(error) => self.count(&error),
        }
        self.probes.remove(key);
    }

    fn count(&mut self, error: &anyhow::Error) {
        let counter = match error.downcast_ref::<io::Error>().map(io::Error::kind) {
            Some(ErrorKind::ConnectionRefused) => &mut self.counts.refused,
            Some(ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof) => {
                &mut self.counts.reset
            }
            _ => &mut self.counts.failed,
        };
        *counter += 1;
    }
}

impl Probe {
    /// Returns whether the whole answer has come.
    fn ready(&mut self, event: &Event, buffer: &mut [u8]) -> Result<bool> {
        if !self.connected {
            if let Some(error) = self.link.socket.take_error()? {
                return Err(error.into());
            }
            if !event.is_writable() {
                return Ok(false);
            }
            self.connected = true;
            self.link.send(REQUEST)?;
        }
        if event.is_writable() {
            self.link.flush()?;
        }
        while let Some(size) = self.link.receive(buffer)? {
            if size == 0 {
                return Err(io::Error::from(ErrorKind::UnexpectedEof).into());
            }
            let body = match self.left {
                Some(_) => size,
                None => {
                    let read = |answer: &httparse::Response<'_, '_>| {
                        ensure!(answer.code == Some(200), "answered {:?}", answer.code);
                        content_length(answer.headers)?.context("the answer has no content-length")
                    };
                    let Some((length, head)) = self.partial.response(&buffer[..size], read)? else {
                        continue;
                    };
                    self.left = Some(length);
                    size - head
                }
            };
            let Some(left) = self.left.unwrap_or_default().checked_sub(body) else {
                bail!("the body is longer than its content-length")
            };
            if left == 0 {
                return Ok(true);
            }
            self.left = Some(left);
        }
        Ok(false)
    }
}
