//! The relay: userspace carries the bytes. The relay copies messages through a buffer that all
//! streams of a thread share, so an idle stream holds no buffer. It moves bulk through a pipe with
//! `splice(2)`. The relay knows a [`Session`] and its two sockets, but no other path. Other paths
//! use [`pump`] for a single direction.

use std::cell::RefCell;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use steer_kernel::tcp::receive::{self, Received};
use steer_kernel::tcp::socket::{finish_on_close, reset_on_close};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};

use super::Session;
use super::pipe::{Pipe, Pipes};
use crate::streams::End;
use crate::turn::Turn;

/// One read takes at most this many bytes. So this also bounds what a direction with a stalled
/// reader keeps in userspace: the part of one read that could not be written.
pub(super) const SCRATCH_BYTES: usize = 64 * 1024;

/// A direction becomes bulk after this many large reads in a row.
const BULK_AFTER: u32 = 8;
/// A large read has at least this many bytes: the sender is ahead of the relay.
const LARGE_READ: usize = SCRATCH_BYTES / 2;

/// A bulk direction becomes one of messages after this many small fills of its pipe in a row ...
const CALM_AFTER: u32 = 8;
/// ... (a small fill has less than this many bytes) ...
const SMALL_FILL: usize = 16 * 1024;
/// ... or when its sender is silent for this long.
const PIPE_LINGER: Duration = Duration::from_millis(100);

thread_local! {
    /// Borrowed for one read and the write after that read, never across an await.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH_BYTES].into_boxed_slice());
}

/// A direction cannot go on: a RST, a keepalive timeout or a retransmission timeout has ended the
/// connection that was read or written.
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
        // Bytes that are written before the end must arrive.
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
    // A reset must be noticed also on a side that is neither read nor written: the direction from
    // that side may wait for the other side, or be finished.
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
    // The row of the stream goes last, so a stream that is not listed holds nothing.
    drop((session.downstream, session.upstream));
    session.guard.ended(end);
}

/// Moves one direction of a stream: the bytes that were already read, then all bytes up to the FIN,
/// then the FIN.
async fn direction(
    from: &TcpStream,
    to: &TcpStream,
    surplus: &mut Bytes,
    pipes: &Pipes,
    moved: impl Fn(u64),
) -> Result<(), Broken> {
    write_all(to, surplus, &moved).await?;
    // The surplus may keep the memory of a whole read buffer alive.
    *surplus = Bytes::new();
    pump(from, to, Some(pipes), moved).await?;
    socket2::SockRef::from(to).shutdown(std::net::Shutdown::Write).map_err(Broken::To)
}

/// Moves bytes from `from` to `to`, in order, until `from`'s FIN. Returns when all bytes before the
/// FIN are written, and shuts nothing down. `moved` is called with the number of bytes after each
/// write.
///
/// With `pipes`, bulk goes through `splice(2)`. Pass no pipes for a socket that is, or was, in a
/// sockmap: `splice(2)` does not see the bytes that the kernel has queued there.
///
/// While `to` takes no more bytes, `from` is not read: at most [`SCRATCH_BYTES`], or one full pipe,
/// are held. Dropping the future loses the held bytes.
pub(super) async fn pump(
    from: &TcpStream,
    to: &TcpStream,
    pipes: Option<&Pipes>,
    moved: impl Fn(u64),
) -> Result<(), Broken> {
    let mut large_reads = 0;
    // An earlier reader of the socket may have left bytes that its readiness does not announce.
    let mut unread = true;
    let mut turn = Turn::default();
    loop {
        if !unread {
            from.readable().await.map_err(Broken::From)?;
        }
        turn.go_on().await;
        match copy_once(from, to, &mut unread, &moved)? {
            Copied::Nothing => continue,
            Copied::Fin => return Ok(()),
            Copied::All { read } => {
                turn.moved(read);
                large_reads = if read >= LARGE_READ { large_reads + 1 } else { 0 };
            }
            Copied::Part { read, rest } => {
                turn.moved(read);
                large_reads = if read >= LARGE_READ { large_reads + 1 } else { 0 };
                write_all(to, &rest, &moved).await?;
            }
        }
        if large_reads >= BULK_AFTER {
            large_reads = 0;
            // Boxed, so that streams without bulk do not keep room for this future.
            if let Some(pipe) = pipes.and_then(Pipes::take) {
                Box::pin(pump_bulk(from, to, pipe, &moved)).await?;
                unread = true;
            }
        }
    }
}

/// The outcome of one turn of copying.
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

/// Reads once, and writes as many of the bytes as `to` takes at once.
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

/// Lends `work` the buffer that all streams of the thread share.
pub(super) fn with_scratch<T>(work: impl FnOnce(&mut [u8]) -> T) -> T {
    SCRATCH.with_borrow_mut(|scratch| work(scratch))
}

/// Writes all of `bytes`, and waits for `to` without a time limit.
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

/// Like [`pump`], but with `splice(2)`, and only until the direction is not bulk any more. Then the
/// pipe is empty, and the caller has to read the socket. The pipe decides which side to wait for:
/// an empty pipe is only filled, any other pipe is only drained. So a fill and a drain cannot wait
/// for each other.
async fn pump_bulk(
    from: &TcpStream,
    to: &TcpStream,
    mut pipe: Pipe,
    moved: impl Fn(u64),
) -> Result<(), Broken> {
    let mut small_fills = 0;
    let mut turn = Turn::default();
    while small_fills < CALM_AFTER {
        match timeout(PIPE_LINGER, from.readable()).await {
            Ok(ready) => ready.map_err(Broken::From)?,
            Err(_elapsed) => break,
        }
        turn.go_on().await;
        match pipe.fill(from) {
            // Either the FIN, or an urgent byte, which `splice(2)` does not pass, with a FIN after
            // the urgent byte. A read tells which.
            Ok(0) => break,
            Ok(filled) => {
                turn.moved(filled);
                small_fills = if filled < SMALL_FILL { small_fills + 1 } else { 0 };
            }
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

/// Reads what the socket has. A read that does not fill `buffer` has normally emptied the socket,
/// so the readiness of the socket is cleared: epoll is edge-triggered and reports bytes that come
/// after the read. That saves a second read for each message, which would only return EAGAIN.
///
/// `unread`: the socket may have bytes that its readiness does not announce. Then the next read
/// asks the socket itself. A read that stopped at an [urgent byte](receive) sets `unread`.
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

/// Writes as many bytes as `to` takes, at least one, and returns their number. Clears readiness as
/// [`try_read`] does.
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
        // A `u64` holds half a million years.
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
