//! The subjects: the direct connection, Steer on each of its paths, and the other proxies. Each is
//! a running process in its lane, configured as its own manual recommends.

pub(crate) mod config;

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use steer_tests::eventually::eventually;
use steer_tests::process::{Orphan, Process, quiet};
use steer_tests::sockets::{self, State};
use steer_tests::steer::{self, Steer};

use crate::lanes::{LISTEN_PORT, Lane, Lanes};
use crate::spec::{Load, Work};

const READY_WITHIN: Duration = Duration::from_secs(30);
/// The time in which the streams of a run have to end: 5,000 streams, on a machine that has other
/// work, too.
const QUIET_WITHIN: Duration = Duration::from_secs(30);
const STOPS_WITHIN: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Direct,
    SteerPacket,
    SteerSockmap,
    SteerRelay,
    Haproxy,
    Nginx,
    Envoy,
}

impl Kind {
    /// The order of the rounds and of the tables.
    pub(crate) const ALL: [Self; 7] = [
        Self::Direct,
        Self::SteerPacket,
        Self::SteerSockmap,
        Self::SteerRelay,
        Self::Haproxy,
        Self::Nginx,
        Self::Envoy,
    ];

    /// The name in results and on the command line.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::SteerPacket => "steer-packet",
            Self::SteerSockmap => "steer-sockmap",
            Self::SteerRelay => "steer-relay",
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
            Self::Envoy => "envoy",
        }
    }

    /// The kind with this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// The value for Steer's `--splice`.
    pub(crate) const fn splice(self) -> Option<&'static str> {
        match self {
            Self::SteerPacket => Some("packet"),
            Self::SteerSockmap => Some("sockmap"),
            Self::SteerRelay => Some("relay"),
            _ => None,
        }
    }

    pub(crate) const fn is_steer(self) -> bool {
        self.splice().is_some()
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// The paths of the programs.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    steer: PathBuf,
    haproxy: PathBuf,
    nginx: PathBuf,
    envoy: PathBuf,
}

impl Programs {
    /// Finds Steer and Envoy by the variables that `cargo xtask bench` sets (`STEER_BIN`,
    /// `STEER_ENVOY_BIN`), the others on the `PATH`.
    pub(crate) fn find() -> Result<Self> {
        Ok(Self {
            steer: steer::binary()?,
            haproxy: "haproxy".into(),
            nginx: "nginx".into(),
            envoy: std::env::var_os("STEER_ENVOY_BIN").map_or_else(|| "envoy".into(), PathBuf::from),
        })
    }

    /// The program of this kind. `None` for the direct connection.
    pub(crate) fn of(&self, kind: Kind) -> Option<&Path> {
        match kind {
            Kind::Direct => None,
            Kind::Haproxy => Some(&self.haproxy),
            Kind::Nginx => Some(&self.nginx),
            Kind::Envoy => Some(&self.envoy),
            Kind::SteerPacket | Kind::SteerSockmap | Kind::SteerRelay => Some(&self.steer),
        }
    }

    /// The version that the program of this kind prints. `None` for the direct connection.
    pub(crate) fn version(&self, kind: Kind) -> Result<Option<String>> {
        let Some(program) = self.of(kind) else { return Ok(None) };
        let argument = if matches!(kind, Kind::Haproxy | Kind::Nginx) { "-v" } else { "--version" };
        let output = Command::new(program).arg(argument).output();
        let output = output.with_context(|| format!("cannot run {}", program.display()))?;
        // nginx prints its version on standard error.
        let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let line = text.iter().flat_map(|text| text.lines()).find(|line| !line.trim().is_empty());
        // Envoy prints its own path first, which means nothing on another machine.
        let own_path = format!("{}/", program.parent().unwrap_or(program).display());
        line.map(|line| Some(line.trim().replace(&own_path, "")))
            .with_context(|| format!("{kind} does not tell its version"))
    }
}

/// A running subject that accepts connections. It ends when the guard is dropped.
#[derive(Debug)]
pub(crate) struct Subject<'n> {
    lane: &'n Lane,
    config: String,
    running: Running<'n>,
}

#[derive(Debug)]
enum Running<'n> {
    Direct,
    Steer(Steer<'n>),
    Peer(Process),
}

impl<'n> Subject<'n> {
    /// Starts the subject in its lane, and waits until it accepts connections.
    ///
    /// Call it from a thread that lives as long as the subject: see [`Orphan::Dies`].
    pub(crate) fn start(kind: Kind, lanes: &'n Lanes, programs: &Programs) -> Result<Self> {
        let lane = lanes.of(kind)?;
        let directory = lanes.directory().join(kind.name());
        fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
        let config = config::of(lane, &directory);
        // Envoy tells the format by the extension.
        let file = directory.join(format!("{kind}.yaml"));
        let write = || fs::write(&file, &config).with_context(|| format!("cannot write {}", file.display()));
        let peer = |mut command: Command| {
            write()?;
            command.arg(&file);
            Process::start(kind.name(), command, &directory, Some(&lane.netns), Orphan::Dies)
        };
        let command = |program: &PathBuf, args: &[&str]| {
            let mut command = quiet(program);
            command.args(args);
            command
        };
        let running = match (kind, kind.splice()) {
            (Kind::Haproxy, _) => Running::Peer(peer(command(&programs.haproxy, &["-db", "-f"]))?),
            (Kind::Nginx, _) => Running::Peer(peer(command(&programs.nginx, &["-c"]))?),
            (Kind::Envoy, _) => {
                let args = ["--concurrency", "2", "--log-level", "error", "--disable-hot-restart", "-c"];
                Running::Peer(peer(command(&programs.envoy, &args))?)
            }
            (_, Some(splice)) => {
                // The line about the end of each stream is an access log, which no peer writes here.
                let (binary, args) = (&programs.steer, ["--splice", splice, "--log-level", "warn"]);
                let netns = Some(&lane.netns);
                Running::Steer(Steer::start_at(binary, &directory, &config, netns, &args, Orphan::Dies)?)
            }
            (_, None) => Running::Direct,
        };
        let mut subject = Self { lane, config, running };
        subject.wait_until_ready(lanes)?;
        Ok(subject)
    }

    fn wait_until_ready(&mut self, lanes: &Lanes) -> Result<()> {
        let targets = self.lane.targets();
        eventually(&format!("readiness of {}", self.kind()), READY_WITHIN, || {
            self.ensure_running()?;
            let connects = || targets.iter().all(|target| TcpStream::connect(target).is_ok());
            Ok(lanes.clients.run(connects)?.then_some(()))
        })
    }

    pub(crate) fn kind(&self) -> Kind {
        self.lane.kind
    }

    pub(crate) fn lane(&self) -> &'n Lane {
        self.lane
    }

    /// The text of its configuration.
    pub(crate) fn config(&self) -> &str {
        &self.config
    }

    /// The subject's processes. None for the direct connection.
    pub(crate) fn pids(&self) -> Result<Vec<u32>> {
        match &self.running {
            Running::Direct => Ok(Vec::new()),
            Running::Steer(steer) => Ok(vec![steer.pid()]),
            Running::Peer(process) => {
                let pid = process.pid();
                // nginx' workers are children of its master.
                let path = format!("/proc/{pid}/task/{pid}/children");
                let children = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
                let children = children.split_whitespace().map(|child| child.parse().context("a process id"));
                std::iter::once(Ok(pid)).chain(children).collect()
            }
        }
    }

    /// Steer, if the subject is Steer, for its metrics.
    pub(crate) fn steer(&self) -> Option<&Steer<'n>> {
        match &self.running {
            Running::Steer(steer) => Some(steer),
            Running::Direct | Running::Peer(_) => None,
        }
    }

    /// A load on this subject.
    pub(crate) fn load(&self, work: Work, warm_up: Duration, span: Duration) -> Result<Load> {
        let milliseconds = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        Ok(Load {
            targets: self.lane.targets(),
            warm_up_ms: milliseconds(warm_up),
            span_ms: milliseconds(span),
            watched: self.pids()?,
            work,
        })
    }

    /// # Errors
    /// When the subject has ended; the error has its last output.
    pub(crate) fn ensure_running(&mut self) -> Result<()> {
        match &mut self.running {
            Running::Direct => Ok(()),
            Running::Steer(steer) => steer.process().ensure_running(),
            Running::Peer(process) => process.ensure_running(),
        }
    }

    /// Waits until the connections of the last run have ended, so that their end does not slow down
    /// the next run.
    pub(crate) fn wait_until_quiet(&self, lanes: &Lanes) -> Result<()> {
        eventually(&format!("end of the streams of {}", self.kind()), QUIET_WITHIN, || {
            let spliced = self.steer().map(|steer| steer.metric("steer_streams", &[])).transpose()?;
            if spliced.is_some_and(|streams| streams > 0.0) {
                return Ok(None);
            }
            Ok((self.connections(lanes)? == 0).then_some(()))
        })
    }

    /// The number of sockets to which clients are connected: the proxy's, or the endpoint's own.
    fn connections(&self, lanes: &Lanes) -> Result<usize> {
        let (netns, ip) = match self.kind() {
            Kind::Direct => (&lanes.endpoint, self.lane.server()),
            _ => (&self.lane.netns, self.lane.front()),
        };
        let sockets = netns.run(sockets::tcp)??;
        let direct = self.kind() == Kind::Direct;
        let is_clients = |socket: &&sockets::Tuple| {
            socket.state == State::Connection
                && socket.local.ip() == ip
                && (direct || socket.local.port() == LISTEN_PORT)
        };
        Ok(sockets.iter().filter(is_clients).count())
    }
}

impl Drop for Subject<'_> {
    fn drop(&mut self) {
        // SIGKILL to nginx' master would leave its workers running. The master ends its workers if
        // it is told to stop.
        if let (Kind::Nginx, Running::Peer(process)) = (self.kind(), &mut self.running) {
            let ended = process.signal(libc::SIGTERM).and_then(|()| process.wait(STOPS_WITHIN));
            if let Err(error) = ended {
                eprintln!("nginx does not stop: {error:#}");
            }
        }
    }
}
