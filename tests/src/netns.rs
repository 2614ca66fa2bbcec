//! Network namespaces that are removed with their owner.
//!
//! A namespace belongs to a thread, not to a process. A tokio worker that was started elsewhere
//! stays in its own namespace. So there are only two ways into a namespace: [`NetNs::enter`] for a
//! child process, and [`NetNs::run`] for a closure on a new thread (use a current-thread runtime
//! inside).

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::{fs, io, thread};

use anyhow::{Context as _, Result};

/// The directory in which iproute2 keeps the names of namespaces.
const DIRECTORY: &str = "/run/netns";

/// A namespace with its loopback up. Its name is `PREFIX-PID-NUMBER-ROLE`, where PID is the id of
/// this process. By the PID, [`remove_leftovers`] finds what a crashed run has left.
#[derive(Debug)]
pub struct NetNs {
    name: String,
    handle: File,
    keep: bool,
}

impl NetNs {
    /// # Errors
    /// When the process is not root, or iproute2 is missing.
    pub fn new(prefix: &str, role: &str) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{prefix}-{}-{number}-{role}", std::process::id());
        ip(&["netns", "add", &name])?;
        let handle = match File::open(path_of(&name)) {
            Ok(handle) => handle,
            Err(error) => {
                delete(&name);
                return Err(error).with_context(|| format!("cannot open the new namespace {name}"));
            }
        };
        let netns = Self { name, handle, keep: false };
        netns.ip(&["link", "set", "lo", "up"])?;
        Ok(netns)
    }

    /// The name for `ip netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip ARGS` in the namespace.
    ///
    /// # Errors
    /// When the command fails; the error has the command line and its output.
    pub fn ip(&self, args: &[&str]) -> Result<()> {
        ip(&[&["-n", &self.name], args].concat())
    }

    /// Runs `tc ARGS` in the namespace.
    ///
    /// # Errors
    /// When the command fails; the error has the command line and its output.
    pub fn tc(&self, args: &[&str]) -> Result<()> {
        succeed("tc", &[&["-n", &self.name], args].concat())
    }

    /// The index of a device.
    pub fn index_of(&self, device: &str) -> Result<u32> {
        let name = std::ffi::CString::new(device).context("a device's name")?;
        // SAFETY: the pointer is to a string that lives until the end of the call.
        let index = self.run(|| unsafe { libc::if_nametoindex(name.as_ptr()) })?;
        anyhow::ensure!(index != 0, "{} has no device {device}", self.name);
        Ok(index)
    }

    /// Makes the child that `command` will start run in this namespace.
    pub fn enter(&self, command: &mut Command) -> Result<()> {
        let handle = self.handle.try_clone().context("cannot duplicate a namespace's descriptor")?;
        // SAFETY: between fork and exec only the system call setns is made. The closure owns its
        // descriptor and allocates nothing.
        unsafe { command.pre_exec(move || set_netns(&handle)) };
        Ok(())
    }

    /// Runs `work` in this namespace, on a new thread, and returns its result. A panic in `work`
    /// continues in the caller.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let entered = thread::scope(|scope| {
            let inside = scope.spawn(|| set_netns(&self.handle).map(|()| work()));
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        entered.with_context(|| format!("cannot enter the namespace {}", self.name))
    }

    /// Writes a setting of this namespace, such as `net.ipv4.tcp_sack`.
    ///
    /// # Errors
    /// When there is no such setting, or the setting refuses `value`.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(name.replace('.', "/"));
        // The thread that opens the file decides whose setting it is.
        let written = self.run(|| fs::write(&path, value))?;
        written.with_context(|| format!("cannot set {name} to {value} in {}", self.name))
    }

    /// Makes senders cut data into single segments before it leaves by `device`. So the programs on
    /// the path see each segment, and not packets of up to 64 KiB.
    pub fn without_super_packets(&self, device: &str) -> Result<()> {
        self.ip(&["link", "set", device, "gso_max_segs", "1"])
    }

    /// Makes one processor receive all packets of a connection that arrive at `device` (receive
    /// packet steering), as a network card does. A veth device by itself hands a packet to the
    /// processor that sends it. So packets overtake each other when their sender's thread moves.
    ///
    /// The processor follows from a number of the sender's socket. The sockets of this namespace
    /// keep their numbers from now on.
    pub fn receive_in_order(&self, device: &str) -> Result<()> {
        // A group of 32 bits may use at most 32 processors. That is enough.
        let processors = thread::available_parallelism().map_or(1, usize::from).min(32);
        let mask = u32::MAX >> (32 - processors);
        let file = format!("/sys/class/net/{device}/queues/rx-0/rps_cpus");
        // `ip netns exec` mounts the /sys of the namespace.
        ip(&["netns", "exec", &self.name, "sh", "-c", &format!("echo {mask:x} > {file}")])?;
        self.sysctl("net.core.txrehash", "0")
    }

    /// Keeps the namespace when the guard is dropped.
    pub fn keep(&mut self) {
        self.keep = true;
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        if !self.keep {
            delete(&self.name);
        }
    }
}

/// Removes the namespaces whose names begin with `prefix` and whose makers do not exist any more.
/// Kills all processes that still run in them. Returns the names.
pub fn remove_leftovers(prefix: &str) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    let entries = match fs::read_dir(DIRECTORY) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(removed),
        Err(error) => return Err(error).with_context(|| format!("cannot list {DIRECTORY}")),
    };
    for entry in entries {
        let name = entry.with_context(|| format!("cannot list {DIRECTORY}"))?.file_name();
        let Some(name) = name.to_str() else { continue };
        if maker_of(prefix, name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            for pid in processes_in(name)? {
                // SAFETY: kill takes two integers. The process may have ended, which is fine.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
            delete(name);
            removed.push(name.to_owned());
        }
    }
    removed.sort();
    Ok(removed)
}

/// The PID in a name that [`NetNs::new`] made with this prefix.
fn maker_of(prefix: &str, name: &str) -> Option<u32> {
    name.strip_prefix(prefix)?.strip_prefix('-')?.split('-').next()?.parse().ok()
}

/// The processes that run in a namespace.
pub fn processes_in(name: &str) -> Result<Vec<libc::pid_t>> {
    let output = Command::new("ip").args(["netns", "pids", name]).output().context("cannot run ip")?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.split_whitespace().map(|pid| pid.parse().context("ip netns pids printed no number")).collect()
}

/// Moves the calling thread into a namespace. Makes one system call and allocates nothing, so it
/// may run after fork.
fn set_netns(handle: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `handle` is borrowed.
    match unsafe { libc::setns(handle.as_raw_fd(), libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn path_of(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

fn delete(name: &str) {
    if let Err(error) = ip(&["netns", "del", name]) {
        eprintln!("cannot remove the namespace {name}: {error:#}");
    }
}

/// Runs `ip ARGS` in the caller's namespace.
///
/// # Errors
/// When the command fails; the error has the command line and its output.
pub fn ip(args: &[&str]) -> Result<()> {
    succeed("ip", args)
}

fn succeed(program: &str, args: &[&str]) -> Result<()> {
    let line = format!("{program} {}", args.join(" "));
    let output = Command::new(program).args(args).output().with_context(|| format!("cannot run `{line}`"))?;
    anyhow::ensure!(
        output.status.success(),
        "`{line}` failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn the_maker_is_read_from_the_name_only_under_its_prefix() {
        assert_eq!(maker_of("steer-t", "steer-t-4711-0-proxy"), Some(4711));
        assert_eq!(maker_of("steer-t", "steer-tall-4711-0-proxy"), None);
        assert_eq!(maker_of("steer-t", "steer-t-x"), None);
        assert_eq!(maker_of("steer-t", "other"), None);
    }

    #[test]
    fn a_namespace_has_its_own_loopback_and_goes_away() {
        if !crate::require::root() {
            return;
        }
        let netns = NetNs::new("steer-t", "unit").unwrap();
        let name = netns.name().to_owned();
        let listener = netns.run(|| TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        assert!(netns.run(|| TcpStream::connect(address).is_ok()).unwrap());
        assert!(TcpStream::connect(address).is_err(), "the listener can be reached from outside");
        let mut child = Command::new("cat");
        child.args(["/proc/net/dev"]);
        netns.enter(&mut child).unwrap();
        let devices = String::from_utf8(child.output().unwrap().stdout).unwrap();
        assert!(devices.contains("lo:") && !devices.contains("eth0"), "{devices}");
        drop(netns);
        assert!(!path_of(&name).exists());
    }
}
