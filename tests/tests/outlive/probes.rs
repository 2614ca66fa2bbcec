//! New connections, one after the other without a pause, while Steer dies and is started again.

use std::fmt;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_millis(2);
const PATIENCE: Duration = Duration::from_secs(20);

/// Steer answers this request itself with a 400, without an endpoint and without a stream.
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\n\r\n";

/// What happened to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Answered,
    Refused,
    /// The process died after the handshake.
    Reset,
}

/// When each connection ended, and how.
#[derive(Debug, Default)]
pub(crate) struct Probes(Vec<(Instant, Outcome)>);

impl Probes {
    /// Connects again and again until `stop` is set.
    pub(crate) fn run(front: SocketAddr, stop: &AtomicBool) -> Self {
        let mut probes = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let outcome = probe(front);
            probes.push((Instant::now(), outcome));
            thread::sleep(PAUSE);
        }
        Self(probes)
    }

    pub(crate) fn count(&self, outcome: Outcome) -> usize {
        self.0.iter().filter(|(_, other)| *other == outcome).count()
    }

    /// The times from one answer to the next during which a connection failed.
    fn gaps(&self) -> Vec<Duration> {
        let (mut gaps, mut last, mut failed) = (Vec::new(), None, false);
        for (at, outcome) in &self.0 {
            if *outcome != Outcome::Answered {
                failed = true;
            } else if let Some(last) = last.replace(*at)
                && std::mem::take(&mut failed)
            {
                gaps.push(*at - last);
            }
        }
        gaps
    }
}

impl fmt::Display for Probes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut gaps: Vec<_> = self.gaps().iter().map(Duration::as_millis).collect();
        gaps.sort_unstable();
        let [answered, refused, reset] =
            [Outcome::Answered, Outcome::Refused, Outcome::Reset].map(|outcome| self.count(outcome));
        let median = gaps.get(gaps.len() / 2).copied().unwrap_or_default();
        let longest = gaps.last().copied().unwrap_or_default();
        write!(
            f,
            "new connections: {answered} answered, {refused} refused, {reset} reset; \
             nobody answered for {median} ms (median), {longest} ms (longest)"
        )
    }
}

fn probe(front: SocketAddr) -> Outcome {
    let answered = || {
        let mut stream = TcpStream::connect(front)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(REQUEST)?;
        let size = stream.read(&mut [0; 1024])?;
        if size == 0 { Err(std::io::Error::from(ErrorKind::UnexpectedEof)) } else { Ok(()) }
    };
    match answered() {
        Ok(()) => Outcome::Answered,
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Outcome::Refused,
        // A process that hangs must not count as a failed connection.
        Err(error) if error.kind() == ErrorKind::WouldBlock => panic!("no answer within {PATIENCE:?}"),
        Err(_) => Outcome::Reset,
    }
}
