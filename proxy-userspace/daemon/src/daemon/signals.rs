//! The signals by which an operator controls the process.

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};

pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    quit: Signal,
    upgrade: Signal,
}

impl Signals {
    pub(super) fn new() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen to signals");
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            quit: listen(SignalKind::quit())?,
            upgrade: listen(SignalKind::user_defined2())?,
        })
    }

    /// Waits for the next signal.
    pub(super) async fn next(&mut self) -> Event {
        tokio::select! {
            _ = self.terminate.recv() => Event::Stop("SIGTERM"),
            _ = self.interrupt.recv() => Event::Stop("SIGINT"),
            _ = self.quit.recv() => Event::Stop("SIGQUIT"),
            _ = self.upgrade.recv() => Event::Upgrade,
        }
    }

    /// Waits for the next signal that asks for an orderly stop, and returns its name.
    pub(super) async fn stop(&mut self) -> &'static str {
        loop {
            match self.next().await {
                Event::Stop(signal) => return signal,
                Event::Upgrade => {
                    tracing::warn!("ignoring SIGUSR2: this process is in a takeover, or is stopping");
                }
            }
        }
    }
}

/// What a signal asks for.
pub(super) enum Event {
    /// An orderly stop, asked for by the signal with this name.
    Stop(&'static str),
    /// A takeover by a new process of the binary that is installed now.
    Upgrade,
}
