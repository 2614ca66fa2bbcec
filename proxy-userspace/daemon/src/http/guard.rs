//! Stands between a downstream socket and hyper's HTTP/1 server: hyper reads one request at a time,
//! and only heads that [`steer_policy::http1::head`] has found to be sound. What is not sound is replaced by a
//! request that the service answers with the fault, so that every answer is made in one place and in
//! its turn.

use std::future::Future as _;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use steer_kernel::tcp::socket::reset_on_close;
use steer_policy::http1::framing::{Event, Framing, Limits};
use steer_policy::http1::head::{self, BodyFraming};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;

use super::exchange::Exchange;
use super::fault::Fault;
use super::turn::{Passed, Turn, Waiting};

/// Read from the socket at once: a head and a body of 16 KiB, which is a common size, fit in.
const READ_BYTES: usize = 32 * 1024;
/// How much of what a client sends ahead (pipelined requests, data after an upgrade) is taken from
/// the socket before its turn; the rest waits in the kernel.
const MAX_AHEAD: usize = 16 * 1024;
/// What hyper reads in place of a refused head.
const STAND_IN: &[u8] = b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n";

#[derive(Debug)]
pub(super) struct Guard {
    io: TokioIo<TcpStream>,
    exchange: Arc<Exchange>,
    framing: Framing,
    /// Read from the socket, not yet by hyper.
    unread: BytesMut,
    /// How many bytes at the front of `unread` hyper may have.
    cleared: usize,
    /// Goes to hyper before anything else: a head that was made or changed here.
    made: Bytes,
    /// The client has sent FIN.
    finished: bool,
    /// What the client sends makes no sense any more and is dropped.
    refused: bool,
}

/// What to do when hyper wants bytes.
enum Step {
    Give,
    ReadOn,
    /// Nothing for hyper now, and enough is held already.
    Wait,
}

impl Guard {
    pub(super) fn new(socket: TcpStream, limits: Limits, exchange: Arc<Exchange>) -> Self {
        Self {
            io: TokioIo::new(socket),
            exchange,
            framing: Framing::new(limits),
            unread: BytesMut::new(),
            cleared: 0,
            made: Bytes::new(),
            finished: false,
            refused: false,
        }
    }

    /// The socket, and what was read from it and held back.
    pub(super) fn into_parts(self) -> (TcpStream, BytesMut) {
        (self.io.into_inner(), self.unread)
    }

    pub(super) fn socket(&self) -> &TcpStream {
        self.io.inner()
    }

    /// Whether the client has sent FIN.
    pub(super) fn has_finished(&self) -> bool {
        self.finished
    }

    /// Puts the stand-in before hyper; nothing that follows is read as a request.
    fn refuse(&mut self, fault: Fault) -> Step {
        self.exchange.pass(Passed::Refused(fault));
        self.made = Bytes::from_static(STAND_IN);
        self.unread.clear();
        self.refused = true;
        Step::Give
    }

    fn step(&mut self, cx: &Context<'_>) -> io::Result<Step> {
        if self.cleared > 0 || !self.made.is_empty() {
            return Ok(Step::Give);
        }
        if self.refused {
            self.unread.clear();
            return Ok(Step::ReadOn);
        }
        let at_head = self.framing.at_head();
        if at_head {
            match self.exchange.turn(cx, !self.unread.is_empty()) {
                Turn::Client => {}
                Turn::Service if self.unread.len() < MAX_AHEAD => return Ok(Step::ReadOn),
                Turn::Service | Turn::Stream => return Ok(Step::Wait),
            }
            if self.exchange.take_head_overdue() {
                return Ok(self.refuse(Fault::HeadTimeout));
            }
        }
        match self.next_event() {
            Event::Incomplete | Event::Blank(_) => {
                self.exchange.wait_for(match (at_head, self.unread.is_empty()) {
                    (true, true) => Waiting::FirstByte,
                    (true, false) => Waiting::RestOfHead,
                    (false, _) => Waiting::Body,
                });
                Ok(Step::ReadOn)
            }
            Event::Head { len, head } if head.upgrade => {
                let had_body = head.body != BodyFraming::None;
                if had_body {
                    self.made = head::without_body_headers(&self.unread[..len]).into();
                    self.unread.advance(len);
                } else {
                    self.cleared = len;
                }
                self.exchange.pass(Passed::Upgrade { had_body });
                Ok(Step::Give)
            }
            Event::Head { len, .. } => {
                self.cleared = len;
                // What came along of the body goes along.
                if !self.framing.at_head()
                    && let Event::Body(more) = self.framing.next(&self.unread[len..])
                {
                    self.cleared += more;
                }
                self.exchange.pass(Passed::Request);
                Ok(Step::Give)
            }
            Event::Body(len) => {
                self.cleared = len;
                self.exchange.moved();
                self.exchange.wait_for(Waiting::Response);
                Ok(Step::Give)
            }
            Event::Malformed(why) if at_head => Ok(self.refuse(Fault::Malformed(why))),
            Event::Malformed(why) => {
                // Part of the body may be on its way to the endpoint, which must not take it for the
                // whole: an error here becomes one there.
                self.exchange.fail(Fault::Malformed(why));
                self.refused = true;
                Err(io::Error::new(io::ErrorKind::InvalidData, why))
            }
        }
    }

    /// The next event but [`Event::Blank`].
    fn next_event(&mut self) -> Event {
        loop {
            match self.framing.next(&self.unread) {
                Event::Blank(len) => self.unread.advance(len),
                event => return event,
            }
        }
    }

    fn give(&mut self, into: &mut ReadBufCursor<'_>) {
        if self.made.is_empty() {
            let len = self.cleared.min(into.remaining());
            into.put_slice(&self.unread[..len]);
            self.unread.advance(len);
            self.cleared -= len;
        } else {
            let len = self.made.len().min(into.remaining());
            into.put_slice(&self.made[..len]);
            self.made.advance(len);
        }
    }

    /// Reads from the socket into `unread`; 0 bytes: the client has finished.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut filled = self.io.inner().poll_read_ready(cx)?.map(|()| Ok(0));
        if filled.is_ready() {
            self.unread.reserve(READ_BYTES);
            // Unlike try_read_buf it learns from a short read that there is no more for now.
            filled = pin!(self.io.inner_mut().read_buf(&mut self.unread)).poll(cx);
        }
        if filled.is_pending() && self.unread.is_empty() {
            // An idle connection keeps no buffer.
            self.unread = BytesMut::new();
        }
        filled
    }

    /// Before the client learns that this is a stream: from then on a FIN at the end of the process would be a lie.
    fn prepare_write(&self) {
        if self.exchange.is_switched() {
            reset_on_close(self.io.inner());
        }
    }

    fn note_write(&self, written: &Poll<io::Result<usize>>) {
        if matches!(written, Poll::Ready(Ok(1..))) {
            self.exchange.moved();
        }
    }
}

impl Read for Guard {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut into: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            match this.step(cx)? {
                Step::Give => {
                    this.give(&mut into);
                    return Poll::Ready(Ok(()));
                }
                Step::Wait => return Poll::Pending,
                Step::ReadOn if this.finished => return Poll::Ready(Ok(())),
                Step::ReadOn => {
                    if ready!(this.poll_fill(cx))? == 0 {
                        this.finished = true;
                    }
                }
            }
        }
    }
}

impl Write for Guard {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.prepare_write();
        let written = Pin::new(&mut this.io).poll_write(cx, bytes);
        this.note_write(&written);
        written
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.prepare_write();
        // The kernel takes a single slice with less ado.
        let written = match slices {
            [slice] => Pin::new(&mut this.io).poll_write(cx, slice),
            slices => Pin::new(&mut this.io).poll_write_vectored(cx, slices),
        };
        this.note_write(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
