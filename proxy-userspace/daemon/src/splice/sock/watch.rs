//! Watches sockets that userspace does not read. Hang-ups and resets (from epoll) and the events of
//! the program (from the ring) are passed on to the [`Signal`] of their socket.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proxy_common::sock::{SockEvent, event};
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use steer_kernel::ready;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

/// The peer has sent its FIN, or the connection is gone.
pub(super) const HANG_UP: u8 = 1;
/// The connection is gone: RST, or a timeout of TCP.
pub(super) const BROKEN: u8 = 2;
/// The flow has used most of its credit.
pub(super) const WARN: u8 = 4;
/// The gate is shut.
pub(super) const GATE: u8 = 8;
/// The session goes back to userspace.
pub(super) const TAKE_BACK: u8 = 16;

/// epoll does not wait.
const AT_ONCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// What has happened to one socket and was not handled yet. At most one task may wait in
/// [`next`](Self::next), and one in [`broken`](Self::broken).
#[derive(Debug, Default)]
pub(super) struct Signal {
    bits: AtomicU8,
    changed: Notify,
    broken: Notify,
}

impl Signal {
    pub(super) fn raise(&self, bits: u8) {
        self.bits.fetch_or(bits, Ordering::Release);
        self.changed.notify_one();
        if bits & BROKEN != 0 {
            self.broken.notify_one();
        }
    }

    /// Waits until a bit other than [`BROKEN`] is set, and takes all bits but [`BROKEN`].
    pub(super) async fn next(&self) -> u8 {
        loop {
            let bits = self.bits.fetch_and(BROKEN, Ordering::Acquire) & !BROKEN;
            if bits != 0 {
                return bits;
            }
            self.changed.notified().await;
        }
    }

    /// Returns once the connection is gone; after that, each call returns at once.
    pub(super) async fn broken(&self) {
        while self.bits.load(Ordering::Acquire) & BROKEN == 0 {
            self.broken.notified().await;
        }
    }
}

#[derive(Debug)]
pub(super) struct Watch {
    epoll: AsyncFd<OwnedFd>,
    /// The key is the cookie of the socket.
    signals: Mutex<HashMap<u64, Arc<Signal>>>,
}

impl Watch {
    pub(super) fn new() -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let epoll = ready::descriptor(epoll, Interest::READABLE)?;
        Ok(Self { epoll, signals: Mutex::default() })
    }

    /// Begins to watch a socket. What happened to the socket before is reported, too.
    pub(super) fn add(&self, cookie: u64, socket: impl AsFd) -> io::Result<Arc<Signal>> {
        let signal = Arc::<Signal>::default();
        self.signals().insert(cookie, Arc::clone(&signal));
        // No EPOLLIN and no EPOLLPRI: with either of them, the kernel would wake userspace for each
        // segment that it redirects. EPOLLHUP and EPOLLERR are implied.
        let flags = EventFlags::RDHUP | EventFlags::ET;
        if let Err(error) = epoll::add(&self.epoll, socket, EventData::new_u64(cookie), flags) {
            self.signals().remove(&cookie);
            return Err(error.into());
        }
        Ok(signal)
    }

    /// Stops watching a socket, which must still be open.
    pub(super) fn remove(&self, cookie: u64, socket: impl AsFd) {
        self.signals().remove(&cookie);
        if let Err(error) = epoll::delete(&self.epoll, socket) {
            tracing::warn!(%error, "cannot stop watching a socket");
        }
    }

    pub(super) fn on_event(&self, event: SockEvent) {
        match event.kind {
            event::WARN => self.raise(event.cookie, WARN),
            event::GATE => self.raise(event.cookie, GATE),
            kind => tracing::error!(kind, "the socket splice has sent an unknown event"),
        }
    }

    /// Passes on what epoll reports, until the future is dropped.
    pub(super) async fn run(self: Arc<Self>) {
        loop {
            let Ok(mut ready) = self.epoll.readable().await else { return };
            match self.pass_on() {
                Ok(true) => {}
                Ok(false) => ready.clear_ready(),
                Err(error) => {
                    tracing::error!(%error, "cannot wait for spliced sockets");
                    return;
                }
            }
        }
    }

    /// Passes on what epoll reports now. Returns whether epoll may have more.
    fn pass_on(&self) -> io::Result<bool> {
        let mut events = [Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; 256];
        let got = match epoll::wait(&self.epoll, &mut events[..], Some(&AT_ONCE)) {
            Ok(got) => got,
            Err(Errno::INTR) => return Ok(true),
            Err(error) => return Err(error.into()),
        };
        for &Event { flags, data } in &events[..got] {
            let broken = flags.contains(EventFlags::ERR);
            self.raise(data.u64(), if broken { HANG_UP | BROKEN } else { HANG_UP });
        }
        Ok(got == events.len())
    }

    /// Does nothing for a socket that is not watched any more.
    fn raise(&self, cookie: u64, bits: u8) {
        if let Some(signal) = self.signals().get(&cookie) {
            signal.raise(bits);
        }
    }

    fn signals(&self) -> MutexGuard<'_, HashMap<u64, Arc<Signal>>> {
        // Nothing panics while the lock is held.
        self.signals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    fn pair() -> (std::net::TcpStream, std::net::TcpStream) {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let near = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    #[tokio::test]
    async fn hang_up_and_reset_are_told_apart_and_payload_is_not_reported() {
        let watch = Arc::new(Watch::new().unwrap());
        let task = tokio::spawn(Arc::clone(&watch).run());
        let ((mut near, far), cookie) = (pair(), 7);
        let signal = watch.add(cookie, &far).unwrap();
        io::Write::write_all(&mut near, b"payload").unwrap();
        assert!(timeout(Duration::from_millis(50), signal.next()).await.is_err());

        near.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(timeout(Duration::from_secs(5), signal.next()).await.unwrap(), HANG_UP);
        assert!(timeout(Duration::from_millis(50), signal.broken()).await.is_err());

        socket2::SockRef::from(&near).set_linger(Some(Duration::ZERO)).unwrap();
        drop(near);
        timeout(Duration::from_secs(5), signal.broken()).await.unwrap();
        // Each later call returns, too.
        timeout(Duration::from_secs(5), signal.broken()).await.unwrap();
        watch.remove(cookie, &far);
        watch.raise(cookie, WARN);
        task.abort();
    }

    #[tokio::test]
    async fn events_of_the_program_reach_their_socket() {
        let watch = Watch::new().unwrap();
        let (_near, far) = pair();
        let signal = watch.add(1, &far).unwrap();
        for kind in [event::WARN, event::GATE] {
            watch.on_event(SockEvent { cookie: 1, kind, _pad: 0 });
            watch.on_event(SockEvent { cookie: 2, kind, _pad: 0 });
        }
        assert_eq!(signal.next().await, WARN | GATE);
        watch.remove(1, &far);
    }
}
