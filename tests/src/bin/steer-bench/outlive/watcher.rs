//! The runner's side of the process `watch`.

use std::io::Write as _;
use std::net::SocketAddr;
use std::process::{ChildStdin, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use steer_tests::eventually::eventually;
use steer_tests::process::{Orphan, Process, quiet};

use super::daemon::Daemon;
use crate::lanes::Lanes;
use crate::subjects::Kind;
use crate::watch::Window;

/// From the opening of the last stream to the first window. Hand-overs end in this time.
const SETTLING: Duration = Duration::from_secs(1);
const OPEN_WITHIN: Duration = Duration::from_secs(30);
const SAID_WITHIN: Duration = Duration::from_secs(10);

/// The process `watch`. It runs until the guard is dropped.
pub(super) struct Watcher {
    process: Process,
    commands: ChildStdin,
    /// How many lines of its output were read.
    read: usize,
}

impl Watcher {
    pub(super) fn start(lanes: &Lanes, targets: &[SocketAddr]) -> Result<Self> {
        let mut command: Command = quiet(std::env::current_exe().context("cannot find steer-bench")?);
        command.arg("watch").args(targets.iter().map(ToString::to_string)).stdin(Stdio::piped());
        let mut process =
            Process::start("watch", command, lanes.directory(), Some(&lanes.clients), Orphan::Dies)?;
        let commands = process.take_stdin().context("the process has no standard input")?;
        Ok(Self { process, commands, read: 0 })
    }

    /// Opens `streams` more streams and waits until their hand-overs are over.
    pub(super) fn open(&mut self, daemon: &Daemon<'_>, streams: usize) -> Result<()> {
        self.ask(&format!("open {streams}"), OPEN_WITHIN)?;
        if let Some(steer) = daemon.steer() {
            eventually("splice of every stream", OPEN_WITHIN, || {
                let relayed = steer.metric("steer_streams", &[("path", "relay")])?;
                Ok((relayed == 0.0 || daemon.kind() != Kind::SteerPacket).then_some(()))
            })?;
        }
        thread::sleep(SETTLING);
        Ok(())
    }

    /// What happened since the last call.
    pub(super) fn window(&mut self) -> Result<Window> {
        let line = self.ask("window", SAID_WITHIN)?;
        serde_json::from_str(&line).with_context(|| format!("the watch printed {line}"))
    }

    /// Sends `command` and returns the line that answers it.
    fn ask(&mut self, command: &str, patience: Duration) -> Result<String> {
        writeln!(self.commands, "{command}")
            .context("the watch has ended")
            .with_context(|| self.process.tail())?;
        let line = eventually(&format!("answer to {command:?}"), patience, || {
            self.process.ensure_running()?;
            let output = self.process.stdout()?;
            let whole = output.rsplit_once('\n').map_or("", |(whole, _)| whole);
            Ok(whole.lines().nth(self.read).map(str::to_owned))
        });
        self.read += 1;
        line.with_context(|| self.process.tail())
    }
}
