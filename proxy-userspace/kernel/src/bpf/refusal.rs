//! Says why the kernel refuses something, and what helps: EPERM and EACCES alone tell neither.

use std::error::Error;
use std::io;

use aya::EbpfError;
use aya::maps::MapError;
use aya::programs::ProgramError;
use aya::programs::links::LinkError;
use aya::sys::SyscallError;
use aya::util::KernelVersion;

/// The oldest Linux that has everything that the packet splice's programs need, and its name.
const PACKET_NEEDS: (KernelVersion, &str) = (KernelVersion::new(5, 15, 0), "Linux 5.15");

/// How many lines of the verifier's log a message has. The log ends with the reason.
const LINES: usize = 3;

/// The capabilities that a system call refused with EPERM needs, as the end of a message: `
/// (bpf_prog_load needs CAP_BPF and CAP_PERFMON)`. Empty if `error` is of another kind.
pub(crate) fn wanted(error: &(dyn Error + 'static)) -> String {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(SyscallError { call, io_error }) = system_call(error)
            && io_error.raw_os_error() == Some(libc::EPERM)
        {
            return format!(" ({call} needs {})", capability_of(call));
        }
        if let Some(ProgramError::LoadError { io_error, .. }) = error.downcast_ref()
            && io_error.raw_os_error() == Some(libc::EPERM)
        {
            return format!(" (bpf_prog_load needs {})", capability_of("bpf_prog_load"));
        }
        if let Some(error) = error.downcast_ref::<io::Error>()
            && error.raw_os_error() == Some(libc::EPERM)
        {
            return " (a capability is missing, or the kernel is locked down)".to_owned();
        }
        next = error.source();
    }
    String::new()
}

/// The system call that failed, from one of aya's errors. Most of these errors have no source with
/// the call: they are the failed call themselves.
fn system_call<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e SyscallError> {
    if let Some(EbpfError::MapError(error)) = error.downcast_ref() {
        return system_call(error);
    }
    if let Some(ProgramError::SyscallError(call)) = error.downcast_ref() {
        return Some(call);
    }
    if let Some(ProgramError::MapError(error)) = error.downcast_ref() {
        return system_call(error);
    }
    match (error.downcast_ref(), error.downcast_ref()) {
        (Some(MapError::SyscallError(call)), _) | (_, Some(LinkError::SyscallError(call))) => Some(call),
        _ => error.downcast_ref(),
    }
}

/// The capabilities, by aya's name of the call.
fn capability_of(call: &str) -> &'static str {
    match call {
        "bpf_prog_load" => "CAP_BPF and CAP_PERFMON",
        "bpf_prog_query" | "bpf_link_create" | "bpf_mprog_attach" | "bpf_link_update" => {
            "CAP_BPF and CAP_NET_ADMIN"
        }
        _ if call.ends_with("_by_id") || call.ends_with("_next_id") => "CAP_SYS_ADMIN",
        _ => "CAP_BPF",
    }
}

/// The message about a program that the verifier has refused: the kernel's release, the feature for
/// which the kernel is too old, if it is, and the end of the log.
pub(crate) fn of_verifier(error: &io::Error, log: &str) -> String {
    let release = rustix::system::uname();
    let release = release.release().to_string_lossy();
    said_of_verifier(error, log, &release, KernelVersion::current().ok())
}

fn said_of_verifier(error: &io::Error, log: &str, release: &str, version: Option<KernelVersion>) -> String {
    let (since, needed) = PACKET_NEEDS;
    let mut said = match version {
        Some(version) if version < since => format!("needs {needed}; this is {release}"),
        _ => format!("on Linux {release}"),
    };
    match error.raw_os_error() {
        Some(libc::EPERM) => said += "; bpf_prog_load needs CAP_BPF and CAP_PERFMON",
        // EACCES is the verifier's answer to a program that it finds unsafe, and is not about
        // permissions.
        Some(libc::EACCES) => {}
        _ => said += &format!("; {error}"),
    }
    let end = end_of(log);
    if !end.is_empty() {
        said += &format!("; the verifier's log ends with `{end}`");
    }
    said
}

/// The last lines, joined to one, without the statistics that follow the reason.
fn end_of(log: &str) -> String {
    let is_told = |line: &&str| {
        !line.is_empty()
            && !["processed ", "verification time", "stack depth"].iter().any(|of| line.starts_with(of))
    };
    let lines: Vec<_> = log.lines().map(str::trim).filter(is_told).collect();
    lines[lines.len().saturating_sub(LINES)..].join(" / ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "0: R1=ctx()\n1: (07) r4 += 1\n2: (85) call bpf_skb_load_bytes#26\nR4 unbounded memory access\n\
                       processed 9 insns (limit 1000000)\nstack depth 0\n";

    #[test]
    fn an_old_kernel_is_told_what_it_lacks() {
        let error = io::Error::from_raw_os_error(libc::EINVAL);
        let said = said_of_verifier(&error, "", "5.10.262-amd64", Some(KernelVersion::new(5, 10, 262)));
        assert!(said.starts_with("needs Linux 5.15; this is 5.10.262-amd64; Invalid argument"), "{said}");
    }

    #[test]
    fn the_end_of_the_log_is_the_reason_and_eacces_is_not_said() {
        let error = io::Error::from_raw_os_error(libc::EACCES);
        let said = said_of_verifier(&error, LOG, "6.1.0", Some(KernelVersion::new(6, 1, 0)));
        assert_eq!(
            said,
            "on Linux 6.1.0; the verifier's log ends with `1: (07) r4 += 1 / 2: (85) call bpf_skb_load_bytes#26 / R4 unbounded \
             memory access`"
        );
    }

    #[test]
    fn a_refused_call_names_its_capability() {
        let refused = |call, errno| {
            let io_error = io::Error::from_raw_os_error(errno);
            wanted(&ProgramError::SyscallError(SyscallError { call, io_error }))
        };
        assert_eq!(
            refused("bpf_prog_get_fd_by_id", libc::EPERM),
            " (bpf_prog_get_fd_by_id needs CAP_SYS_ADMIN)"
        );
        assert_eq!(
            refused("bpf_link_update", libc::EPERM),
            " (bpf_link_update needs CAP_BPF and CAP_NET_ADMIN)"
        );
        assert_eq!(refused("bpf_link_update", libc::EINVAL), "");
    }
}
