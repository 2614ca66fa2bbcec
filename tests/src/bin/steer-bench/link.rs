//! One connection of the load or of the endpoint: a nonblocking socket, and the bytes that the
//! socket did not take yet.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::Shutdown;

use mio::net::TcpStream;

use crate::ws;

/// The payload of a frame of bulk, in bytes.
pub(crate) const BULK_FRAME: usize = 64 * 1024;

/// How many bytes one read asks for. So many stay in the L2 cache beside everything else in use.
pub(crate) const READ: usize = 128 * 1024;

/// How many reads or writes a connection may do in a row. Then the other connections have their
/// turn.
pub(crate) const TURN: usize = 4;

#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) socket: TcpStream,
    /// Bytes that were sent while the socket did not take them.
    unsent: Vec<u8>,
    /// How many bytes of `unsent` the socket has taken.
    gone: usize,
    /// Whether a write is useless until the poll reports the socket.
    blocked: bool,
}

impl Link {
    /// A connection that is not established yet. Bytes that are sent wait until the poll reports
    /// that it is.
    pub(crate) fn connecting(socket: TcpStream) -> Self {
        Self { socket, unsent: Vec::new(), gone: 0, blocked: true }
    }

    pub(crate) fn connected(socket: TcpStream) -> Self {
        Self { blocked: false, ..Self::connecting(socket) }
    }

    /// Sends all of `bytes`. Bytes that the socket does not take now are sent by [`Self::flush`].
    ///
    /// # Errors
    /// When the connection is broken.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let taken = self.write(bytes)?;
        self.unsent.extend_from_slice(&bytes[taken..]);
        Ok(())
    }

    /// Sends what is unsent, then as much of `bytes` as the socket takes. Returns how many of
    /// `bytes` that were.
    ///
    /// # Errors
    /// When the connection is broken.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.blocked || !self.unsent.is_empty() {
            return Ok(0);
        }
        let taken = unless_blocked(|| self.socket.write(bytes))?.unwrap_or(0);
        self.blocked = taken < bytes.len();
        Ok(taken)
    }

    /// Sends what is unsent. To be called when the poll says that the socket takes bytes.
    ///
    /// # Errors
    /// When the connection is broken.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.blocked = false;
        while !self.blocked && self.gone < self.unsent.len() {
            match unless_blocked(|| self.socket.write(&self.unsent[self.gone..]))? {
                Some(taken) => self.gone += taken,
                None => self.blocked = true,
            }
        }
        if self.gone == self.unsent.len() {
            self.unsent.clear();
            self.gone = 0;
        }
        Ok(())
    }

    /// Reads the bytes that are there, 0 at the end of the stream. `None` if no bytes are there
    /// yet.
    ///
    /// # Errors
    /// When the connection is broken.
    pub(crate) fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        unless_blocked(|| self.socket.read(buffer))
    }

    /// Tells the peer that no more bytes will follow.
    ///
    /// # Errors
    /// When the connection is broken.
    pub(crate) fn finish(&self) -> io::Result<()> {
        self.socket.shutdown(Shutdown::Write)
    }
}

fn unless_blocked(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<Option<usize>> {
    loop {
        return match call() {
            Ok(size) => Ok(Some(size)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => Err(error),
        };
    }
}

/// Sends frames of [`BULK_FRAME`] without end.
#[derive(Debug, Default)]
pub(crate) struct Source {
    /// How many bytes of the current frame were sent.
    gone: usize,
}

impl Source {
    /// Sends `frame` again and again while the socket takes bytes and it is this connection's turn.
    /// `between` is called before each frame and may send something else. Returns whether the turn
    /// ended first. If so, the poll will not report that the socket takes more.
    ///
    /// # Errors
    /// When the connection is broken.
    pub(crate) fn pump(
        &mut self,
        link: &mut Link,
        frame: &[u8],
        mut between: impl FnMut(&mut Link) -> io::Result<()>,
    ) -> io::Result<bool> {
        for _ in 0..TURN {
            if self.gone == 0 {
                between(link)?;
            }
            self.gone += link.write(&frame[self.gone..])?;
            if self.gone < frame.len() {
                return Ok(false);
            }
            self.gone = 0;
        }
        Ok(true)
    }
}

/// The frame that a [`Source`] sends.
pub(crate) fn bulk_frame(mask: Option<[u8; 4]>) -> Vec<u8> {
    ws::message(&[b'x'; BULK_FRAME], mask)
}
