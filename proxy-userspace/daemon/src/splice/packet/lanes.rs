//! A session in userspace, until the kernel has it. One task copies both directions. The task
//! always knows the sequence numbers up to which it has read and written each connection.

use std::net::Shutdown;

use bytes::{Buf as _, Bytes};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use crate::splice::relay::{self, Broken};
use crate::splice::side::Side;
use crate::streams::Stream;
use crate::turn::Turn;

/// What became of a FIN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fin {
    NotSeen,
    /// Read; bytes before it may still have to be written.
    Read,
    /// Passed on to the other peer.
    Passed,
}

/// Is told of each write before the write, and of each FIN that is read.
pub(super) trait Watcher {
    /// Whether a FIN that was read is passed on.
    const PASSES_FINS: bool;
    /// The socket at `side` is about to be given all bytes before the sequence number `end`.
    fn gives(&self, side: Side, end: u32);
    /// The FIN of the peer at `side` was read; `end` is the sequence number after it.
    fn read_fin(&self, side: Side, end: u32);
}

/// For a session before the switch: nothing needs to be told.
impl Watcher for () {
    const PASSES_FINS: bool = false;

    fn gives(&self, _side: Side, _end: u32) {}
    fn read_fin(&self, _side: Side, _end: u32) {}
}

/// Arrays are indexed by [`Side`].
#[derive(Debug)]
pub(super) struct Lanes {
    pub(super) sockets: [TcpStream; 2],
    /// Bytes that were read from a side and not yet written to the other side.
    pub(super) held: [Bytes; 2],
    pub(super) fin: [Fin; 2],
    /// Whether a side may have bytes to read that its readiness does not announce (see
    /// [`relay::try_read`]).
    pub(super) unread: [bool; 2],
    /// In the sequence numbers of a side's peer: one past the last byte, or FIN, that was read.
    pub(super) read_end: [u32; 2],
    /// In the sequence numbers of a side's socket: one past the last byte, or FIN, that the socket
    /// was given.
    pub(super) write_end: [u32; 2],
    pub(super) turn: Turn,
}

impl Lanes {
    /// Copies what can be copied now; returns whether anything was copied.
    pub(super) fn step<W: Watcher>(&mut self, stream: &Stream, watcher: &W) -> Result<bool, Broken> {
        let mut moved = false;
        for from in Side::BOTH {
            moved |= self.copy(from, stream, watcher)?;
            if self.fin[from] == Fin::Read && self.held[from].is_empty() && W::PASSES_FINS {
                self.pass_fin(from, watcher)?;
                moved = true;
            }
        }
        Ok(moved)
    }

    /// Writes as many of the held bytes as the sockets take, and reads nothing.
    pub(super) fn flush(&mut self, stream: &Stream, watcher: &impl Watcher) -> Result<(), Broken> {
        for from in Side::BOTH {
            if !self.held[from].is_empty() {
                self.copy(from, stream, watcher)?;
            }
        }
        Ok(())
    }

    fn copy(&mut self, from: Side, stream: &Stream, watcher: &impl Watcher) -> Result<bool, Broken> {
        if !self.held[from].is_empty() {
            let held = std::mem::take(&mut self.held[from]);
            let written = self.write(from, &held, stream, watcher)?;
            self.held[from] = held;
            self.held[from].advance(written);
            return Ok(written > 0);
        }
        if self.fin[from] != Fin::NotSeen {
            return Ok(false);
        }
        relay::with_scratch(|scratch| {
            let read = match relay::try_read(&self.sockets[from], scratch, &mut self.unread[from]) {
                Ok(read) => read,
                Err(error) if relay::would_block(&error) => return Ok(false),
                Err(error) => return Err(Broken::From(error)),
            };
            if read == 0 {
                self.fin[from] = Fin::Read;
                self.read_end[from] = self.read_end[from].wrapping_add(1);
                watcher.read_fin(from, self.read_end[from]);
                return Ok(true);
            }
            // Bounded by the scratch buffer; sequence numbers wrap.
            self.read_end[from] = self.read_end[from].wrapping_add(read as u32);
            let bytes = &scratch[..read];
            let written = self.write(from, bytes, stream, watcher)?;
            self.held[from] = Bytes::copy_from_slice(&bytes[written..]);
            Ok(true)
        })
    }

    /// Writes as many of the bytes from side `from` as the other side takes, and returns their
    /// number.
    fn write(
        &mut self,
        from: Side,
        bytes: &[u8],
        stream: &Stream,
        watcher: &impl Watcher,
    ) -> Result<usize, Broken> {
        let to = from.other();
        watcher.gives(to, self.write_end[to].wrapping_add(bytes.len() as u32));
        let written = match relay::try_write(&self.sockets[to], bytes) {
            Ok(written) => written,
            Err(error) if relay::would_block(&error) => 0,
            Err(error) => return Err(Broken::To(error)),
        };
        self.write_end[to] = self.write_end[to].wrapping_add(written as u32);
        self.turn.moved(written);
        match from {
            Side::Downstream => stream.add_to_upstream(written as u64),
            Side::Upstream => stream.add_to_downstream(written as u64),
        }
        Ok(written)
    }

    fn pass_fin(&mut self, from: Side, watcher: &impl Watcher) -> Result<(), Broken> {
        let to = from.other();
        let end = self.write_end[to].wrapping_add(1);
        watcher.gives(to, end);
        SockRef::from(&self.sockets[to]).shutdown(Shutdown::Write).map_err(Broken::To)?;
        self.write_end[to] = end;
        self.fin[from] = Fin::Passed;
        Ok(())
    }

    /// Waits until there may be something to copy.
    ///
    /// # Errors
    /// A connection has broken.
    pub(super) async fn wait(&self) -> Result<(), Broken> {
        // A side that is being read reports its end through the read.
        let broken = |side: Side| async move {
            // If the wait fails, the connection is broken, too.
            self.sockets[side].ready(Interest::ERROR).await.ok();
            Err(Broken::From(error_of(self.sockets[side].take_error())))
        };
        tokio::select! {
            biased;
            error = broken(Side::Downstream), if !self.reads(Side::Downstream) => error,
            error = broken(Side::Upstream), if !self.reads(Side::Upstream) => error,
            ready = self.copyable(Side::Downstream) => ready,
            ready = self.copyable(Side::Upstream) => ready,
        }
    }

    /// Whether side `from` is read as soon as bytes arrive.
    fn reads(&self, from: Side) -> bool {
        self.held[from].is_empty() && self.fin[from] == Fin::NotSeen
    }

    /// Returns when side `from` may be readable or, if bytes from it are held, when the other side
    /// is writable.
    async fn copyable(&self, from: Side) -> Result<(), Broken> {
        if !self.held[from].is_empty() {
            self.sockets[from.other()].writable().await.map_err(Broken::To)
        } else if self.reads(from) && !self.unread[from] {
            self.sockets[from].readable().await.map_err(Broken::From)
        } else if self.reads(from) {
            Ok(())
        } else {
            std::future::pending().await
        }
    }
}

fn error_of(error: std::io::Result<Option<std::io::Error>>) -> std::io::Error {
    error
        .and_then(|error| error.map_or(Ok(()), Err))
        .err()
        .unwrap_or(std::io::ErrorKind::ConnectionReset.into())
}
