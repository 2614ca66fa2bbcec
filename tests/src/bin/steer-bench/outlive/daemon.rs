//! A subject whose processes are replaced, started as its manual says for replacement.

use std::fs;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use steer_tests::eventually::eventually;
use steer_tests::netns;
use steer_tests::process::{Orphan, Process, quiet};
use steer_tests::steer::Steer;

use super::Event;
use crate::bpf::field;
use crate::lanes::{Lane, Lanes};
use crate::subjects::{Kind, Programs, config};

const READY_WITHIN: Duration = Duration::from_secs(30);
const ENDS_WITHIN: Duration = Duration::from_secs(20);

/// The time limit for replaced processes where there is one, in seconds.
pub(super) const LIMIT: u32 = 6;

pub(super) struct Daemon<'n> {
    lane: &'n Lane,
    running: Running<'n>,
    /// Steer processes that were replaced.
    replaced: Vec<Process>,
}

enum Running<'n> {
    Direct,
    Steer(Steer<'n>),
    Peer(Peer),
}

/// A proxy other than Steer.
struct Peer {
    kind: Kind,
    program: PathBuf,
    directory: PathBuf,
    /// Whether replaced processes have a time limit.
    limited: bool,
    /// The value of Envoy's `--base-id`, by which its processes find each other.
    base_id: u32,
    epoch: u32,
    /// The processes that we started. The newest is the last.
    processes: Vec<Process>,
}

impl<'n> Daemon<'n> {
    /// Starts the subject in its lane, and waits until it accepts connections.
    pub(super) fn start(kind: Kind, lanes: &'n Lanes, programs: &Programs, event: Event) -> Result<Self> {
        let lane = lanes.of(kind)?;
        let directory = lanes.directory().join(format!("outlive-{kind}"));
        fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
        let config = config::of(lane, &directory);
        let running = match (kind, kind.splice()) {
            (Kind::Direct, _) => Running::Direct,
            (_, Some(splice)) => {
                let (binary, args) = (programs.of(kind).context("no program")?, ["--splice", splice]);
                let netns = Some(&lane.netns);
                Running::Steer(Steer::start_at(binary, &directory, &config, netns, &args, Orphan::Dies)?)
            }
            (_, None) => Running::Peer(Peer::start(lane, programs, directory, &config, event)?),
        };
        let daemon = Self { lane, running, replaced: Vec::new() };
        let targets = lane.targets();
        eventually(&format!("readiness of {kind}"), READY_WITHIN, || {
            let connects = || targets.iter().all(|target| TcpStream::connect(target).is_ok());
            Ok(lanes.clients.run(connects)?.then_some(()))
        })?;
        Ok(daemon)
    }

    pub(super) const fn kind(&self) -> Kind {
        self.lane.kind
    }

    /// Steer, if the subject is Steer, for its metrics.
    pub(super) const fn steer(&self) -> Option<&Steer<'n>> {
        match &self.running {
            Running::Steer(steer) => Some(steer),
            Running::Direct | Running::Peer(_) => None,
        }
    }

    /// Makes the event happen once. [`Event::Reloads`] is several events; this does one of them.
    /// Returns when the event is started, not when it is over.
    pub(super) fn undergo(&mut self, event: Event) -> Result<()> {
        let pids = self.processes()?;
        match (&mut self.running, event) {
            (Running::Direct, _) => Ok(()),
            (Running::Steer(steer), Event::Reload | Event::Reloads) => {
                self.replaced.push(steer.take_over()?);
                Ok(())
            }
            (Running::Steer(steer), Event::Restart) => steer.restart(libc::SIGTERM),
            (Running::Steer(steer), Event::Kill) => steer.restart(libc::SIGKILL),
            (Running::Peer(peer), Event::Reload | Event::Reloads) => peer.reload(self.lane),
            (Running::Peer(peer), Event::Restart) => {
                peer.newest()?.signal(libc::SIGTERM)?;
                peer.start_again(self.lane)
            }
            (Running::Peer(peer), Event::Kill) => {
                pids.into_iter().for_each(kill);
                peer.start_again(self.lane)
            }
        }
    }

    /// All processes of the subject, including replaced ones.
    pub(super) fn processes(&self) -> Result<Vec<libc::pid_t>> {
        netns::processes_in(self.lane.netns.name())
    }

    /// The memory of all processes of the subject, in bytes. Memory that several processes share
    /// counts once.
    pub(super) fn memory(&self) -> Result<u64> {
        let memory = |pid| {
            let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"));
            // The process may have ended meanwhile.
            text.ok().and_then(|text| field(&text, "Pss:")).unwrap_or(0) * 1024
        };
        Ok(self.processes()?.into_iter().map(memory).sum())
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        // Workers are not our children, and outlive their masters.
        if matches!(self.running, Running::Peer(_)) {
            self.processes().unwrap_or_default().into_iter().for_each(kill);
        }
    }
}

/// Kills `pid`, a process in the subject's namespace. All processes there belong to the subject.
fn kill(pid: libc::pid_t) {
    // SAFETY: kill takes two integers. The process may have ended, which is fine.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

impl Peer {
    fn start(
        lane: &Lane,
        programs: &Programs,
        directory: PathBuf,
        config: &str,
        event: Event,
    ) -> Result<Self> {
        let mut peer = Self {
            kind: lane.kind,
            program: programs.of(lane.kind).context("no program")?.to_owned(),
            directory,
            limited: event == Event::Reload,
            base_id: std::process::id(),
            epoch: 0,
            processes: Vec::new(),
        };
        let (file, config) = (peer.file(), peer.reloadable(config));
        fs::write(&file, config).with_context(|| format!("cannot write {}", file.display()))?;
        peer.spawn(lane)?;
        Ok(peer)
    }

    fn file(&self) -> PathBuf {
        // Envoy tells the format by the extension.
        self.directory.join(format!("{}.yaml", self.kind))
    }

    /// The benchmark's configuration, with what the subject needs for reloads.
    fn reloadable(&self, config: &str) -> String {
        let directory = self.directory.display();
        let limit = |line: &str| if self.limited { line.to_owned() } else { String::new() };
        match self.kind {
            // The new process receives the listening sockets of the old one.
            Kind::Haproxy => {
                let socket = format!("stats socket {directory}/haproxy.sock level admin expose-fd listeners");
                let limit = limit(&format!("    hard-stop-after {LIMIT}s\n"));
                config.replacen("global\n", &format!("global\n    {socket}\n{limit}"), 1)
            }
            Kind::Nginx => limit(&format!("worker_shutdown_timeout {LIMIT}s;\n")) + config,
            _ => config.to_owned(),
        }
    }

    fn spawn(&mut self, lane: &Lane) -> Result<()> {
        let mut command: Command = quiet(&self.program);
        match self.kind {
            Kind::Haproxy => command.args(["-W", "-f"]),
            Kind::Nginx => command.arg("-c"),
            _ => {
                let [base_id, epoch, limit, drain] =
                    [self.base_id, self.epoch, LIMIT, LIMIT - 1].map(|number| number.to_string());
                command.args(["--concurrency", "2", "--log-level", "error", "--base-id", &base_id]);
                command.args(["--restart-epoch", &epoch]);
                if self.limited {
                    command.args(["--drain-time-s", &drain, "--parent-shutdown-time-s", &limit]);
                }
                command.arg("-c")
            }
        };
        command.arg(self.file());
        let name = format!("{}-{}", self.kind, self.processes.len());
        let process = Process::start(&name, command, &self.directory, Some(&lane.netns), Orphan::Dies)?;
        self.processes.push(process);
        Ok(())
    }

    fn newest(&mut self) -> Result<&mut Process> {
        self.processes.last_mut().context("no process was started")
    }

    /// Starts the next process, which takes over. The old process continues with its streams.
    fn reload(&mut self, lane: &Lane) -> Result<()> {
        match self.kind {
            Kind::Haproxy => self.newest()?.signal(libc::SIGUSR2),
            Kind::Nginx => self.newest()?.signal(libc::SIGHUP),
            _ => {
                self.epoch += 1;
                self.spawn(lane)
            }
        }
    }

    /// Waits until the last process has ended, then starts the next one.
    fn start_again(&mut self, lane: &Lane) -> Result<()> {
        self.newest()?.wait(ENDS_WITHIN)?;
        self.epoch = 0;
        self.spawn(lane)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if self.kind == Kind::Envoy {
            // The kernel keeps this file when the processes are killed.
            fs::remove_file(format!("/dev/shm/envoy_shared_memory_{}", self.base_id * 10)).ok();
        }
    }
}
