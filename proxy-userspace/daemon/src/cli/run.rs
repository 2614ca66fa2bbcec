//! `steer run`: reads the arguments and the configuration, and runs the daemon.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::builder::PossibleValue;
use clap::{ArgGroup, Args, ValueEnum};
use proxy_common::instance::Instance;
use steer_policy::config::{self, Config, HashSource, SpliceMode};

use super::exit_code;
use crate::daemon;
use crate::telemetry::log;

/// Steer connections until told to stop
///
/// SIGTERM and SIGINT finish the requests in flight and end relayed streams; a second signal stops
/// at once. Streams that the kernel carries go on: the next process of the instance takes them
/// over, or `steer detach` ends them. SIGUSR2 starts the binary that is installed now, with the
/// same arguments and --takeover.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("source").required(true).args(["config", "listen"]))]
pub(super) struct Run {
    /// Configuration: native YAML, an Envoy v3 bootstrap, or Envoy v1 JSON
    #[arg(short, long, value_name = "FILE", env = "STEER_CONFIG")]
    config: Option<PathBuf>,

    /// Without a file: address to listen on
    #[arg(long, value_name = "ADDR", requires_all = ["backend", "hash"])]
    listen: Option<SocketAddr>,

    /// Without a file: the endpoints, in ring order
    #[arg(long, value_name = "ADDR", num_args = 1.., requires = "listen")]
    backend: Vec<SocketAddr>,

    /// Without a file: header:NAME, cookie:NAME, query:NAME or source-ip
    #[arg(long, value_name = "WHAT", requires = "listen")]
    hash: Option<HashSource>,

    /// The address that serves /metrics, /flows, /healthz and /readyz, or `off`; overrides the file
    #[arg(long, value_name = "ADDR")]
    admin: Option<AdminAddress>,

    /// How upgraded streams are carried; overrides the file
    #[arg(long, value_name = "MODE")]
    splice: Option<Mode>,

    /// The name under which streams outlive this process, and under which another process takes
    /// them over; overrides the file
    #[arg(long, value_name = "NAME")]
    instance: Option<Instance>,

    /// Take over the listening sockets, and the streams that the kernel carries, from the running
    /// process of the instance. That process ends when its other streams and connections have
    /// ended. If no process of the instance runs, start as usual
    #[arg(long)]
    takeover: bool,

    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log_format: log::Format,

    /// error, warn, info, debug, trace, or a filter such as info,steer::http=debug
    #[arg(long, value_name = "LEVEL", default_value = "info", env = "STEER_LOG")]
    log_level: String,
}

/// EX_CONFIG of sysexits.h: systemd calls it CONFIG, and `RestartPreventExitStatus=` of the unit
/// names it.
const BAD_CONFIGURATION: u8 = 78;

/// A [`SpliceMode`] as an argument.
#[derive(Debug, Clone, Copy)]
struct Mode(SpliceMode);

impl ValueEnum for Mode {
    fn value_variants<'a>() -> &'a [Self] {
        const MODES: [Mode; SpliceMode::ALL.len()] = {
            let [auto, packet, sockmap, relay] = SpliceMode::ALL;
            [Mode(auto), Mode(packet), Mode(sockmap), Mode(relay)]
        };
        &MODES
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let help = match self.0 {
            SpliceMode::Auto => "The packet splice where possible, else the relay",
            SpliceMode::Packet => "As auto, but do not start where the packet splice is impossible",
            SpliceMode::Sockmap => "The socket splice where possible, else the relay",
            SpliceMode::Relay => "The relay: copy in userspace",
        };
        Some(PossibleValue::new(self.0.as_str()).help(help))
    }
}

#[derive(Debug, Clone, Copy)]
struct AdminAddress(Option<SocketAddr>);

impl std::str::FromStr for AdminAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "off" {
            return Ok(Self(None));
        }
        text.parse()
            .map(|address| Self(Some(address)))
            .map_err(|error| format!("{error}: give IP:PORT, or off"))
    }
}

impl Run {
    pub(super) fn run(self) -> ExitCode {
        let log = log::init(self.log_format, &self.log_level)
            .with_context(|| format!("--log-level {:?}: try info, or debug", self.log_level));
        if log.is_err() {
            return exit_code(log);
        }
        self.introduce();
        let config = match self.config() {
            Ok(config) => config,
            Err(error) => {
                eprintln!("error: {error:#}");
                return ExitCode::from(BAD_CONFIGURATION);
            }
        };
        for warning in &config.warnings {
            tracing::warn!(line = warning.line, column = warning.column, "{}", warning.text);
        }
        tracing::info!(
            instance = %config.instance,
            listeners = config.listeners.len(),
            clusters = config.clusters.len(),
            splice = config.splice.as_str(),
            "configuration read",
        );
        exit_code(daemon::run(config, self.takeover))
    }

    /// Logs the first line: which build runs, on which kernel, with which configuration. Called
    /// before the configuration is read.
    fn introduce(&self) {
        let source = self.config.as_ref().map_or("command line".into(), |file| file.to_string_lossy());
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            commit = option_env!("STEER_COMMIT").unwrap_or("unknown"),
            kernel = %rustix::system::uname().release().to_string_lossy(),
            capabilities = steer_kernel::capability::held(),
            configuration = %source,
            "starting",
        );
    }

    fn config(&self) -> anyhow::Result<Config> {
        let mut config = match (&self.config, self.listen, &self.hash) {
            (Some(file), _, _) => config::load(file)?,
            (None, Some(listen), Some(hash)) => config::from_flags(listen, &self.backend, hash.clone()),
            (None, _, _) => {
                anyhow::bail!("give a configuration with -c FILE, or --listen, --backend and --hash")
            }
        };
        if let Some(AdminAddress(admin)) = self.admin {
            config.admin = admin;
        }
        if let Some(Mode(splice)) = self.splice {
            config.splice = splice;
        }
        if let Some(instance) = &self.instance {
            config.instance = instance.clone();
        }
        Ok(config)
    }
}
