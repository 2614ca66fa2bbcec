//! Child processes that end with their guard.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::eventually::eventually;
use crate::netns::NetNs;

/// How many lines from the end of a log are shown when a test fails.
const SHOWN_LINES: usize = 60;

/// A running child. Its output goes to `NAME.stdout` and `NAME.stderr` in a directory of the
/// caller. If a failing test drops the guard, the last lines of both are printed.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
    keep: bool,
}

/// What happens to a child when the thread that started it ends without dropping the guard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orphan {
    /// The kernel kills the child when the *thread* ends that started it. So never start such a
    /// child from a thread that ends early, such as a thread of `spawn_blocking` or [`NetNs::run`].
    Dies,
    Lives,
}

impl Process {
    /// Starts `command` in `netns`, or in the caller's namespace.
    pub fn start(
        name: &str,
        mut command: Command,
        logs: &Path,
        netns: Option<&NetNs>,
        orphan: Orphan,
    ) -> Result<Self> {
        let (stdout, stderr) = (logs.join(format!("{name}.stdout")), logs.join(format!("{name}.stderr")));
        let create =
            |path: &Path| File::create(path).with_context(|| format!("cannot make {}", path.display()));
        command.stdout(create(&stdout)?).stderr(create(&stderr)?);
        if let Some(netns) = netns {
            netns.enter(&mut command)?;
        }
        if orphan == Orphan::Dies {
            // SAFETY: between fork and exec only the system call prctl is made.
            unsafe { command.pre_exec(die_with_parent) };
        }
        let child = command.spawn().with_context(|| format!("cannot start {name}: {command:?}"))?;
        Ok(Self { name: name.to_owned(), child, stdout, stderr, keep: false })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The child's standard input. It can be taken once, and only if the command asked for a pipe.
    pub fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// What the child has written to standard output so far.
    pub fn stdout(&self) -> Result<String> {
        read(&self.stdout)
    }

    /// What the child has written to standard error so far.
    pub fn stderr(&self) -> Result<String> {
        read(&self.stderr)
    }

    /// # Errors
    /// When the child has ended; the error has the last lines of its output.
    pub fn ensure_running(&mut self) -> Result<()> {
        match self.child.try_wait().context("cannot ask for a child's state")? {
            None => Ok(()),
            Some(status) => anyhow::bail!("{} has ended ({status}):\n{}", self.name, self.tail()),
        }
    }

    /// Waits until the child has ended by itself.
    pub fn wait(&mut self, patience: Duration) -> Result<ExitStatus> {
        let what = format!("end of {}", self.name);
        eventually(&what, patience, || self.child.try_wait().context("cannot ask for a child's state"))
    }

    /// Sends `signal` (of `libc::SIG*`).
    pub fn signal(&self, signal: libc::c_int) -> Result<()> {
        let pid = libc::pid_t::try_from(self.pid()).context("a process id is too large")?;
        // SAFETY: kill takes two integers. Nobody has waited for the child, so the id still belongs
        // to it.
        match unsafe { libc::kill(pid, signal) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()).with_context(|| format!("cannot signal {}", self.name)),
        }
    }

    /// Leaves the child running when the guard is dropped (see also [`Orphan::Lives`]).
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// The last lines of both outputs.
    pub fn tail(&self) -> String {
        [("stdout", &self.stdout), ("stderr", &self.stderr)]
            .iter()
            .filter_map(|(which, path)| {
                let text = read(path).ok().filter(|text| !text.is_empty())?;
                let skipped = text.lines().count().saturating_sub(SHOWN_LINES);
                let lines: Vec<_> = text.lines().skip(skipped).collect();
                Some(format!("--- {} {which} (last lines)\n{}\n", self.name, lines.join("\n")))
            })
            .collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if std::thread::panicking() {
            eprintln!("{}", self.tail());
        }
        // Both calls fail only if the child has ended already, which is the goal.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Asks the kernel to kill this process when the thread that started it ends. Runs after fork.
fn die_with_parent() -> io::Result<()> {
    // SAFETY: PR_SET_PDEATHSIG takes one integer.
    match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A command without standard input. Most children need none.
pub fn quiet(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command.stdin(Stdio::null());
    command
}

fn read(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_guard_has_killed_its_child() {
        let logs = tempfile::tempdir().unwrap();
        let mut command = quiet("sleep");
        command.arg("600");
        let mut process = Process::start("sleep", command, logs.path(), None, Orphan::Dies).unwrap();
        process.ensure_running().unwrap();
        let pid = process.pid();
        drop(process);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn output_is_kept_and_shown_in_the_error() {
        let logs = tempfile::tempdir().unwrap();
        let mut command = quiet("sh");
        command.args(["-c", "echo out; echo err >&2; exit 3"]);
        let mut process = Process::start("sh", command, logs.path(), None, Orphan::Dies).unwrap();
        assert_eq!(process.wait(Duration::from_secs(10)).unwrap().code(), Some(3));
        assert_eq!((process.stdout().unwrap(), process.stderr().unwrap()), ("out\n".into(), "err\n".into()));
        let error = process.ensure_running().unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("\nerr"), "{error}");
    }
}
