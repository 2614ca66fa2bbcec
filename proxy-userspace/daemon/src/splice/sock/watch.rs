//! What happens to sockets that userspace does not read: hang-ups and resets (epoll), and the
//! program's events (the ring), each passed on to the [`Signal`] of its socket.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proxy_common::sock::{SockEvent, event};
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

/// What has happened to one socket and was not looked at yet. For one waiter of each kind.
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

    /// Waits for anything but [`BROKEN`], and takes it.
    pub(super) async fn next(&self) -> u8 {
        loop {
            let bits = self.bits.fetch_and(BROKEN, Ordering::Acquire) & !BROKEN;
            if bits != 0 {
                return bits;
            }
            self.changed.notified().await;
        }
    }

    /// Returns once the connection is gone, at each call.
    pub(super) async fn broken(&self) {
        while self.bits.load(Ordering::Acquire) & BROKEN == 0 {
            self.broken.notified().await;
        }
    }
}

#[derive(Debug)]
pub(super) struct Watch {
    epoll: AsyncFd<OwnedFd>,
    /// By socket cookie.
    signals: Mutex<HashMap<u64, Arc<Signal>>>,
}

impl Watch {
    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: takes a number and touches no memory.
        let epoll = checked(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: a new descriptor that nothing else owns.
        let epoll = unsafe { OwnedFd::from_raw_fd(epoll) };
        // SAFETY: an `OwnedFd` always gives the same descriptor, and closes it when dropped.
        let epoll = unsafe { AsyncFd::register_with_interest(epoll, Interest::READABLE) }?;
        Ok(Self { epoll, signals: Mutex::default() })
    }

    /// Begins to watch a socket; what has happened to it already counts.
    pub(super) fn add(&self, cookie: u64, socket: impl AsFd) -> io::Result<Arc<Signal>> {
        let signal = Arc::<Signal>::default();
        self.signals().insert(cookie, Arc::clone(&signal));
        // Neither EPOLLIN nor EPOLLPRI: the kernel would wake userspace for each segment that it
        // redirects. EPOLLHUP and EPOLLERR are implied.
        let mut event = libc::epoll_event { events: (libc::EPOLLRDHUP | libc::EPOLLET) as u32, u64: cookie };
        let (epoll, socket) = (self.epoll.as_raw_fd(), socket.as_fd().as_raw_fd());
        // SAFETY: both descriptors are open, and the pointer is to a local.
        let added = unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, socket, &raw mut event) };
        if let Err(error) = checked(added) {
            self.signals().remove(&cookie);
            return Err(error);
        }
        Ok(signal)
    }

    /// Ends it; the socket must still be open.
    pub(super) fn remove(&self, cookie: u64, socket: impl AsFd) {
        self.signals().remove(&cookie);
        let (epoll, socket) = (self.epoll.as_raw_fd(), socket.as_fd().as_raw_fd());
        // SAFETY: both descriptors are open; no event is read for a removal.
        let removed = unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_DEL, socket, std::ptr::null_mut()) };
        if let Err(error) = checked(removed) {
            tracing::warn!(%error, "cannot stop watching a socket");
        }
    }

    pub(super) fn on_event(&self, event: SockEvent) {
        match event.kind {
            event::WARN => self.raise(event.cookie, WARN),
            event::GATE => self.raise(event.cookie, GATE),
            kind => tracing::error!(kind, "an unknown event of the socket splice"),
        }
    }

    /// Passes on what epoll tells, until it is dropped.
    pub(super) async fn run(self: Arc<Self>) {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 256];
        loop {
            let Ok(mut ready) = self.epoll.readable().await else { return };
            // SAFETY: the pointer and the length are those of a local.
            let got = checked(unsafe {
                libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), events.len() as i32, 0)
            });
            let got = match got {
                Ok(got) => got as usize,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "cannot wait for spliced sockets");
                    return;
                }
            };
            for event in &events[..got] {
                let broken = event.events & libc::EPOLLERR as u32 != 0;
                self.raise(event.u64, if broken { HANG_UP | BROKEN } else { HANG_UP });
            }
            if got < events.len() {
                ready.clear_ready();
            }
        }
    }

    /// A socket that is not watched any more has nobody who cares.
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

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
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
    async fn hang_up_and_reset_are_told_apart_and_payload_is_not_told() {
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
        // For ever.
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
