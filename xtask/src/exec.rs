//! Runs other programs. Prints each command, and names the command in errors.

use std::env;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// How often a silent step shows that it is still running.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// The top of the repository.
pub(crate) fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_owned()
}

/// Where cargo builds, and where everything that the tasks make is kept.
pub(crate) fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |path| root().join(path))
}

/// The cargo that runs us, at the top of the repository.
pub(crate) fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root());
    command
}

/// Announces a step of a task.
pub(crate) fn step(text: &str) {
    println!("\n==> {text}");
}

/// Runs `command` with its output in sight.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    println!("    {}", line(command));
    let status = command.status().with_context(|| format!("cannot run `{}`", line(command)))?;
    anyhow::ensure!(status.success(), "`{}` failed ({status})", line(command));
    Ok(())
}

/// Runs `command` and shows only how long it takes, or, if it fails, what it said.
pub(crate) fn run_quietly(command: &mut Command) -> Result<()> {
    print!("    {} ", line(command));
    show();
    let begin = Instant::now();
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run `{}`", line(command)))?;
    let (sender, ended) = channel();
    thread::spawn(move || sender.send(child.wait_with_output()));
    let output = loop {
        match ended.recv_timeout(HEARTBEAT) {
            Ok(output) => break output.with_context(|| format!("cannot wait for `{}`", line(command)))?,
            Err(RecvTimeoutError::Timeout) => {
                print!("... {} s ", begin.elapsed().as_secs());
                show();
            }
            Err(RecvTimeoutError::Disconnected) => anyhow::bail!("lost sight of `{}`", line(command)),
        }
    };
    println!("({:.1} s)", begin.elapsed().as_secs_f64());
    anyhow::ensure!(
        output.status.success(),
        "`{}` failed ({}):\n{}{}",
        line(command),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    Ok(())
}

/// Shows what is printed of a line that has not ended yet.
fn show() {
    // The step goes on even if nobody can see how far it is.
    std::io::stdout().flush().ok();
}

/// What `command` prints on standard output, if it can be run and succeeds.
pub(crate) fn answer(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
