//! Everything works with only the capabilities that `deploy/steer.service` leaves.

use std::fs;
use std::path::Path;

use steer_tests::eventually::eventually;
use steer_tests::instance;
use steer_tests::process::{Orphan, Process};
use steer_tests::require;
use steer_tests::steer::{binary, binary_with_failpoints, wrapped};
use steer_tests::topology::Topology;

use crate::bed::{Bed, HANG, config};
use crate::leaving::{expect_spliced, is_reset, open, with_endpoint};

/// The instance of the processes that do not belong to a [`Bed`].
const INSTANCE: &str = "steer-capabilities";

/// See include/uapi/linux/capability.h.
const CAP_SYS_ADMIN: u32 = 21;

/// The capabilities in `CapabilityBoundingSet=` of the unit.
fn of_the_unit() -> Vec<String> {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/steer.service");
    let unit = fs::read_to_string(unit).unwrap();
    let set = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).unwrap();
    set.split_whitespace().map(|name| name.strip_prefix("CAP_").unwrap().to_lowercase()).collect()
}

/// A wrapper that runs a command as systemd runs the service: as root with only these capabilities.
fn with_only(capabilities: &[String]) -> Vec<String> {
    let set: String = capabilities.iter().map(|name| format!(",+{name}")).collect();
    ["setpriv".to_owned(), "--no-new-privs".to_owned(), format!("--bounding-set=-all{set}")].into()
}

/// One of the capability sets of a process, from `/proc`.
fn held(pid: u32, set: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(set)).unwrap();
    u64::from_str_radix(line.trim(), 16).unwrap()
}

#[test]
fn streams_outlive_a_kill_a_takeover_and_end_by_detach() {
    if !require::root() {
        return;
    }
    let capabilities = of_the_unit();
    assert!(!capabilities.iter().any(|name| name == "sys_admin"));
    let topology = Topology::new(1).unwrap();
    let mut bed = Bed::start_wrapped(&topology, with_only(&capabilities));
    for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
        let held = held(bed.steer.pid(), set);
        // A container may lack some of the capabilities.
        assert!(held.count_ones() as usize <= capabilities.len(), "{set} {held:x}");
        assert_eq!(held & 1 << CAP_SYS_ADMIN, 0, "{set} {held:x}");
    }
    bed.under_traffic(20, |bed, _| {
        for signal in [libc::SIGKILL, libc::SIGTERM] {
            bed.steer.restart(signal).unwrap();
            assert_eq!(bed.metric("steer_streams_adopted_total", &[]), 20.0);
        }
        let mut before = bed.steer.take_over().unwrap();
        before.wait(HANG).unwrap();
        assert_eq!(bed.rows().iter().filter(|row| row["path"] == "packet").count(), 20);
    });
    bed.expect_no_stream();
    const STREAMS: usize = 5;
    let (clients, endpoints) = with_endpoint(&topology, STREAMS, || {
        let streams = open(&topology, STREAMS);
        expect_spliced(&bed, STREAMS);
        bed.steer.stop(libc::SIGTERM).unwrap();
        assert!(bed.cli_text(&["cleanup"]).contains("5 streams live"));
        assert!(bed.cli_text(&["detach"]).contains("reset 5 streams"));
        streams.into_iter().map(is_reset).collect::<Vec<_>>()
    });
    assert_eq!((clients, endpoints), (vec![true; STREAMS], vec![true; STREAMS]));
    assert!(!bed.pins().exists());
    let said = bed.steer.said().unwrap();
    assert!(!said.contains(" WARN ") && !said.contains(" ERROR "), "{said}");
}

/// Runs `steer run --splice MODE` with a planted call that needs another capability. Returns
/// whether the process gets the packet splice, and its log. With `auto` the process serves without
/// the packet splice, and is stopped.
fn with_a_call_that_wants_more(
    topology: &Topology,
    binary: &Path,
    capabilities: &[String],
    splice: &str,
) -> (bool, String) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("steer.yaml");
    fs::write(&file, config(&[])).unwrap();
    let mut command = wrapped(&with_only(capabilities), binary);
    command.args(["run", "--admin", "off", "--instance", INSTANCE, "--splice", splice, "-c"]).arg(&file);
    command.env("STEER_ALSO", "open a program by its number");
    let mut process =
        Process::start("steer", command, directory.path(), Some(&topology.proxy), Orphan::Dies).unwrap();
    let decided = eventually("a steer that runs or has ended", HANG, || {
        Ok((process.ensure_running().is_err() || process.stderr()?.contains(" ready version=")).then_some(()))
    });
    decided.unwrap();
    if process.ensure_running().is_ok() {
        process.signal(libc::SIGTERM).unwrap();
        assert!(process.wait(HANG).unwrap().success());
    }
    let said = process.stderr().unwrap();
    (said.contains("packet splice ready"), said)
}

/// Shows that the test above would notice a call that needs more. Pins that exist when the kernel
/// refuses the call are removed.
#[test]
fn a_call_that_wants_more_is_refused_and_leaves_nothing() {
    if !require::root() {
        return;
    }
    let Some(binary) = binary_with_failpoints() else {
        require::skip("needs a steer with fail points: cargo xtask test builds it");
        return;
    };
    let topology = Topology::new(1).unwrap();
    let pins = Path::new(instance::DIRECTORY).join(INSTANCE);
    let mut capabilities = of_the_unit();
    for splice in ["packet", "auto"] {
        let (has_splice, said) = with_a_call_that_wants_more(&topology, &binary, &capabilities, splice);
        assert!(!has_splice && said.contains("bpf_prog_get_fd_by_id needs CAP_SYS_ADMIN"), "{said}");
        assert!(!said.contains("streams end with this process"), "{said}");
        assert!(!pins.exists());
    }
    capabilities.push("sys_admin".to_owned());
    let (has_splice, said) = with_a_call_that_wants_more(&topology, &binary, &capabilities, "packet");
    assert!(has_splice, "{said}");
}

#[test]
fn a_missing_capability_is_named_and_nothing_is_left() {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let pins = Path::new(instance::DIRECTORY).join(INSTANCE);
    for missing in ["bpf", "perfmon", "net_admin", "net_raw"] {
        let mut capabilities = of_the_unit();
        capabilities.retain(|name| name != missing);
        let binary = binary().unwrap();
        let (has_splice, said) = with_a_call_that_wants_more(&topology, &binary, &capabilities, "packet");
        let named = format!("CAP_{} is missing", missing.to_uppercase());
        assert!(!has_splice && said.contains(&named), "{said}");
        assert!(!pins.exists());
    }
}
