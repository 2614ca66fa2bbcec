//! Moves one message from one connection to the other: bytes that are ready, then a body.

use std::io;
use std::task::{Context, Poll, ready};

use steer_policy::http1::body::{BodyReader, BodyWriter, Piece};
use steer_policy::http1::fields::{Fields, Spelling};
use steer_policy::http1::malformed::Malformed;
use steer_policy::http1::request::BodyFraming;
use steer_policy::routing;

use crate::io::Io;
use crate::turn::TURN_BYTES;

/// One message on its way. At most one read of the body is held.
#[derive(Debug)]
pub(super) struct Transfer {
    reader: BodyReader,
    writer: BodyWriter,
    spelling: Spelling,
    /// Trailer lines may follow the body.
    trailers: bool,
    /// To be written. Kept until there is more to write.
    out: Vec<u8>,
    written: usize,
    /// `out` is no longer the message from its start.
    advanced: bool,
    /// The end of the message is in `out`.
    complete: bool,
    /// Why the message ends after what is in `out`.
    cut: Option<Cut>,
    /// The last poll has waited for bytes of the body.
    starved: bool,
    given_up: bool,
}

/// Why a message does not arrive whole.
#[derive(Debug)]
pub(super) enum Cut {
    /// What follows is not the framing of a body.
    Malformed(Malformed),
    /// The sender's connection ended.
    Sender,
    /// The recipient's connection broke.
    Recipient(io::Error),
}

impl Transfer {
    /// `out` goes first: the head.
    pub(super) fn new(framing: BodyFraming, writer: BodyWriter, out: Vec<u8>) -> Self {
        Self {
            reader: BodyReader::new(framing),
            writer,
            spelling: Spelling::LowerCase,
            trailers: true,
            out,
            written: 0,
            advanced: false,
            complete: false,
            cut: None,
            starved: false,
            given_up: false,
        }
    }

    pub(super) fn spell(mut self, spelling: Spelling) -> Self {
        self.spelling = spelling;
        self
    }

    /// Says whether trailer lines may follow the body.
    pub(super) fn with_trailers(mut self, trailers: bool) -> Self {
        self.trailers = trailers;
        self
    }

    /// Whether everything has been written.
    pub(super) fn is_done(&self) -> bool {
        self.complete && self.written == self.out.len()
    }

    /// Whether all of the body has been read.
    pub(super) fn is_read(&self) -> bool {
        self.complete
    }

    /// The recipient takes nothing more.
    pub(super) fn give_up(&mut self) {
        self.given_up = true;
    }

    pub(super) fn is_given_up(&self) -> bool {
        self.given_up
    }

    /// Whether the last poll has waited for the sender.
    pub(super) fn is_starved(&self) -> bool {
        self.starved
    }

    /// Begins again, for another recipient. Returns whether the whole message is still there.
    pub(super) fn rewind(&mut self) -> bool {
        self.written = 0;
        self.given_up = false;
        !self.advanced
    }

    /// Whether nothing has been written.
    pub(super) fn is_untouched(&self) -> bool {
        self.written == 0 && !self.advanced
    }

    /// Takes the bytes that the sender has sent already. Returns whether there were any, or the end.
    ///
    /// # Errors
    /// What has been sent is not the framing of a body.
    pub(super) fn take(&mut self, from: &mut Io) -> Result<bool, Malformed> {
        let mut some = false;
        loop {
            let piece = self.reader.next(from.unread())?;
            if piece == Piece::default() {
                break;
            }
            some = true;
            self.writer.write(&from.unread()[piece.framing..][..piece.payload], &mut self.out);
            from.consume(piece.framing + piece.payload);
        }
        Ok(self.complete_if_read() || some)
    }

    /// Whether the message has just become complete.
    fn complete_if_read(&mut self) -> bool {
        if self.complete || !self.reader.is_done() {
            return false;
        }
        self.complete = true;
        let mut trailers = if self.trailers { self.reader.trailers() } else { Fields::default() };
        routing::strip_trailers(&mut trailers);
        self.writer.finish(&trailers, self.spelling, &mut self.out);
        true
    }

    /// Reads and drops what has been sent of the body. Returns whether the body ends there.
    pub(super) fn discard(&mut self, from: &mut Io) -> bool {
        self.take(from).is_ok() && self.complete
    }

    /// Moves what can be moved now. `moved` is set if any byte was.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Io,
        to: &mut Io,
        moved: &mut bool,
    ) -> Poll<Result<(), Cut>> {
        self.starved = false;
        let mut written = 0;
        loop {
            while self.written < self.out.len() {
                match ready!(to.poll_write(cx, &self.out[self.written..])) {
                    Ok(len) => {
                        self.written += len;
                        written += len;
                    }
                    Err(error) => return Poll::Ready(Err(Cut::Recipient(error))),
                }
                *moved = true;
            }
            if self.complete {
                return Poll::Ready(Ok(()));
            }
            if let Some(cut) = self.cut.take() {
                return Poll::Ready(Err(cut));
            }
            if written >= TURN_BYTES {
                // Other tasks first.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            self.advanced |= self.written > 0;
            self.out.clear();
            self.written = 0;
            match self.take(from) {
                Err(why) => self.cut = Some(Cut::Malformed(why)),
                Ok(true) => {}
                Ok(false) => {
                    self.starved = true;
                    match ready!(from.poll_fill(cx)) {
                        Ok(1..) => *moved = true,
                        Ok(0) if self.reader.end() => drop(self.complete_if_read()),
                        Ok(0) | Err(_) => self.cut = Some(Cut::Sender),
                    }
                    self.starved = false;
                }
            }
        }
    }
}
