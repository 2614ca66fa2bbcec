//! What Steer leaves on its host after a stop that leaves no stream: nothing.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path as FilePath, PathBuf};

use steer_kernel::net::conntrack::{Conntrack, Handling};
use steer_tests::netns::NetNs;
use steer_tests::peers::nft;
use steer_tests::process::quiet;
use steer_tests::require;
use steer_tests::topology::Topology;

use crate::firewall::{DROPS_INVALID, FORWARDED_ONLY, tell_nft};
use crate::net::{Family, Net, Path, Setup, at_once};

/// What a network namespace is set to.
#[derive(Debug, PartialEq)]
struct Host {
    settings: BTreeMap<PathBuf, String>,
    rules: String,
    qdiscs: String,
}

impl Host {
    fn of(netns: &NetNs) -> Self {
        let mut settings = BTreeMap::new();
        netns.run(|| read_below(FilePath::new("/proc/sys/net"), &mut settings)).unwrap();
        let said = |program: &str, args: &[&str]| {
            let mut command = quiet(program);
            command.args(args);
            netns.enter(&mut command).unwrap();
            let output = command.output().unwrap();
            assert!(output.status.success(), "{program} {args:?}: {output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        // Without counters.
        let rules = said("nft", &["--stateless", "list", "ruleset"]);
        Self { settings, rules, qdiscs: said("tc", &["qdisc", "show"]) }
    }
}

/// Reads all settings below a directory. Some can only be written, and the number of tracked
/// connections is no setting.
fn read_below(directory: &FilePath, settings: &mut BTreeMap<PathBuf, String>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read_below(&path, settings);
        } else if !path.ends_with("nf_conntrack_count")
            && let Ok(value) = fs::read_to_string(&path)
        {
            settings.insert(path, value);
        }
    }
}

/// How many of the connections between these addresses the host tracks.
fn tracked(netns: &NetNs, tuples: &[(SocketAddr, SocketAddr)]) -> usize {
    let count = || {
        let conntrack = Conntrack::new(Handling::ByRules);
        tuples.iter().filter(|(local, peer)| conntrack.is_tracked(*peer, *local).unwrap()).count()
    };
    netns.run(count).unwrap()
}

/// Streams are spliced, end, and Steer stops. Then the host is as it was before. With `only_settings`,
/// connections may still be tracked.
fn expect_nothing_is_left(rules: &str, mode: &str, only_settings: bool) {
    at_once(Family::BOTH, |family| {
        let topology = Topology::new(1).unwrap();
        let proxy = &topology.proxy;
        tell_nft(proxy, rules);
        let before = Host::of(proxy);
        // Steer reserves these ports, which the kernel would assign.
        let ports = "source_ports: [40000-40999]";
        let setup = Setup::new(Path::Packet, family).with(ports).with(&format!("conntrack: {mode}"));
        let mut net = Net::start(&topology, setup);
        let mut tuples = Vec::new();
        for _ in 0..4 {
            let mut stream = net.carried();
            tuples.extend(stream.proxy_tuples());
            stream.bulk(1 << 20);
        }
        assert_ne!(Host::of(proxy).settings, before.settings, "the ports are reserved");
        net.expect_nothing_left();
        net.steer.stop(libc::SIGTERM).unwrap();
        assert_eq!(Host::of(proxy), before);
        if !only_settings {
            assert_eq!(tracked(proxy, &tuples), 0);
        }
        let instance = net.steer.instance();
        for place in ["/sys/fs/bpf/steer", "/run/steer"] {
            assert!(!FilePath::new(place).join(instance).exists(), "{place}/{instance}");
        }
    });
}

#[test]
fn settings_rules_qdiscs_and_tracked_connections_are_as_before() {
    if require::root() && nft() {
        expect_nothing_is_left(FORWARDED_ONLY, "auto", false);
    }
}

/// Connections that a rule looks at stay tracked until their time is over.
#[test]
fn settings_are_as_before_in_liberal_mode() {
    if require::root() && nft() {
        expect_nothing_is_left(DROPS_INVALID, "liberal", true);
    }
}
