//! Streams with tracked connections: which packet filters of Steer's host let them be spliced.

use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;

use steer_kernel::net::conntrack::{Conntrack, Handling};
use steer_tests::netns::NetNs;
use steer_tests::peers::nft;
use steer_tests::process::quiet;
use steer_tests::require;
use steer_tests::steer::{Steer, binary};
use steer_tests::topology::Topology;

use crate::net::{ENDPOINT_PORT, Family, Net, Path, Setup, at_once};

const BULK: usize = 16 << 20;

/// Rules for forwarded packets, as those of Docker, start connection tracking.
pub(crate) const FORWARDED_ONLY: &str = "table inet docker {
    chain user {
        ct state { established, related } accept
        ct state invalid drop
    }
    chain forward {
        type filter hook forward priority filter; policy drop
        jump user
    }
}";

/// What ufw and firewalld do: answers come in because their connection is known.
const STATEFUL: &str = "table inet firewall {
    chain input {
        type filter hook input priority filter; policy drop
        iifname lo accept
        meta l4proto icmpv6 accept
        ct state { established, related } accept
        ct state invalid drop
        tcp dport 8080 accept
    }
}";

pub(crate) const DROPS_INVALID: &str = "table inet firewall {
    chain in {
        type filter hook prerouting priority filter
        ct state invalid drop
    }
    chain out {
        type filter hook output priority filter
        ct state invalid drop
    }
}";

pub(crate) fn tell_nft(host: &NetNs, rules: &str) {
    let mut command = quiet("nft");
    command.args(["-f", "-"]).stdin(Stdio::piped());
    host.enter(&mut command).unwrap();
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(format!("{rules}\n").as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{rules}");
}

fn setup(family: Family, mode: &str) -> Setup {
    Setup::new(Path::Packet, family).with(&format!("conntrack: {mode}"))
}

/// With these rules, in this mode, streams are spliced in full flow, or relayed with the reason
/// `conntrack`. They carry bulk in both cases.
fn expect(spliced: bool, mode: &str, rules: &str) {
    at_once(Family::BOTH, |family| {
        let topology = Topology::new(1).unwrap();
        tell_nft(&topology.proxy, rules);
        let net = Net::start(&topology, setup(family, mode));
        for _ in 0..3 {
            let mut stream = net.open();
            stream.bulk(BULK);
            if spliced {
                net.expect_path(&stream, Path::Packet);
            } else {
                net.expect_relayed(&stream, "conntrack");
            }
            stream.bulk(BULK);
        }
        net.expect_nothing_left();
    });
}

#[test]
fn rules_for_forwarded_packets_do_not_keep_streams_from_the_kernel() {
    if require::root() && nft() {
        expect(true, "auto", FORWARDED_ONLY);
    }
}

#[test]
fn every_tracked_stream_is_relayed_if_the_configuration_says_so() {
    if require::root() && nft() {
        expect(false, "relay", FORWARDED_ONLY);
    }
}

#[test]
fn streams_behind_a_stateful_firewall_are_relayed() {
    if require::root() && nft() {
        expect(false, "auto", STATEFUL);
        expect(false, "auto", DROPS_INVALID);
    }
}

#[test]
fn streams_behind_a_firewall_that_drops_invalid_packets_are_spliced_if_tracking_is_liberal() {
    if !require::root() || !nft() {
        return;
    }
    at_once(Family::BOTH, |family| {
        let topology = Topology::new(1).unwrap();
        tell_nft(&topology.proxy, DROPS_INVALID);
        topology.proxy.sysctl("net.netfilter.nf_conntrack_tcp_be_liberal", "1").unwrap();
        let net = Net::start(&topology, setup(family, "auto"));
        let mut stream = net.open();
        stream.bulk(BULK);
        net.expect_path(&stream, Path::Packet);
        stream.bulk(BULK);
    });
}

#[test]
fn the_log_names_the_rule_that_is_in_the_way() {
    if !require::root() || !nft() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    tell_nft(&topology.proxy, STATEFUL);
    let net = Net::start(&topology, setup(Family::V4, "auto"));
    net.expect_relayed(&net.open(), "conntrack");
    let said = net.steer.said().unwrap();
    assert!(said.contains("the nftables rule `inet firewall input handle "), "{said}");
    assert!(said.contains("fix="), "{said}");
}

#[test]
fn the_next_stream_follows_a_change_of_the_rules() {
    if !require::root() || !nft() {
        return;
    }
    at_once(Family::BOTH, |family| {
        let topology = Topology::new(1).unwrap();
        tell_nft(&topology.proxy, FORWARDED_ONLY);
        let net = Net::start(&topology, setup(family, "auto"));
        for _ in 0..2 {
            let mut before = net.carried();
            tell_nft(&topology.proxy, DROPS_INVALID);
            net.expect_relayed(&net.open(), "conntrack");
            // A spliced stream does not meet the rule.
            before.bulk(BULK);
            tell_nft(&topology.proxy, "delete table inet firewall");
            net.carried().echo();
        }
    });
}

#[test]
fn a_spliced_stream_leaves_no_entry_in_connection_tracking() {
    if !require::root() || !nft() {
        return;
    }
    at_once(Family::BOTH, |family| {
        let topology = Topology::new(1).unwrap();
        tell_nft(&topology.proxy, FORWARDED_ONLY);
        let net = Net::start(&topology, setup(family, "auto"));
        let mut streams: Vec<_> = (0..8).map(|_| net.open()).collect();
        streams.iter().for_each(|stream| net.expect_path(stream, Path::Packet));
        let tuples: Vec<_> = streams.iter().flat_map(|stream| stream.proxy_tuples()).collect();
        let tracked = || {
            let conntrack = Conntrack::new(Handling::ByRules);
            tuples.iter().filter(|(local, peer)| conntrack.is_tracked(*peer, *local).unwrap()).count()
        };
        assert_eq!(topology.proxy.run(tracked).unwrap(), 0);
        streams.iter_mut().for_each(|stream| stream.bulk(1 << 20));
    });
}

const LIBERAL: &str = "/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal";

fn is_liberal(host: &NetNs) -> bool {
    host.run(|| std::fs::read_to_string(LIBERAL).unwrap()).unwrap().trim() == "1"
}

#[test]
fn in_liberal_mode_streams_behind_a_stateful_firewall_are_spliced() {
    if require::root() && nft() {
        expect(true, "liberal", DROPS_INVALID);
        expect(true, "liberal", STATEFUL);
    }
}

#[test]
fn the_liberal_setting_is_restored_when_the_last_instance_leaves_nothing() {
    if !require::root() || !nft() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    tell_nft(&topology.proxy, DROPS_INVALID);
    let mut net = Net::start(&topology, setup(Family::V4, "liberal"));
    assert!(is_liberal(&topology.proxy));
    let other = setup(Family::V6, "liberal");
    let mut other = Steer::start(&other.config(), Some(&topology.proxy), &[]).unwrap();
    drop(net.carried());
    net.expect_nothing_left();
    net.steer.stop(libc::SIGTERM).unwrap();
    assert!(is_liberal(&topology.proxy), "the other instance needs the setting");
    other.stop(libc::SIGTERM).unwrap();
    assert!(!is_liberal(&topology.proxy));
}

#[test]
fn a_setting_that_an_operator_has_made_liberal_stays() {
    if !require::root() || !nft() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    topology.proxy.sysctl("net.netfilter.nf_conntrack_tcp_be_liberal", "1").unwrap();
    let mut net = Net::start(&topology, setup(Family::V4, "liberal"));
    net.steer.stop(libc::SIGTERM).unwrap();
    assert!(is_liberal(&topology.proxy));
}

#[test]
fn after_a_crash_cleanup_and_detach_restore_the_liberal_setting() {
    if !require::root() || !nft() {
        return;
    }
    at_once(["cleanup", "detach"], |command| {
        let topology = Topology::new(1).unwrap();
        tell_nft(&topology.proxy, DROPS_INVALID);
        let mut net = Net::start(&topology, setup(Family::V4, "liberal"));
        let stream = net.carried();
        let left = (command == "detach").then_some(stream);
        if left.is_none() {
            net.expect_nothing_left();
        }
        net.steer.stop(libc::SIGKILL).unwrap();
        assert!(is_liberal(&topology.proxy));
        let mut steer = quiet(binary().unwrap());
        steer.args([command, "--instance", net.steer.instance()]);
        topology.proxy.enter(&mut steer).unwrap();
        assert!(steer.status().unwrap().success());
        assert!(!is_liberal(&topology.proxy), "{command}");
    });
}

/// The rules that docs/splice.md recommends behind [`STATEFUL`].
const NOTRACK: &str = "
add table inet steer
add chain inet steer in { type filter hook prerouting priority raw; }
add chain inet steer out { type filter hook output priority raw; }
add rule inet steer in tcp dport 8080 notrack
add rule inet steer in tcp sport 3000 notrack
add rule inet steer out tcp sport 8080 notrack
add rule inet steer out tcp dport 3000 notrack
add rule inet steer out tcp sport 3000 notrack
insert rule inet firewall input ct state untracked tcp dport 8080 accept
insert rule inet firewall input ct state untracked tcp sport 3000 tcp flags & (syn | ack) != syn accept";

#[test]
fn streams_that_are_exempt_from_tracking_are_spliced_behind_a_stateful_firewall() {
    if !require::root() || !nft() {
        return;
    }
    let near = Setup {
        endpoint: SocketAddr::from((Ipv4Addr::LOCALHOST, ENDPOINT_PORT)),
        ..setup(Family::V4, "auto")
    };
    at_once([near, setup(Family::V4, "auto"), setup(Family::V6, "auto")], |setup| {
        let topology = Topology::new(1).unwrap();
        tell_nft(&topology.proxy, STATEFUL);
        tell_nft(&topology.proxy, NOTRACK);
        let net = Net::start(&topology, setup);
        let mut stream = net.open();
        stream.bulk(BULK);
        net.expect_path(&stream, Path::Packet);
        stream.bulk(BULK);
    });
}
