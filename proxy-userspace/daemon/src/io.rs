//! A connection's socket, and the bytes that were read from it and are not used yet.

use std::future::Future as _;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWrite as _};
use tokio::net::TcpStream;

/// Read from the socket at once: a head and a body of 16 KiB, which is a common size, fit in.
const READ_BYTES: usize = 32 * 1024;

/// A connection. While nothing is unread and nothing arrives, it holds no buffer.
#[derive(Debug)]
pub struct Io {
    socket: TcpStream,
    unread: BytesMut,
    /// The peer has sent FIN, or the connection broke.
    ended: bool,
}

impl Io {
    pub fn new(socket: TcpStream) -> Self {
        Self { socket, unread: BytesMut::new(), ended: false }
    }

    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// The socket, and what was read from it and not used.
    pub fn into_parts(self) -> (TcpStream, BytesMut) {
        (self.socket, self.unread)
    }

    /// What was read and is not used yet.
    pub fn unread(&self) -> &[u8] {
        &self.unread
    }

    /// The first `len` unread bytes are used.
    pub fn consume(&mut self, len: usize) {
        self.unread.advance(len);
    }

    /// Whether nothing more will be read.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Reads more. `Ok(0)`: the peer has sent FIN.
    ///
    /// # Errors
    /// The connection broke. What came before was read.
    pub fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.ended {
            return Poll::Ready(Ok(0));
        }
        let mut filled = self.socket.poll_read_ready(cx)?.map(|()| Ok(0));
        if filled.is_ready() {
            self.unread.reserve(READ_BYTES);
            // Unlike try_read_buf it learns from a short read that there is no more for now.
            filled = pin!(self.socket.read_buf(&mut self.unread)).poll(cx);
        }
        if filled.is_pending() && self.unread.is_empty() {
            self.unread = BytesMut::new();
        }
        let filled = ready!(filled);
        self.ended = matches!(filled, Ok(0) | Err(_));
        Poll::Ready(filled)
    }

    /// Writes some of `bytes`, at least one.
    ///
    /// # Errors
    /// The connection broke, or takes no more bytes.
    pub fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match ready!(Pin::new(&mut self.socket).poll_write(cx, bytes)) {
            Ok(0) => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            written => Poll::Ready(written),
        }
    }

    /// Whether a kept connection can be used again: the peer has sent nothing, no FIN either. Costs
    /// no system call if the runtime was told of nothing.
    pub fn is_quiet(&self) -> bool {
        let quiet = || matches!(self.socket.try_read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        !self.ended && self.unread.is_empty() && quiet()
    }

    /// Lets go of the buffer, which must be empty.
    pub fn release_buffer(&mut self) {
        debug_assert!(self.unread.is_empty());
        self.unread = BytesMut::new();
    }
}
