//! One direction of a spliced session: how the direction is switched to the kernel, how it is taken
//! back when its reader lags, and when its FIN may be passed on.
//!
//! Why the switch neither loses nor doubles bytes: userspace reads whole segments until the socket
//! is empty. Only then does the socket get its verdict program. A kick makes the program look at
//! the segments that arrived in between. After that, userspace does not read from the socket again.
//!
//! Why taking back loses nothing: see [`steer_kernel::tcp::hold`]. Both directions are always taken
//! back together, since a socket has *one* queue. The queue holds, in order of arrival, the
//! segments that are redirected to the socket and those that the gate leaves to the socket. If one
//! direction stayed in the kernel, its gate would one day put segments after those of the stalled
//! direction. There the segments would neither move nor count as received.

use std::io;
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use proxy_common::reason::Reason;
use proxy_common::sock::{SockCredit, gate};
use socket2::SockRef;
use steer_kernel::tcp::hold::{self, Hold};
use steer_kernel::tcp::socket;
use steer_kernel::tcp::tcp_info::{self, TcpInfo};
use tokio::time::{Instant, sleep};

use super::super::relay::{Broken, SCRATCH_BYTES, pump, with_scratch, write_all};
use super::Shared;
use super::watch::{GATE, HANG_UP, Signal, TAKE_BACK, WARN, Watch};
use crate::streams::Stream;

/// A flow may move this many payload bytes before userspace has looked at its reader. So the kernel
/// holds at most this many bytes for the flow besides the sockets' own buffers. The credit is so
/// large that a flow uses it up only if userspace gets no CPU: bytes that meet a shut gate can get
/// stuck (see above) until the reader of the other direction moves.
const CREDIT: u64 = 32 << 20;
/// Userspace looks at the reader each time after this many bytes.
const LOOK_AFTER: u64 = 512 << 10;
/// A reader lags if more than this many bytes wait for room in its socket, ...
const LAGGING: u64 = 256 << 10;
/// ... and still wait after this time, or after this many more bytes.
const CATCH_UP: Duration = Duration::from_millis(8);
const CATCH_UP_BYTES: u64 = 1 << 20;

/// If userspace has read this many bytes and the socket is still not empty, the lane is relayed.
const MAX_DRAIN: usize = 4 << 20;

/// If the send queue of a socket stays empty for this long although redirected bytes are missing
/// from it, the kernel has lost the bytes. A working kernel needs microseconds to move them.
const LOST_AFTER: Duration = Duration::from_secs(5);

/// One of the two sockets of a session. Dropping the socket resets its connection, unless
/// [`close_in_order`](Self::close_in_order) was called.
pub(super) struct Socket<'a> {
    pub(super) stream: std::net::TcpStream,
    pub(super) signal: Arc<Signal>,
    watch: &'a Watch,
    cookie: u64,
    /// Bytes that were read from the socket before it was enrolled.
    read: u64,
    /// The socket was shut down for writing.
    shut: AtomicBool,
}

impl<'a> Socket<'a> {
    pub(super) fn new(
        watch: &'a Watch,
        stream: std::net::TcpStream,
        cookie: u64,
        read: u64,
    ) -> io::Result<Self> {
        let signal = watch.add(cookie, &stream)?;
        // From here on every exit, also a dropped future, may lose bytes that the kernel holds.
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        // The kernel redirects each segment by itself. With Nagle's algorithm, a segment would wait
        // for the acknowledgement of the one before.
        stream.set_nodelay(true)?;
        Ok(Self { stream, signal, watch, cookie, read, shut: AtomicBool::new(false) })
    }

    /// On close, the socket still sends the bytes of its send queue, and then a FIN.
    pub(super) fn close_in_order(&self) {
        socket::finish_on_close(&self.stream);
    }

    /// The socket for reads and writes by userspace. The socket is in tokio's reactor as long as
    /// the returned value lives.
    fn in_tokio(&self) -> io::Result<tokio::net::TcpStream> {
        tokio::net::TcpStream::from_std(self.stream.try_clone()?)
    }
}

impl Drop for Socket<'_> {
    fn drop(&mut self) {
        self.watch.remove(self.cookie, &self.stream);
    }
}

/// The byte counts at the moment when a lane was switched to the kernel.
#[derive(Debug, Clone, Copy)]
struct Base {
    /// Bytes that userspace had read from the source.
    read: u64,
    /// Bytes that were put into the target's send queue.
    queued: u64,
}

pub(super) struct Lane<'a> {
    session: &'a Shared<'a>,
    from: &'a Socket<'a>,
    to: &'a Socket<'a>,
    /// Adds bytes that userspace has moved to the counts of the stream.
    add: fn(&Stream, u64),
    base: OnceLock<Base>,
}

impl<'a> Lane<'a> {
    pub(super) fn new(
        session: &'a Shared<'a>,
        from: &'a Socket<'a>,
        to: &'a Socket<'a>,
        add: fn(&Stream, u64),
    ) -> Self {
        Self { session, from, to, add, base: OnceLock::new() }
    }

    /// Moves the surplus, then all bytes up to the FIN, then the FIN.
    pub(super) async fn run(&self, surplus: Bytes) -> Result<(), Broken> {
        let (start, early) = (self.to_queued()?, surplus.len() as u64);
        self.send(&surplus).await?;
        // The surplus may keep the memory of a whole read buffer alive.
        drop(surplus);
        match self.switch().await? {
            Ok(base) => {
                self.session.add_lane();
                self.in_kernel(base).await?;
            }
            Err(reason) => {
                self.session.count(reason);
                self.relay().await?;
            }
        }
        // A reset looks like a FIN if its error was already taken, for example when the kernel
        // itself sent to this socket. But only a FIN takes a sequence number.
        let given = self.to_queued()?.saturating_sub(start + early);
        let received = TcpInfo::of(&self.from.stream).map_err(Broken::From)?.received_with_fin();
        if received.saturating_sub(self.from.read) <= given {
            return Err(Broken::From(io::ErrorKind::ConnectionReset.into()));
        }
        self.to.shut.store(true, Ordering::Relaxed);
        self.to.stream.shutdown(Shutdown::Write).map_err(Broken::To)
    }

    fn to_queued(&self) -> Result<u64, Broken> {
        tcp_info::queued(&self.to.stream).map_err(Broken::To)
    }

    /// Whether bytes have arrived that are not yet in the target's send queue.
    pub(super) fn is_behind(&self) -> bool {
        let given = |base: &Base| -> io::Result<bool> {
            let received = TcpInfo::of(&self.from.stream)?.received().saturating_sub(base.read);
            Ok(self.given(base)? >= received)
        };
        self.base.get().is_some_and(|base| !given(base).unwrap_or(false))
    }

    /// Switches the lane to the kernel. The inner error: the reason why the lane cannot be
    /// switched.
    async fn switch(&self) -> Result<Result<Base, Reason>, Broken> {
        let mut drained = 0;
        loop {
            match self.move_once().await? {
                Moved::Nothing => break,
                Moved::Fin => return Ok(Err(Reason::NotEstablished)),
                Moved::Bytes(bytes) => drained += bytes,
            }
            if drained > MAX_DRAIN {
                return Ok(Err(Reason::Busy));
            }
        }
        let queued = self.to_queued()?;
        let base = Base { read: self.from.read + drained as u64, queued };
        let credit = SockCredit { limit: CREDIT, warn: LOOK_AFTER };
        if let Err(error) =
            self.session.splice.maps.insert_source(self.from.cookie, &self.from.stream, credit)
        {
            return Ok(Err(error.reason()));
        }
        let base = *self.base.get_or_init(|| base);
        hold::kick(&self.from.stream).map_err(Broken::From)?;
        Ok(Ok(base))
    }

    /// Waits for the end of a lane that is in the kernel. If the lane is taken back, relays the
    /// rest of it.
    async fn in_kernel(&self, base: Base) -> Result<(), Broken> {
        loop {
            let bits = self.from.signal.next().await;
            if bits & GATE != 0 {
                return self.reader_is_behind(base).await;
            }
            if bits & TAKE_BACK != 0 {
                return self.relay_from_kernel(base).await;
            }
            if bits & HANG_UP != 0 {
                // The hang-up is reported while the kernel still handles the last segment. Reading
                // the socket's counters waits until the kernel has handled it. After that the flow
                // does not change any more: all bytes were redirected, unless the gate is shut.
                TcpInfo::of(&self.from.stream).map_err(Broken::From)?;
                let flow = self.flow()?;
                if flow.gate != gate::OPEN {
                    return self.reader_is_behind(base).await;
                }
                return self.all_given(&base, flow.bytes).await;
            }
            if bits & WARN != 0 && !self.renew_credit(&base).await? {
                return self.reader_is_behind(base).await;
            }
        }
    }

    /// Gives new credit if the reader keeps up; returns whether it does.
    async fn renew_credit(&self, base: &Base) -> Result<bool, Broken> {
        let (start, first_look) = (Instant::now(), self.flow()?.bytes);
        loop {
            let flow = self.flow()?;
            let waiting = flow.bytes.saturating_sub(self.given(base).map_err(Broken::To)?);
            if waiting <= LAGGING {
                let credit = SockCredit { limit: flow.bytes + CREDIT, warn: flow.bytes + LOOK_AFTER };
                let set = self.session.splice.maps.set_credit(self.from.cookie, credit);
                return set.map(|()| true).map_err(Broken::From);
            }
            let used = flow.bytes.saturating_sub(first_look);
            if used > CATCH_UP_BYTES || start.elapsed() > CATCH_UP {
                return Ok(false);
            }
            sleep(Duration::from_millis(1)).await;
        }
    }

    async fn reader_is_behind(&self, base: Base) -> Result<(), Broken> {
        self.session.count(Reason::Gated);
        // Both directions together: see the text at the top of this file.
        self.to.signal.raise(TAKE_BACK);
        self.relay_from_kernel(base).await
    }

    /// Takes the lane back and relays the rest.
    async fn relay_from_kernel(&self, base: Base) -> Result<(), Broken> {
        let parked = self.take_back(&base).await?;
        self.session.remove_lane();
        self.send(&parked).await?;
        drop(parked);
        self.relay().await
    }

    /// Switches the lane back to userspace. Returns the bytes that the kernel had received but not
    /// redirected.
    async fn take_back(&self, base: &Base) -> Result<Vec<u8>, Broken> {
        let mut parked = Vec::new();
        let mut pause = Pause::default();
        let hold = Hold::new(&self.from.stream).map_err(Broken::From)?;
        hold.settle().await.map_err(Broken::From)?;
        let redirected = self.flow()?.bytes;
        // The bytes that the gate left to the socket are in a queue of the sockmap. They must be
        // read while the program is still attached: without the program, a read from that queue
        // confuses TCP's own queue.
        loop {
            let from = TcpInfo::of(&self.from.stream).map_err(Broken::From)?;
            // The connection is closed although the proxy has sent no FIN on it. Then `received` is
            // one too small, and the last byte would later be read from the wrong queue.
            if from.is_closed() && !self.from.shut.load(Ordering::Relaxed) {
                return Err(Broken::From(io::ErrorKind::ConnectionReset.into()));
            }
            let missing = from.received().saturating_sub(base.read + redirected + parked.len() as u64);
            if missing == 0 {
                break;
            }
            // Bytes are still missing, so "no bytes" and "end" only mean that they are on their way
            // between two queues.
            if !read_parked(&self.from.stream, &mut parked, missing).map_err(Broken::From)? {
                pause.rest().await;
            }
        }
        self.session.splice.maps.remove_source(self.from.cookie);
        drop(hold);
        tracing::debug!(
            stream = self.session.guard.stream().id,
            redirected,
            parked = parked.len(),
            "userspace has taken a direction back"
        );
        self.all_given(base, redirected).await?;
        Ok(parked)
    }

    /// Waits until the first `bytes` bytes that the kernel has redirected are in the target's send
    /// queue.
    async fn all_given(&self, base: &Base, bytes: u64) -> Result<(), Broken> {
        let mut pause = Pause::default();
        let mut starving: Option<Instant> = None;
        loop {
            if self.given(base).map_err(Broken::To)? >= bytes {
                return Ok(());
            }
            if !TcpInfo::of(&self.to.stream).map_err(Broken::To)?.send_queue_is_empty() {
                starving = None;
            } else if starving.get_or_insert_with(Instant::now).elapsed() > LOST_AFTER {
                return Err(Broken::To(io::Error::other("the kernel has lost redirected bytes")));
            }
            pause.rest().await;
        }
    }

    /// Bytes that were put into the target's send queue since the switch.
    fn given(&self, base: &Base) -> io::Result<u64> {
        Ok(tcp_info::queued(&self.to.stream)?.saturating_sub(base.queued))
    }

    fn flow(&self) -> Result<proxy_common::sock::SockFlow, Broken> {
        self.session.splice.maps.flow(self.from.cookie).map_err(Broken::From)
    }

    /// Userspace moves the rest of the lane, without `splice(2)`: see [`pump`].
    async fn relay(&self) -> Result<(), Broken> {
        let (from, to) =
            (self.from.in_tokio().map_err(Broken::From)?, self.to.in_tokio().map_err(Broken::To)?);
        // Boxed, so that streams that stay in the kernel do not keep room for this future.
        Box::pin(pump(&from, &to, None, |bytes| self.moved(bytes))).await
    }

    async fn send(&self, bytes: &[u8]) -> Result<(), Broken> {
        let sent = if bytes.is_empty() { 0 } else { self.send_now(bytes)? };
        if sent < bytes.len() {
            let to = self.to.in_tokio().map_err(Broken::To)?;
            write_all(&to, &bytes[sent..], |bytes| self.moved(bytes)).await?;
        }
        Ok(())
    }

    /// Sends as many bytes as the target takes at once, and returns their number.
    fn send_now(&self, bytes: &[u8]) -> Result<usize, Broken> {
        match SockRef::from(&self.to.stream).send(bytes) {
            Ok(sent) => {
                self.moved(sent as u64);
                Ok(sent)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(Broken::To(error)),
        }
    }

    /// Reads once, and sends all bytes of that read.
    async fn move_once(&self) -> Result<Moved, Broken> {
        let (moved, rest) = with_scratch(|scratch| {
            let read = match io::Read::read(&mut &self.from.stream, scratch) {
                Ok(0) => return Ok((Moved::Fin, None)),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok((Moved::Nothing, None)),
                Err(error) => return Err(Broken::From(error)),
            };
            let sent = self.send_now(&scratch[..read])?;
            let rest = (sent < read).then(|| Box::<[u8]>::from(&scratch[sent..read]));
            Ok((Moved::Bytes(read), rest))
        })?;
        if let Some(rest) = rest {
            self.send(&rest).await?;
        }
        Ok(moved)
    }

    fn moved(&self, bytes: u64) {
        (self.add)(self.session.guard.stream(), bytes);
    }
}

enum Moved {
    Nothing,
    Fin,
    Bytes(usize),
}

/// Reads at most `missing` more bytes; returns whether there were any.
fn read_parked(mut from: &std::net::TcpStream, parked: &mut Vec<u8>, missing: u64) -> io::Result<bool> {
    let old = parked.len();
    let room = usize::try_from(missing).map_or(SCRATCH_BYTES, |missing| missing.min(SCRATCH_BYTES));
    parked.resize(old + room, 0);
    let result = io::Read::read(&mut from, &mut parked[old..]);
    parked.truncate(old + result.as_ref().map_or(0, |&read| read));
    match result {
        Ok(read) => Ok(read > 0),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}

/// Pauses between two looks at the kernel's counters. The first pauses are short, since most waits
/// take microseconds; later pauses are longer, since the reader may have stopped.
#[derive(Default)]
struct Pause {
    taken: u32,
}

impl Pause {
    async fn rest(&mut self) {
        let pause = match self.taken {
            0..8 => 1,
            8..256 => 4,
            _ => 50,
        };
        self.taken = self.taken.saturating_add(1);
        sleep(Duration::from_millis(pause)).await;
    }
}
