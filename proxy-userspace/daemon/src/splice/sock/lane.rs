//! One direction of a spliced session: how it is switched to the kernel, how its reader's falling
//! behind takes it back, and when its end may be passed on.
//!
//! Why the switch loses and doubles nothing: userspace reads until nothing is there, and in whole
//! segments; only then the socket gets its verdict program, and a kick makes that look at what has
//! come in between. After that userspace does not read from the socket again.
//!
//! Why taking back loses nothing: see [`steer_kernel::tcp::hold`]. It always concerns both directions. A
//! socket has *one* queue, for what is redirected to it and for what the gate leaves to it, in
//! order of arrival: were one direction left in the kernel, its gate would one day put segments
//! after those of the stalled one, where they neither move nor count as received.

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

/// Payload bytes that a flow may move without userspace looking at its reader: the most that the
/// kernel ever holds for it besides the sockets' own buffers. It takes a userspace that gets no CPU
/// to come to that, and it should: bytes that meet a shut gate can get stuck (see above) until the
/// other direction's reader moves.
const CREDIT: u64 = 32 << 20;
/// Userspace looks each time after this many.
const LOOK_AFTER: u64 = 512 << 10;
/// A reader lags if more than this many bytes wait for room in its socket ...
const LAGGING: u64 = 256 << 10;
/// ... and still do after this long, or after this many more bytes.
const CATCH_UP: Duration = Duration::from_millis(8);
const CATCH_UP_BYTES: u64 = 1 << 20;

/// A sender who is still ahead of userspace after this many bytes is relayed.
const MAX_DRAIN: usize = 4 << 20;

/// The send queue of a reader is empty, bytes for it are missing, and it stays so for this long:
/// the kernel has lost them. It happens within microseconds as long as the kernel works.
const LOST_AFTER: Duration = Duration::from_secs(5);

/// One of a session's two sockets. Resets its connection when dropped, unless it was
/// [closed in order](Self::close_in_order).
pub(super) struct Socket<'a> {
    pub(super) stream: std::net::TcpStream,
    pub(super) signal: Arc<Signal>,
    watch: &'a Watch,
    cookie: u64,
    /// Bytes that were read from it before it was enrolled.
    read: u64,
    /// It was shut down for writing.
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
        // From here on every way out, a dropped future included, may lose what the kernel holds.
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        // The kernel sends each segment by itself; Nagle would make it wait for the one before.
        stream.set_nodelay(true)?;
        Ok(Self { stream, signal, watch, cookie, read, shut: AtomicBool::new(false) })
    }

    /// What is in its send queue is still sent, and then the FIN.
    pub(super) fn close_in_order(&self) {
        socket::finish_on_close(&self.stream);
    }

    /// For what userspace has to do; in tokio's reactor as long as the value lives.
    fn in_tokio(&self) -> io::Result<tokio::net::TcpStream> {
        tokio::net::TcpStream::from_std(self.stream.try_clone()?)
    }
}

impl Drop for Socket<'_> {
    fn drop(&mut self) {
        self.watch.remove(self.cookie, &self.stream);
    }
}

/// Where a lane was switched to the kernel.
#[derive(Debug, Clone, Copy)]
struct Base {
    /// Bytes that userspace had read from the source.
    read: u64,
    /// Bytes that the target had been given.
    queued: u64,
}

pub(super) struct Lane<'a> {
    session: &'a Shared<'a>,
    from: &'a Socket<'a>,
    to: &'a Socket<'a>,
    /// Counts bytes that userspace has moved.
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

    /// Moves all there is, from the surplus to the FIN.
    pub(super) async fn run(&self, surplus: Bytes) -> Result<(), Broken> {
        let (start, early) = (self.to_queued()?, surplus.len() as u64);
        self.send(&surplus).await?;
        // It may share the memory of a whole read buffer.
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
        // A reset looks like a FIN when its error was already taken, as by the kernel's own sending
        // to this socket. But only a FIN takes a place in the sequence.
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

    /// Whether bytes that have arrived were not given to the target.
    pub(super) fn is_behind(&self) -> bool {
        let given = |base: &Base| -> io::Result<bool> {
            let received = TcpInfo::of(&self.from.stream)?.received().saturating_sub(base.read);
            Ok(self.given(base)? >= received)
        };
        self.base.get().is_some_and(|base| !given(base).unwrap_or(false))
    }

    /// Switches the lane to the kernel, unless something speaks against it.
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

    /// Waits for the end of a lane that is in the kernel, or for its being taken back, and then for
    /// its end.
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
                // Told inside the kernel's handling of the last segment. Asking for the socket's
                // counters waits for its end, and then the flow is as it will stay: all that has
                // come was redirected, unless the gate is shut.
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

    /// Gives new credit, if the reader keeps up.
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
        // Both at once, see the module's text.
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

    /// Switches the lane back to userspace. Returns what the kernel had received but not redirected.
    async fn take_back(&self, base: &Base) -> Result<Vec<u8>, Broken> {
        let mut parked = Vec::new();
        let mut pause = Pause::default();
        let hold = Hold::new(&self.from.stream).map_err(Broken::From)?;
        hold.settle().await.map_err(Broken::From)?;
        let redirected = self.flow()?.bytes;
        // What the gate left to the socket is in a queue of the sockmap, and must be read while the
        // program is still attached: without it, reading from there confuses TCP's own queue.
        loop {
            let from = TcpInfo::of(&self.from.stream).map_err(Broken::From)?;
            // Closed, though no FIN was sent to it. `received` is one too small then, and the byte that
            // is left would be read from the wrong queue later.
            if from.is_closed() && !self.from.shut.load(Ordering::Relaxed) {
                return Err(Broken::From(io::ErrorKind::ConnectionReset.into()));
            }
            let missing = from.received().saturating_sub(base.read + redirected + parked.len() as u64);
            if missing == 0 {
                break;
            }
            // "Nothing" and "end" only mean that it is on its way between two queues.
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
            "a direction is back in userspace"
        );
        self.all_given(base, redirected).await?;
        Ok(parked)
    }

    /// Waits until the target was given the first `bytes` of what the kernel has redirected.
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

    /// Userspace moves the rest. It must not use `splice(2)`, see [`pump`].
    async fn relay(&self) -> Result<(), Broken> {
        let (from, to) =
            (self.from.in_tokio().map_err(Broken::From)?, self.to.in_tokio().map_err(Broken::To)?);
        // Boxed, so that streams which stay in the kernel do not carry its state.
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

    /// Sends what the target takes at once.
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

    /// Reads once and sends all of it.
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

/// Reads at most `missing` bytes more; tells whether there were any.
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

/// Rests between two looks at the kernel's counters: shortly at first, since most waits are for
/// microseconds, and longer where a reader has stopped.
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
