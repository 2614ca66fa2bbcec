//! The successor: the process that this process starts after a SIGUSR2, to take over.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;
use std::process::ExitStatus;

use tokio::process::{Child, Command};

use crate::systemd;

/// What the kernel appends to the path of a deleted file.
const DELETED: &[u8] = b" (deleted)";

/// A process that was started to take over.
pub(super) struct Successor(Option<Child>);

impl Successor {
    pub(super) fn none() -> Self {
        Self(None)
    }

    /// Starts the binary that is now at the path of this process' binary, with the same arguments
    /// and `--takeover`.
    ///
    /// # Errors
    /// There is no binary at that path, or it cannot be run.
    pub(super) fn start(&mut self) -> io::Result<u32> {
        let mut command = Command::new(own_path()?);
        command.args(with_takeover(env::args_os().skip(1)));
        for variable in systemd::LISTEN_VARIABLES {
            command.env_remove(variable);
        }
        let child = command.spawn()?;
        let pid = child.id().unwrap_or_default();
        self.0 = Some(child);
        Ok(pid)
    }

    /// Whether a successor was started that [`ended`](Self::ended) has not yet reported.
    pub(super) fn is_running(&self) -> bool {
        self.0.is_some()
    }

    /// Returns when the successor has ended; never if there is none.
    pub(super) async fn ended(&mut self) -> io::Result<ExitStatus> {
        let Some(child) = &mut self.0 else { return std::future::pending().await };
        let ended = child.wait().await;
        self.0 = None;
        ended
    }
}

/// The path at which this process' binary was when the process started. After the upgrade of a
/// package, another binary is at this path.
fn own_path() -> io::Result<PathBuf> {
    let path = fs::read_link("/proc/self/exe")?.into_os_string();
    let path = path.as_bytes().strip_suffix(DELETED).unwrap_or(path.as_bytes());
    Ok(OsString::from_vec(path.to_vec()).into())
}

fn with_takeover(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut args: Vec<_> = args.collect();
    if !args.iter().any(|arg| arg == "--takeover") {
        args.push("--takeover".into());
    }
    args
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_is_there_once() {
        let args = |list: &[&str]| with_takeover(list.iter().map(OsString::from));
        let expected: Vec<OsString> = ["run", "-c", "a.yaml", "--takeover"].map(Into::into).into();
        assert_eq!(args(&["run", "-c", "a.yaml"]), expected);
        assert_eq!(args(&["run", "-c", "a.yaml", "--takeover"]), expected);
    }
}
