//! Takeovers as a service manager and a package manager see them: SIGUSR2 after the binary was
//! replaced, NOTIFY_SOCKET, LISTEN_FDS.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use steer_tests::eventually::eventually;
use steer_tests::instance::Instance;
use steer_tests::process::{Orphan, Process};
use steer_tests::require;
use steer_tests::steer::{binary, get};
use steer_tests::topology::Topology;

use crate::bed::{HANG, PACKET, config, v4};

/// What was sent to the service manager so far.
fn notices(socket: &UnixDatagram) -> Vec<String> {
    let mut all = Vec::new();
    let mut buffer = [0; 512];
    while let Ok(len) = socket.recv(&mut buffer) {
        all.push(String::from_utf8_lossy(&buffer[..len]).into_owned());
    }
    all
}

/// The processes of an instance.
fn processes(instance: &str) -> Vec<u32> {
    let of_instance = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|arg| arg == instance.as_bytes())
    };
    let entries = fs::read_dir("/proc").unwrap();
    let pids = entries.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    pids.filter(of_instance).collect()
}

fn signal(pid: u32, signal: libc::c_int) {
    let pid = libc::pid_t::try_from(pid).unwrap();
    // SAFETY: kill takes two integers.
    unsafe { libc::kill(pid, signal) };
}

/// Kills the remaining processes of an instance when it is dropped.
struct Rest<'i>(&'i Instance);

impl Drop for Rest<'_> {
    fn drop(&mut self) {
        processes(self.0.name()).into_iter().for_each(|pid| signal(pid, libc::SIGKILL));
    }
}

/// Starts a Steer as systemd does: with the socket `given` as descriptor 3.
fn start(directory: &Path, topology: &Topology, instance: &str, given: &TcpListener) -> Process {
    let path = directory.join("bin");
    fs::copy(binary().unwrap(), &path).unwrap();
    fs::write(directory.join("steer.yaml"), config(v4(), PACKET)).unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"", "sh"]).arg(path);
    command.args(["run", "-c"]).arg(directory.join("steer.yaml")).args(["--instance", instance]);
    command.env("NOTIFY_SOCKET", directory.join("notify"));
    let given = given.as_raw_fd();
    // SAFETY: between fork and exec only the system calls dup2 and fcntl are made.
    unsafe { command.pre_exec(move || make_third(given)) };
    Process::start("steer", command, directory, Some(&topology.proxy), Orphan::Dies).unwrap()
}

/// Makes this descriptor number 3, and keeps it open over exec.
fn make_third(given: RawFd) -> io::Result<()> {
    // SAFETY: dup2 takes only integers.
    let made = unsafe { libc::dup2(given, 3) };
    // SAFETY: fcntl with F_SETFD takes only integers.
    if made == 3 && unsafe { libc::fcntl(3, libc::F_SETFD, 0) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[test]
fn a_service_is_given_its_sockets_and_upgraded_by_a_signal() {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let instance = Instance::new().unwrap();
    let _rest = Rest(&instance);
    let manager = UnixDatagram::bind(directory.path().join("notify")).unwrap();
    manager.set_nonblocking(true).unwrap();
    let given = topology.proxy.run(|| TcpListener::bind(v4().front).unwrap()).unwrap();
    let mut old = start(directory.path(), &topology, instance.name(), &given);
    let mut said = Vec::new();
    let mut wait_for = |what: &str| {
        eventually(what, HANG, || {
            said.extend(notices(&manager));
            Ok(said.iter().any(|notice| notice.starts_with(what)).then_some(()))
        })
        .unwrap_or_else(|error| panic!("{error:#}: {said:?}"));
        std::mem::take(&mut said)
    };
    wait_for("READY=1");
    let log = old.stderr().unwrap();
    assert!(log.contains("listener_0 listens") && log.contains("given=true"), "{log}");

    // Replaces the binary as a package manager does.
    let path = directory.path().join("bin");
    fs::copy(&path, directory.path().join("new")).unwrap();
    fs::rename(directory.path().join("new"), &path).unwrap();
    old.signal(libc::SIGUSR2).unwrap();
    let notices = wait_for("MAINPID=");
    assert!(notices.iter().any(|notice| notice.starts_with("RELOADING=1\nMONOTONIC_USEC=")), "{notices:?}");
    assert!(old.wait(HANG).unwrap().success());
    let new = processes(instance.name());
    let told = format!("MAINPID={}\nREADY=1", new[0]);
    assert!(new.len() == 1 && notices.contains(&told), "{new:?} {notices:?}");
    let runs = fs::read_link(format!("/proc/{}/exe", new[0])).unwrap();
    assert_eq!(runs, path);
    let ready = topology.proxy.run(|| get(([127, 0, 0, 1], 9901).into(), "/readyz").unwrap()).unwrap();
    assert_eq!(ready.status, 200);
    signal(new[0], libc::SIGTERM);
    wait_for("STOPPING=1");
    eventually("the end of all", HANG, || Ok(processes(instance.name()).is_empty().then_some(()))).unwrap();
}
