//! The relay: userspace carries the bytes. It copies messages through a buffer that all streams of
//! a thread share, so that an idle stream holds none, and moves bulk through a pipe with
//! `splice(2)`. It knows two sockets and their [`Session`], and nothing of other paths, which use
//! [`pump`] for single directions.

use std::cell::RefCell;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use steer_kernel::tcp::receive::{self, Received};
use steer_kernel::tcp::socket::{finish_on_close, reset_on_close};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::task::coop;
use tokio::time::{Instant, sleep_until, timeout};

use super::Session;
use super::pipe::{Pipe, Pipes};
use crate::streams::End;

/// Bytes that one read takes at most. Also bounds what a stream whose reader stalls keeps in
/// userspace (in each direction): the part of one read that could not be written.
pub(super) const SCRATCH_BYTES: usize = 64 * 1024;

/// A direction is bulk after this many large reads in a row ...
const BULK_AFTER: u32 = 8;
/// ... a large read being one of at least this many bytes: the sender is ahead of us.
const LARGE_READ: usize = SCRATCH_BYTES / 2;

/// A bulk direction is back to messages after this many small fills of its pipe in a row ...
const CALM_AFTER: u32 = 8;
/// ... of less than this many bytes ...
const SMALL_FILL: usize = 16 * 1024;
/// ... or after silence for this long, with its pipe empty.
const PIPE_LINGER: Duration = Duration::from_millis(100);

thread_local! {
    /// Borrowed for one read and the write that follows it, never over an await.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH_BYTES].into_boxed_slice());
}

/// A direction cannot go on: the side that was read or written is gone, by RST, keepalive or
/// retransmission timeout.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("cannot read")]
    From(#[source] io::Error),
    #[error("cannot write")]
    To(#[source] io::Error),
}

/// Relays a session until both directions are finished, one side breaks, or nothing has moved for
/// the idle timeout.
pub(super) async fn run(mut session: Session, pipes: &Pipes) {
    let last_moved = Activity::new();
    let (downstream, upstream, stream) = (&session.downstream, &session.upstream, session.guard.stream());
    for socket in [downstream, upstream] {
        // What is written before the end is to arrive.
        finish_on_close(socket);
    }
    let mut was_asked = false;
    let both = async {
        tokio::try_join!(
            direction(downstream, upstream, &mut session.to_upstream, pipes, |bytes| {
                last_moved.now();
                stream.add_to_upstream(bytes);
            }),
            direction(upstream, downstream, &mut session.to_downstream, pipes, |bytes| {
                last_moved.now();
                stream.add_to_downstream(bytes);
            }),
        )
    };
    // A side that resets must be noticed also while nobody reads or writes it, because its
    // direction waits for the other side or is finished.
    let end = tokio::select! {
        biased;
        ended = both => match ended {
            Ok(_) => End::Finished,
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::debug!(stream = stream.id, error, "stream broke");
                End::Reset
            }
        },
        _ = downstream.ready(Interest::ERROR) => End::Reset,
        _ = upstream.ready(Interest::ERROR) => End::Reset,
        () = last_moved.quiet_for(session.idle_timeout) => End::IdleTimeout,
        end = stream.end_asked() => {
            was_asked = true;
            end
        }
    };
    if end == End::Reset || was_asked {
        reset_on_close(downstream);
        reset_on_close(upstream);
    }
    // The row of the stream goes last, so that a stream which is not listed holds nothing.
    drop((session.downstream, session.upstream));
    session.guard.ended(end);
}

/// One direction of a stream: what was already read, then all until the FIN, then the FIN.
async fn direction(
    from: &TcpStream,
    to: &TcpStream,
    surplus: &mut Bytes,
    pipes: &Pipes,
    moved: impl Fn(u64),
) -> Result<(), Broken> {
    write_all(to, surplus, &moved).await?;
    // It may share the memory of a whole read buffer.
    *surplus = Bytes::new();
    pump(from, to, Some(pipes), moved).await?;
    socket2::SockRef::from(to).shutdown(std::net::Shutdown::Write).map_err(Broken::To)
}

/// Moves bytes from `from` to `to`, in order, until `from`'s FIN; then all of them have been
/// written. Shuts nothing down. `moved` is told each number of bytes written.
///
/// With `pipes`, bulk goes through `splice(2)`. That must not be allowed for a socket that is, or
/// was, in a sockmap: `splice(2)` does not see what the kernel has queued there.
///
/// While `to` does not take more, `from` is not read: at most [`SCRATCH_BYTES`], or one pipe, are
/// held. Dropping the future loses what it holds.
pub(super) async fn pump(
    from: &TcpStream,
    to: &TcpStream,
    pipes: Option<&Pipes>,
    moved: impl Fn(u64),
) -> Result<(), Broken> {
    let mut large_reads = 0;
    // Whoever has read the socket before may have left something that its readiness does not tell of.
    let mut unread = true;
    loop {
        if !unread {
            from.readable().await.map_err(Broken::From)?;
        }
        coop::consume_budget().await;
        match copy_once(from, to, &mut unread, &moved)? {
            Copied::Nothing => continue,
            Copied::Fin => return Ok(()),
            Copied::All { read } => large_reads = if read >= LARGE_READ { large_reads + 1 } else { 0 },
            Copied::Part { read, rest } => {
                large_reads = if read >= LARGE_READ { large_reads + 1 } else { 0 };
                write_all(to, &rest, &moved).await?;
            }
        }
        if large_reads >= BULK_AFTER {
            large_reads = 0;
            // Boxed, so that streams which never get here do not carry its state.
            if let Some(pipe) = pipes.and_then(Pipes::take) {
                Box::pin(pump_bulk(from, to, pipe, &moved)).await?;
                unread = true;
            }
        }
    }
}

/// What one turn of copying did.
enum Copied {
    Nothing,
    Fin,
    All {
        read: usize,
    },
    /// `to` was full; `rest` is still to be written.
    Part {
        read: usize,
        rest: Box<[u8]>,
    },
}

/// Reads once and writes it at once, as far as `to` takes it.
fn copy_once(
    from: &TcpStream,
    to: &TcpStream,
    unread: &mut bool,
    moved: impl Fn(u64),
) -> Result<Copied, Broken> {
    with_scratch(|scratch| {
        let read = match try_read(from, scratch, unread) {
            Ok(0) => return Ok(Copied::Fin),
            Ok(read) => read,
            Err(error) if would_block(&error) => return Ok(Copied::Nothing),
            Err(error) => return Err(Broken::From(error)),
        };
        let written = match try_write(to, &scratch[..read]) {
            Ok(written) => written,
            Err(error) if would_block(&error) => 0,
            Err(error) => return Err(Broken::To(error)),
        };
        if written > 0 {
            moved(written as u64);
        }
        if written == read {
            Ok(Copied::All { read })
        } else {
            Ok(Copied::Part { read, rest: scratch[written..read].into() })
        }
    })
}

/// Lends the buffer that all streams of the thread share.
pub(super) fn with_scratch<T>(work: impl FnOnce(&mut [u8]) -> T) -> T {
    SCRATCH.with_borrow_mut(|scratch| work(scratch))
}

/// Writes all of `bytes`, waiting as long as it takes.
pub(super) async fn write_all(to: &TcpStream, mut bytes: &[u8], moved: impl Fn(u64)) -> Result<(), Broken> {
    while !bytes.is_empty() {
        to.writable().await.map_err(Broken::To)?;
        match try_write(to, bytes) {
            Ok(written) => {
                moved(written as u64);
                bytes = &bytes[written..];
            }
            Err(error) if would_block(&error) => {}
            Err(error) => return Err(Broken::To(error)),
        }
    }
    Ok(())
}

/// Like [`pump`], by `splice(2)`, until the direction is not bulk any more; the pipe is empty then, and the socket is to
/// be read. Whether the pipe is empty says which side to wait for: an empty one is only ever filled, and any other only
/// ever drained, so the two cannot wait for each other.
async fn pump_bulk(
    from: &TcpStream,
    to: &TcpStream,
    mut pipe: Pipe,
    moved: impl Fn(u64),
) -> Result<(), Broken> {
    let mut small_fills = 0;
    while small_fills < CALM_AFTER {
        match timeout(PIPE_LINGER, from.readable()).await {
            Ok(ready) => ready.map_err(Broken::From)?,
            Err(_elapsed) => break,
        }
        coop::consume_budget().await;
        match pipe.fill(from) {
            // The FIN, or an urgent byte, which `splice(2)` does not pass, and a FIN after that: a read tells.
            Ok(0) => break,
            Ok(filled) => small_fills = if filled < SMALL_FILL { small_fills + 1 } else { 0 },
            Err(error) if would_block(&error) => continue,
            Err(error) => return Err(Broken::From(error)),
        }
        while pipe.held() > 0 {
            match pipe.drain(to) {
                Ok(written) => moved(written as u64),
                Err(error) if would_block(&error) => to.writable().await.map_err(Broken::To)?,
                Err(error) => return Err(Broken::To(error)),
            }
        }
    }
    Ok(())
}

/// Reads what is there. A read that does not fill `buffer` has emptied the socket as a rule, so its readiness
/// is forgotten: epoll is edge-triggered and tells of whatever comes after the read. That saves a
/// second read, only to be told EAGAIN, for each message.
///
/// `unread`: there may be something that readiness does not tell of, and the next read asks the socket itself. So it is
/// after a read that stopped at an [urgent byte](receive).
pub(super) fn try_read(from: &TcpStream, buffer: &mut [u8], unread: &mut bool) -> io::Result<usize> {
    if std::mem::take(unread) {
        let got = receive::receive(from, buffer)?;
        *unread = got.bytes == buffer.len() || got.bytes > 0 && got.more == Some(true);
        return Ok(got.bytes);
    }
    let mut got = Received::default();
    let result = from.try_io(Interest::READABLE, || {
        got = receive::receive(from, buffer)?;
        if got.bytes > 0 && got.bytes < buffer.len() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
    });
    if got.bytes == 0 {
        return result.map(|()| 0);
    }
    *unread = result.is_err() && got.more == Some(true);
    Ok(got.bytes)
}

/// Writes what `to` takes, which is at least one byte; forgets readiness as [`try_read`] does.
pub(super) fn try_write(to: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    let mut written = 0;
    let result = to.try_io(Interest::WRITABLE, || {
        written = socket2::SockRef::from(to).send(bytes)?;
        if written < bytes.len() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
    });
    if written > 0 { Ok(written) } else { result.and(Err(io::ErrorKind::WriteZero.into())) }
}

pub(super) fn would_block(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

/// When a stream last moved a byte.
#[derive(Debug)]
struct Activity {
    since: Instant,
    /// Microseconds after `since`.
    last: AtomicU64,
}

impl Activity {
    fn new() -> Self {
        Self { since: Instant::now(), last: AtomicU64::new(0) }
    }

    fn now(&self) {
        // Half a million years fit.
        self.last.store(self.since.elapsed().as_micros() as u64, Ordering::Relaxed);
    }

    /// Returns when nothing has moved for `limit`; never without a limit.
    async fn quiet_for(&self, limit: Option<Duration>) {
        let Some(limit) = limit else { return std::future::pending().await };
        loop {
            let deadline = self.since + Duration::from_micros(self.last.load(Ordering::Relaxed)) + limit;
            if deadline <= Instant::now() {
                return;
            }
            sleep_until(deadline).await;
        }
    }
}

#[cfg(test)]
mod tests;
