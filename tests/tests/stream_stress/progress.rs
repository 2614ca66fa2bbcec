//! How long the bytes of a stream had to wait, from the views of both peers together.

use std::os::fd::AsRawFd as _;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;

/// The progress of one stream.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    pub(crate) to_upstream: Lane,
    pub(crate) to_downstream: Lane,
    /// The timeouts of both peers' sockets, read when they end.
    retransmission_timeouts: Mutex<Vec<Duration>>,
}

/// Both directions as one peer sees them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lanes<'p> {
    pub(crate) sends: &'p Lane,
    pub(crate) receives: &'p Lane,
    progress: &'p Progress,
}

impl Progress {
    pub(crate) fn of_client(&self) -> Lanes<'_> {
        Lanes { sends: &self.to_upstream, receives: &self.to_downstream, progress: self }
    }

    pub(crate) fn of_backend(&self) -> Lanes<'_> {
        Lanes { sends: &self.to_downstream, receives: &self.to_upstream, progress: self }
    }

    pub(crate) fn longest_gap(&self) -> Duration {
        self.to_upstream.longest_gap().max(self.to_downstream.longest_gap())
    }

    pub(crate) fn retransmission_timeouts(&self) -> Vec<Duration> {
        self.retransmission_timeouts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Lanes<'_> {
    /// Notes the socket's retransmission timeout.
    pub(crate) fn note_timeout_of(&self, stream: &TcpStream) {
        if let Some(timeout) = retransmission_timeout(stream) {
            let noted = &self.progress.retransmission_timeouts;
            noted.lock().unwrap_or_else(PoisonError::into_inner).push(timeout);
        }
    }
}

/// One direction. A gap is a time in which the reader waits, bytes (or the FIN) of the sender are
/// under way, and nothing arrives.
#[derive(Debug, Default)]
pub(crate) struct Lane(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Counts bytes. The FIN counts as one byte.
    sent: u64,
    /// May be larger than `sent` for a moment.
    received: u64,
    reading: bool,
    waiting_since: Option<Instant>,
    longest: Duration,
}

impl Lane {
    /// The sender has written `bytes`, or is about to.
    pub(crate) fn sends(&self, bytes: usize) {
        let mut state = self.state();
        state.sent += bytes as u64;
        state.wait();
    }

    /// The reader begins to wait.
    pub(crate) fn reads(&self) {
        let mut state = self.state();
        state.reading = true;
        state.wait();
    }

    /// The reader has received `bytes`, and does not wait now.
    pub(crate) fn received(&self, bytes: usize) {
        let mut state = self.state();
        state.received += bytes as u64;
        state.reading = false;
        let waited = state.waiting_since.take().map(|since| since.elapsed());
        state.longest = state.longest.max(waited.unwrap_or_default());
    }

    fn longest_gap(&self) -> Duration {
        self.state().longest
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn wait(&mut self) {
        if self.reading && self.sent > self.received {
            self.waiting_since.get_or_insert_with(Instant::now);
        }
    }
}

fn retransmission_timeout(stream: &TcpStream) -> Option<Duration> {
    // SAFETY: tcp_info has only integers, so all zeros is a valid value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the descriptor is open as long as `stream` is borrowed, and `len` is the size of
    // `info`.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut len,
        )
    };
    (result == 0).then(|| Duration::from_micros(info.tcpi_rto.into()))
}

#[test]
fn only_waiting_for_what_was_sent_is_a_gap() {
    let pause = Duration::from_millis(30);
    let lane = Lane::default();
    lane.reads();
    std::thread::sleep(pause);
    lane.sends(2);
    lane.received(1);
    std::thread::sleep(pause);
    assert!(lane.longest_gap() < pause, "nothing was sent, or nobody was reading");
    lane.reads();
    std::thread::sleep(pause);
    lane.received(1);
    assert!(lane.longest_gap() >= pause);
}
