//! What the kernel reports, and the objects that Steer can leave in the kernel.

use std::io;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use steer_tests::netns::NetNs;

/// Words in the kernel's log that tell of a fault of the kernel.
const COMPLAINTS: [&str; 6] =
    ["WARNING:", "BUG:", "Oops", "Call Trace", "general protection", "unregister_netdevice"];
/// An emulated machine may stop for a long time when its host is busy. That is not a fault of the
/// guest's kernel.
const OF_THE_HOST: &str = "soft lockup";

/// The version, as `uname -r` prints it.
pub(crate) fn release() -> Result<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/osrelease").context("cannot read the release")?;
    Ok(text.trim().to_owned())
}

/// The lines of the kernel's log that tell of a fault.
pub(crate) fn complaints() -> Result<Vec<String>> {
    const READ_ALL: libc::c_int = 3;
    let mut log = vec![0_u8; 1 << 20];
    let room = libc::c_int::try_from(log.len()).context("the size of the kernel's log")?;
    // SAFETY: the pointer is to `room` bytes that live until the end of the call.
    let size = unsafe { libc::klogctl(READ_ALL, log.as_mut_ptr().cast(), room) };
    let size = usize::try_from(size).map_err(|_| io::Error::last_os_error());
    log.truncate(size.context("cannot read the kernel's log")?);
    let log = String::from_utf8_lossy(&log);
    let complains =
        |line: &&str| COMPLAINTS.iter().any(|word| line.contains(word)) && !line.contains(OF_THE_HOST);
    Ok(log.lines().filter(complains).map(str::to_owned).collect())
}

/// How many BPF programs, maps and links exist. On this machine, only Steer makes any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Objects {
    pub(crate) programs: usize,
    pub(crate) maps: usize,
    pub(crate) links: usize,
}

impl Objects {
    pub(crate) fn now() -> Result<Self> {
        // The commands BPF_PROG_GET_NEXT_ID, BPF_MAP_GET_NEXT_ID, BPF_LINK_GET_NEXT_ID.
        Ok(Self { programs: count(11)?, maps: count(12)?, links: count(31)? })
    }
}

/// Counts objects of one kind. `command` is the command of bpf(2) that returns the next number of
/// this kind.
fn count(command: libc::c_int) -> Result<usize> {
    #[repr(C)]
    struct Next {
        after: u32,
        found: u32,
        flags: u32,
    }
    let mut next = Next { after: 0, found: 0, flags: 0 };
    let mut count = 0;
    loop {
        // SAFETY: the pointer and the size are those of `next`, which lives until the end of the
        // call.
        let done = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut next, size_of::<Next>()) };
        if done == 0 {
            (next.after, count) = (next.found, count + 1);
            continue;
        }
        let error = io::Error::last_os_error();
        ensure!(error.raw_os_error() == Some(libc::ENOENT), "cannot list BPF objects: {error}");
        return Ok(count);
    }
}

/// The filters at the devices of `netns`, or of the caller's namespace, one line for each.
pub(crate) fn filters(netns: Option<&NetNs>, devices: &[&str]) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for device in devices {
        for hook in ["ingress", "egress"] {
            let mut command = Command::new("tc");
            if let Some(netns) = netns {
                command.args(["-n", netns.name()]);
            }
            command.args(["filter", "show", "dev", device, hook]);
            let output = command.output().context("cannot run tc")?;
            let text = String::from_utf8_lossy(&output.stdout);
            // The first line of each filter names its number.
            found.extend(text.lines().filter(|line| line.contains(" handle ")).map(str::to_owned));
        }
    }
    Ok(found)
}

/// A counter of the kernel's TCP, such as `InCsumErrors`.
pub(crate) fn tcp_counter(name: &str) -> Result<u64> {
    let text = std::fs::read_to_string("/proc/net/snmp").context("cannot read the counters of TCP")?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let mut pairs = names.split(' ').zip(values.split(' '));
    let value = pairs.find(|(known, _)| *known == name).and_then(|(_, value)| value.parse().ok());
    value.with_context(|| format!("TCP has no counter {name}"))
}
