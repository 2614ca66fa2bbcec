//! A running `steer`, as an operator runs it: the binary, a config file, the admin listener.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context as _, Result};
use serde_json::Value;
use tempfile::TempDir;

use crate::eventually::eventually;
use crate::instance::Instance;
use crate::netns::NetNs;
use crate::process::{Orphan, Process, quiet};
use crate::require::skip;

/// The longest time from the start until `/readyz` answers 200. Building large rings takes long on
/// a shared machine, and an emulated kernel on a busy machine needs half a minute to verify the
/// programs.
const READY_WITHIN: Duration = Duration::from_secs(90);
const ADMIN_TIMEOUT: Duration = Duration::from_secs(5);

/// The binary under test: `STEER_BIN`, which `cargo xtask test` sets. Without it, the newest build.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = env::var_os("STEER_BIN") {
        return Ok(path.into());
    }
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    let built = ["release", "debug"].map(|profile| target.join(profile).join("steer"));
    let newest = built
        .into_iter()
        .filter_map(|path| Some((path.metadata().ok()?.modified().ok()?, path)))
        .max_by_key(|(modified, _)| *modified);
    newest.map(|(_, path)| path).context("no steer binary: run `cargo build` or set STEER_BIN")
}

/// The binary with the feature `failpoints`. `cargo xtask test` builds it in a directory of its
/// own. `None` if it is not there.
pub fn binary_with_failpoints() -> Option<PathBuf> {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/failpoints");
    ["release", "debug"]
        .map(|profile| target.join(profile).join("steer"))
        .into_iter()
        .find(|path| path.exists())
}

/// The binary with the feature `other-layout`, which stands for another version of Steer. `cargo
/// xtask test` builds it. `None` if it is not there.
pub fn binary_with_other_layout() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/failpoints/steer-other-layout");
    path.exists().then_some(path)
}

/// How the programs of the packet splice are attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attach {
    /// By links, which Steer uses on this kernel.
    Links,
    /// By filters of the qdisc clsact, as before Linux 6.6. Only a Steer with fail points can be
    /// told to use them.
    Filters,
}

impl Attach {
    /// The ways that can be tested: both, if there is a Steer with fail points.
    pub fn all() -> Vec<Self> {
        let filters = binary_with_failpoints().map(|_| Self::Filters);
        if filters.is_none() {
            skip("filters of clsact need a steer with fail points, which `cargo xtask test` builds");
        }
        std::iter::once(Self::Links).chain(filters).collect()
    }

    /// The binary under test.
    pub fn binary(self) -> Result<PathBuf> {
        match self {
            Self::Links => binary(),
            Self::Filters => binary_with_failpoints().context("there is no steer with fail points"),
        }
    }
}

/// A running `steer run` that is ready. It ends when the guard is dropped. It has its own instance,
/// so that no other Steer on this machine finds its pins.
#[derive(Debug)]
pub struct Steer<'n> {
    process: Process,
    // A field after the process, so that it is dropped after the process.
    instance: Instance,
    launch: Box<Launch>,
    netns: Option<&'n NetNs>,
    _directory: Option<TempDir>,
}

/// How to start the process, also repeatedly.
#[derive(Debug)]
struct Launch {
    /// A command that receives the binary and its arguments. Empty if there is none.
    wrapper: Vec<String>,
    binary: PathBuf,
    directory: PathBuf,
    config: PathBuf,
    admin: SocketAddr,
    args: Vec<String>,
    dies_at: Option<String>,
    attach: Attach,
    orphan: Orphan,
    times: u32,
}

impl Launch {
    fn new(
        binary: &Path,
        directory: &Path,
        config: &str,
        netns: Option<&NetNs>,
        args: &[&str],
        orphan: Orphan,
    ) -> Result<Self> {
        let file = directory.join("steer.yaml");
        fs::write(&file, config).with_context(|| format!("cannot write {}", file.display()))?;
        Ok(Self {
            wrapper: Vec::new(),
            binary: binary.to_owned(),
            directory: directory.to_owned(),
            config: file,
            admin: inside(netns, free_address)??,
            dies_at: None,
            attach: Attach::Links,
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            orphan,
            times: 0,
        })
    }

    fn start(&mut self, instance: &str, netns: Option<&NetNs>, more: &[&str]) -> Result<Process> {
        let mut command = wrapped(&self.wrapper, &self.binary);
        command.args(["run", "-c"]).arg(&self.config).arg("--admin").arg(self.admin.to_string());
        command.args(["--instance", instance]).args(&self.args).args(more);
        if let Some(place) = self.dies_at.take() {
            command.env("STEER_DIE_AT", place);
        }
        if self.attach == Attach::Filters {
            command.env("STEER_ALSO", "attach filters");
        }
        self.times += 1;
        let name = if self.times == 1 { "steer".to_owned() } else { format!("steer-{}", self.times) };
        Process::start(&name, command, &self.directory, netns, self.orphan)
    }
}

impl<'n> Steer<'n> {
    /// Starts `steer run -c FILE ARGS` in `netns` (or in the caller's namespace), and waits until
    /// it is ready. FILE holds `config` with another admin address.
    ///
    /// Call it from the test's own thread: see [`Orphan::Dies`].
    pub fn start(config: &str, netns: Option<&'n NetNs>, args: &[&str]) -> Result<Self> {
        Self::start_attaching(Attach::Links, config, netns, args)
    }

    /// The same, but attaches the programs by `attach`. Each later process does so, too.
    pub fn start_attaching(
        attach: Attach,
        config: &str,
        netns: Option<&'n NetNs>,
        args: &[&str],
    ) -> Result<Self> {
        let directory = tempfile::tempdir().context("cannot make a directory")?;
        let launch = Launch::new(&attach.binary()?, directory.path(), config, netns, args, Orphan::Dies)?;
        let mut steer = Self::launch(Launch { attach, ..launch }, netns)?;
        steer._directory = Some(directory);
        Ok(steer)
    }

    /// The same, but `wrapper` runs the binary. `wrapper` is a command that replaces itself with
    /// its arguments, as `setpriv` and `unshare` do. Each later process is started so, too.
    pub fn start_wrapped(wrapper: &[String], config: &str, netns: Option<&'n NetNs>) -> Result<Self> {
        let directory = tempfile::tempdir().context("cannot make a directory")?;
        let launch = Launch::new(&binary()?, directory.path(), config, netns, &[], Orphan::Dies)?;
        let mut steer = Self::launch(Launch { wrapper: wrapper.to_vec(), ..launch }, netns)?;
        steer._directory = Some(directory);
        Ok(steer)
    }

    /// The same with this binary, and with the config file and the logs in `directory`.
    pub fn start_at(
        binary: &Path,
        directory: &Path,
        config: &str,
        netns: Option<&'n NetNs>,
        args: &[&str],
        orphan: Orphan,
    ) -> Result<Self> {
        Self::launch(Launch::new(binary, directory, config, netns, args, orphan)?, netns)
    }

    fn launch(launch: Launch, netns: Option<&'n NetNs>) -> Result<Self> {
        let mut launch = Box::new(launch);
        let instance = Instance::new()?;
        let process = launch.start(instance.name(), netns, &[])?;
        let mut steer = Self { process, instance, launch, netns, _directory: None };
        steer.wait_until_ready()?;
        Ok(steer)
    }

    /// Waits until `/readyz` answers 200.
    ///
    /// # Errors
    /// When the process ends, or takes too long.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        let ready = eventually("readiness of steer", READY_WITHIN, || {
            self.process.ensure_running()?;
            Ok(self.admin_get("/readyz").ok().filter(|answer| answer.status == 200))
        });
        ready.map(drop).with_context(|| self.process.tail())
    }

    /// Sends the process `signal` (of `libc::SIG*`) and waits for its end. Then starts another
    /// process of the same instance with the same configuration, and returns when that process is
    /// ready. SIGKILL is like a crash.
    pub fn restart(&mut self, signal: libc::c_int) -> Result<()> {
        self.stop(signal)?;
        self.start_again()
    }

    /// Sends the process `signal` and waits for its end.
    pub fn stop(&mut self, signal: libc::c_int) -> Result<ExitStatus> {
        self.process.signal(signal)?;
        self.process.wait(READY_WITHIN)
    }

    /// Starts the process after it has [ended](Self::stop), and returns when it is ready.
    pub fn start_again(&mut self) -> Result<()> {
        self.process = self.launch.start(self.instance.name(), self.netns, &[])?;
        self.wait_until_ready()
    }

    /// The same, but with another binary from now on.
    pub fn start_again_as(&mut self, binary: &Path) -> Result<()> {
        binary.clone_into(&mut self.launch.binary);
        self.start_again()
    }

    /// Starts another process of the instance with `--takeover`, and returns when that process has
    /// taken over. From then on, `self` is the new process. Returns the old one.
    pub fn take_over(&mut self) -> Result<Process> {
        let successor = self.successor(None)?;
        let before = std::mem::replace(&mut self.process, successor);
        let ready = eventually("a process that took over", READY_WITHIN, || {
            self.process.ensure_running()?;
            Ok(self.process.stderr()?.contains("took over; ").then_some(()))
        });
        ready.with_context(|| self.process.tail())?;
        self.wait_until_ready()?;
        Ok(before)
    }

    /// Starts another process of the instance with `--takeover`, and does not wait. With `dies_at`,
    /// the process runs this binary and dies when it reaches this fail point.
    pub fn successor(&mut self, dies_at: Option<(&str, &Path)>) -> Result<Process> {
        self.launch.dies_at = dies_at.map(|(place, _)| place.to_owned());
        let binary = dies_at.map_or_else(|| self.launch.binary.clone(), |(_, binary)| binary.to_owned());
        let usual = std::mem::replace(&mut self.launch.binary, binary);
        let started = self.launch.start(self.instance.name(), self.netns, &["--takeover"]);
        self.launch.binary = usual;
        started
    }

    /// Makes `process`, which has taken over, the process of `self`. Returns the old one.
    pub fn replace(&mut self, process: Process) -> Process {
        std::mem::replace(&mut self.process, process)
    }

    /// Starts the process with the binary that has fail points. The process dies when it reaches
    /// the fail point `place`.
    pub fn start_again_to_die_at(&mut self, place: &str, binary: &Path) -> Result<()> {
        self.launch.dies_at = Some(place.to_owned());
        let usual = std::mem::replace(&mut self.launch.binary, binary.to_owned());
        let started = self.start_again();
        self.launch.binary = usual;
        started
    }

    /// What the process has logged.
    pub fn said(&self) -> Result<String> {
        self.process.stderr()
    }

    /// How the process attaches its programs.
    pub fn attach(&self) -> Attach {
        self.launch.attach
    }

    /// The name of the process' instance.
    pub fn instance(&self) -> &str {
        self.instance.name()
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The process, for its logs, its signals and its end.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// The path of the config file.
    pub fn config(&self) -> &Path {
        &self.launch.config
    }

    /// The address of the admin listener, which is inside the namespace.
    pub fn admin(&self) -> SocketAddr {
        self.launch.admin
    }

    /// Sends a GET to the admin listener.
    pub fn admin_get(&self, path: &str) -> Result<Answer> {
        inside(self.netns, || get(self.launch.admin, path))?
            .with_context(|| format!("GET {path} on the admin listener {}", self.launch.admin))
    }

    /// The rows of `/flows`.
    pub fn flows(&self) -> Result<Vec<Value>> {
        let body = self.admin_get("/flows")?.body;
        serde_json::from_str(&body).with_context(|| format!("/flows is not a JSON array: {body}"))
    }

    /// The sum of all series of `metric` in `/metrics` that have all of `labels`. 0 if there is
    /// none.
    pub fn metric(&self, metric: &str, labels: &[(&str, &str)]) -> Result<f64> {
        Ok(sum_of(&self.admin_get("/metrics")?.body, metric, labels))
    }
}

/// A command for `program`. `wrapper` runs it if there is one.
pub fn wrapped(wrapper: &[String], program: &Path) -> Command {
    let Some((first, more)) = wrapper.split_first() else { return quiet(program) };
    let mut command = quiet(first);
    command.args(more).arg(program);
    command
}

/// The answers of `steer route -c CONFIG --batch -` to `requests`, in order.
pub fn route(binary: &Path, config: &Path, requests: &[Value]) -> Result<Vec<Value>> {
    let mut command = Command::new(binary);
    command.args(["route", "-c"]).arg(config).args(["--batch", "-"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {command:?}"))?;
    let lines: String = requests.iter().map(|request| format!("{request}\n")).collect();
    let mut stdin = child.stdin.take().context("the child has no standard input")?;
    // Writes on a separate thread, because the child may answer before it has read everything.
    let writer = std::thread::spawn(move || stdin.write_all(lines.as_bytes()));
    let output = child.wait_with_output().context("cannot read the answers of steer route")?;
    let written = writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))?;
    anyhow::ensure!(output.status.success(), "steer route failed ({})", output.status);
    written.context("cannot write the requests to steer route")?;
    let answers: Vec<Value> = String::from_utf8(output.stdout)
        .context("steer route printed bytes that are not valid UTF-8")?
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("steer route printed {line}")))
        .collect::<Result<_>>()?;
    anyhow::ensure!(
        answers.len() == requests.len(),
        "steer route answered {} of {} requests",
        answers.len(),
        requests.len()
    );
    Ok(answers)
}

/// The answer of an HTTP server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub body: String,
}

/// A GET with minimal HTTP, only for admin listeners (Steer's and Envoy's).
pub fn get(address: SocketAddr, path: &str) -> Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&address, ADMIN_TIMEOUT).context("cannot connect")?;
    stream.set_read_timeout(Some(ADMIN_TIMEOUT)).context("cannot set a time limit")?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")
        .context("cannot send the request")?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).context("cannot read the answer")?;
    let text = String::from_utf8_lossy(&bytes);
    let (head, body) = text.split_once("\r\n\r\n").context("the answer has no head")?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.with_context(|| format!("the answer has no status: {head}"))?;
    let chunked = head.to_ascii_lowercase().contains("\r\ntransfer-encoding: chunked");
    let body = if chunked { joined_chunks(body)? } else { body.to_owned() };
    Ok(Answer { status, body })
}

/// The payload of a chunked body.
fn joined_chunks(mut body: &str) -> Result<String> {
    let mut payload = String::new();
    loop {
        let (size, rest) = body.split_once("\r\n").context("a chunk has no size")?;
        let size = usize::from_str_radix(size.trim(), 16).context("a chunk's size is not a number")?;
        if size == 0 {
            return Ok(payload);
        }
        payload.push_str(rest.get(..size).context("a chunk is cut off")?);
        body = rest.get(size + 2..).context("a chunk is cut off")?;
    }
}

/// A loopback address on which nobody listens now.
pub fn free_address() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free loopback port")?;
    listener.local_addr().context("a listener has no address")
}

fn inside<T: Send>(netns: Option<&NetNs>, work: impl FnOnce() -> T + Send) -> Result<T> {
    match netns {
        Some(netns) => netns.run(work),
        None => Ok(work()),
    }
}

fn sum_of(metrics: &str, metric: &str, labels: &[(&str, &str)]) -> f64 {
    let labels: Vec<_> = labels.iter().map(|(name, value)| format!("{name}=\"{value}\"")).collect();
    let value_of = |line: &str| {
        let (series, value) = line.rsplit_once(' ')?;
        let (name, set) = series.split_once('{').unwrap_or((series, ""));
        let set: Vec<_> = set.trim_end_matches('}').split(',').collect();
        let wanted = name == metric && labels.iter().all(|label| set.contains(&label.as_str()));
        wanted.then(|| value.parse::<f64>().ok()).flatten()
    };
    metrics
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(value_of)
        .fold(0.0, |sum, value| sum + value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_summed_by_name_and_labels() {
        let text =
            "# HELP a x\na{k=\"v\",l=\"1\"} 2\na{l=\"2\",k=\"v\"} 3\na{k=\"w\"} 5\nab{k=\"v\"} 7\nb 9\n";
        assert_eq!(sum_of(text, "a", &[("k", "v")]), 5.0);
        assert_eq!(sum_of(text, "a", &[]), 10.0);
        assert_eq!(sum_of(text, "b", &[]), 9.0);
        assert_eq!(sum_of(text, "c", &[]), 0.0);
    }

    #[test]
    fn chunks_are_joined() {
        assert_eq!(
            joined_chunks("4\r\nWiki\r\nB\r\npedia in \r\n\r\n0\r\n\r\n").unwrap(),
            "Wikipedia in \r\n"
        );
        assert!(joined_chunks("4\r\nWi").is_err());
    }
}
