//! What `steer-kernel` reads from the kernel about routes, interfaces and settings, in the test's
//! own namespaces.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;

use steer_kernel::net::conntrack::{Conntrack, Handling, Obstacle};
use steer_kernel::net::host::{self, InterfaceKind, LOOPBACK_IFINDEX};
use steer_kernel::net::next_hop::NextHops;
use steer_kernel::net::route::{RouteError, Routes};
use steer_tests::netns::NetNs;
use steer_tests::peers::nft;
use steer_tests::require;

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn index_of(netns: &NetNs, interface: &str) -> u32 {
    let name = std::ffi::CString::new(interface).unwrap();
    // SAFETY: the pointer is to a string that ends with a nul.
    netns.run(|| unsafe { libc::if_nametoindex(name.as_ptr()) }).unwrap()
}

/// Runs a program in a namespace.
fn run(netns: &NetNs, program: &str, arguments: &[&str]) {
    let mut command = Command::new(program);
    command.args(arguments);
    netns.enter(&mut command).unwrap();
    assert!(command.status().unwrap().success(), "{program} {arguments:?}");
}

/// Two namespaces with two interfaces, one of which has two addresses, and routes of each kind.
fn network() -> [NetNs; 2] {
    let (here, there) = (NetNs::new("steer-t", "here").unwrap(), NetNs::new("steer-t", "there").unwrap());
    for (link, arguments) in [
        ("one", ["10.73.1.1/24", "10.73.1.9/24", "fd73:1::1/64"]),
        ("two", ["10.73.2.1/24", "10.73.2.9/24", "fd73:2::1/64"]),
    ] {
        here.ip(&["link", "add", link, "type", "veth", "peer", "name", link, "netns", there.name()]).unwrap();
        for address in arguments {
            let nodad: &[&str] = if address.contains(':') { &["nodad"] } else { &[] };
            here.ip(&[&["address", "add", address, "dev", link], nodad].concat()).unwrap();
        }
        there.ip(&["link", "set", link, "up"]).unwrap();
        here.ip(&["link", "set", link, "up"]).unwrap();
    }
    for route in [
        &["10.74.0.0/24", "via", "10.73.2.2", "src", "10.73.2.9", "mtu", "1300"][..],
        &["unreachable", "10.74.1.0/24"],
        &["blackhole", "10.74.2.0/24"],
        &["fd74::/64", "via", "fd73:2::2", "mtu", "1320"],
        &["unreachable", "fd74:1::/64"],
    ] {
        here.ip(&[&["route", "add"], route].concat()).unwrap();
    }
    [here, there]
}

#[test]
fn routes_are_the_kernels() {
    if !require::root() {
        return;
    }
    let [here, _there] = network();
    let [one, two] = ["one", "two"].map(|interface| index_of(&here, interface));
    let routes = here.run(|| Routes::new().unwrap()).unwrap();
    for (from, to, ifindex, local, mtu, source) in [
        ("0.0.0.0", "10.73.1.2", one, false, None, "10.73.1.1"),
        ("10.73.1.9", "10.73.1.2", one, false, None, "10.73.1.9"),
        ("10.73.1.1", "10.73.2.2", two, false, None, "10.73.1.1"),
        ("0.0.0.0", "10.74.0.5", two, false, Some(1300), "10.73.2.9"),
        ("0.0.0.0", "::ffff:10.74.0.5", two, false, Some(1300), "10.73.2.9"),
        ("10.73.1.1", "10.73.2.1", LOOPBACK_IFINDEX, true, None, "10.73.1.1"),
        ("127.0.0.1", "127.0.0.1", LOOPBACK_IFINDEX, true, None, "127.0.0.1"),
        ("::", "fd73:1::2", one, false, None, "fd73:1::1"),
        ("fd73:1::1", "fd74::5", two, false, Some(1320), "fd73:1::1"),
        ("fd73:1::1", "fd73:2::1", LOOPBACK_IFINDEX, true, None, "fd73:1::1"),
        ("::1", "::1", LOOPBACK_IFINDEX, true, None, "::1"),
    ] {
        let hop = routes.lookup(address(from), address(to)).unwrap();
        assert_eq!((hop.ifindex, hop.local, hop.source), (ifindex, local, address(source)), "{from} {to}");
        // For IPv6, the kernel always tells the MTU.
        assert!(hop.mtu == mtu || (mtu.is_none() && address(to).is_ipv6()), "{to} {hop:?}");
    }
    for to in ["10.74.1.5", "10.74.2.5", "10.99.0.1", "10.73.1.255", "fd74:1::5", "fd99::1"] {
        let unspecified = if to.contains(':') { "::" } else { "0.0.0.0" };
        let refused = routes.lookup(address(unspecified), address(to));
        assert!(matches!(refused, Err(RouteError::NoRoute { .. })), "{to} {refused:?}");
    }
}

#[test]
fn a_remembered_way_is_forgotten_before_a_change_of_the_network_is_done() {
    if !require::root() {
        return;
    }
    let [here, _there] = network();
    let links = ["one", "two"].map(|interface| index_of(&here, interface));
    let next_hops = here.run(|| NextHops::new().unwrap()).unwrap();
    let towards = |from: &str, to: &str| {
        next_hops.of([(address(from), address(to))]).map(|next_hop| next_hop.map(|next_hop| next_hop.ifindex))
    };
    for _ in 0..10 {
        for (gateways, source, network, destination) in [
            (["10.73.1.2", "10.73.2.2"], "10.73.1.1", "10.74.0.0/24", "10.74.0.5"),
            (["fd73:1::2", "fd73:2::2"], "fd73:1::1", "fd74::/64", "fd74::5"),
        ] {
            for (gateway, link) in gateways.into_iter().zip(links) {
                here.ip(&["route", "replace", network, "via", gateway]).unwrap();
                for _ in 0..2 {
                    let [next_hop] = towards(source, destination);
                    assert_eq!(next_hop.unwrap(), link, "{destination} via {gateway}");
                }
            }
        }
    }
    here.ip(&["rule", "add", "to", "10.74.0.0/24", "unreachable"]).unwrap();
    assert!(matches!(towards("10.73.1.1", "10.74.0.5"), [Err(RouteError::NoRoute { .. })]));
    let [next_hop] = towards("fd73:1::1", "fd74::5");
    assert_eq!(next_hop.unwrap(), links[1]);
    here.ip(&["link", "set", "two", "down"]).unwrap();
    assert!(matches!(towards("fd73:1::1", "fd74::5"), [Err(RouteError::NoRoute { .. })]));
}

#[test]
fn interfaces_are_told_apart() {
    if !require::root() {
        return;
    }
    let [here, _there] = network();
    here.ip(&["link", "set", "one", "mtu", "1400"]).unwrap();
    here.ip(&["link", "add", "bridge", "type", "bridge"]).unwrap();
    here.ip(&["tuntap", "add", "mode", "tun", "name", "tun"]).unwrap();
    for (name, kind) in [
        ("lo", InterfaceKind::Loopback),
        ("one", InterfaceKind::Ethernet),
        ("bridge", InterfaceKind::Ethernet),
        ("tun", InterfaceKind::Other),
    ] {
        let ifindex = index_of(&here, name);
        let interface = here.run(|| host::interface(ifindex).unwrap()).unwrap();
        assert_eq!((interface.name.as_str(), interface.kind), (name, kind));
        assert!(name != "one" || interface.mtu == 1400);
    }
}

/// The process is in one namespace, and the thread that asks is in another.
#[test]
fn settings_are_those_of_the_threads_namespace() {
    if !require::root() {
        return;
    }
    let netns = NetNs::new("steer-t", "settings").unwrap();
    let outside = (host::ip_local_port_range().unwrap(), host::reserved_ports().unwrap());
    let set = |setting: &str, value: &str| std::fs::write(format!("/proc/sys/net/ipv4/{setting}"), value);
    netns
        .run(|| {
            set("ip_local_port_range", "20000 20100").unwrap();
            assert_eq!(host::ip_local_port_range().unwrap(), 20000..=20100);
            set("ip_local_reserved_ports", "80").unwrap();
            host::reserve_ports(&[11_000..=11_010, 20_005..=20_005]).unwrap();
            host::reserve_ports(&[11_005..=11_020]).unwrap();
            assert_eq!(host::reserved_ports().unwrap(), [80..=80, 11_000..=11_020, 20_005..=20_005]);
            host::set_reserved_ports(&[]).unwrap();
            assert_eq!(host::reserved_ports().unwrap(), []);
            host::set_reserved_ports(&[80..=80, 11_000..=11_020, 20_005..=20_005]).unwrap();

            assert!(host::early_demux() && !host::loopback_accepts_redirects());
            set("tcp_early_demux", "0").unwrap();
            assert!(!host::early_demux());
            set("tcp_early_demux", "1").unwrap();
            set("ip_early_demux", "0").unwrap();
            assert!(!host::early_demux());
            set("conf/lo/accept_local", "1").unwrap();
            assert!(!host::loopback_accepts_redirects());
            set("conf/lo/route_localnet", "1").unwrap();
            assert!(host::loopback_accepts_redirects());
        })
        .unwrap();
    assert_eq!((host::ip_local_port_range().unwrap(), host::reserved_ports().unwrap()), outside);
}

/// Makes a connection to `address`. Returns the addresses as the accepting side sees them: the
/// peer's, then its own.
fn connect(address: &str) -> (SocketAddr, SocketAddr, [TcpStream; 2]) {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let near = listener.accept().unwrap().0;
    (near.peer_addr().unwrap(), near.local_addr().unwrap(), [near, far])
}

#[test]
fn connection_tracking_is_seen() {
    if !require::root() {
        return;
    }
    let netns = NetNs::new("steer-t", "conntrack").unwrap();
    let conntrack = netns.run(|| Conntrack::new(Handling::Relay)).unwrap();
    let in_the_way = |address: &str| {
        let ask = || {
            let (peer, local, _sockets) = connect(address);
            let answers = [(peer, local), (local, peer)]
                .map(|(peer, local)| conntrack.is_tracked(peer, local).is_err());
            assert_eq!(answers[0], answers[1], "an entry is found by either direction");
            answers[0]
        };
        netns.run(ask).unwrap()
    };
    let ways = || (in_the_way("127.0.0.1"), in_the_way("::1"));
    assert_eq!(ways(), (false, false));
    let rules = "add table inet t; add chain inet t c { type filter hook input priority 0; };";
    run(&netns, "nft", &[&format!("{rules} add rule inet t c ct state invalid drop")]);
    assert_eq!(ways(), (true, true));

    // Connection tracking ends for one family, and remains for the other.
    for (hook, chain) in [("prerouting", "p"), ("output", "o")] {
        let chain = format!("inet t {chain}");
        let rules = format!("add chain {chain} {{ type filter hook {hook} priority raw; }};");
        run(&netns, "nft", &[&format!("{rules} add rule {chain} ip protocol tcp notrack")]);
    }
    assert_eq!(ways(), (false, true));

    let liberal = "/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal";
    netns.run(|| std::fs::write(liberal, "1").unwrap()).unwrap();
    assert_eq!(ways(), (false, false));
}

/// What stands in the way of a tracked connection in a namespace with these rules: a rule as `family
/// table chain`, or nothing.
fn rule_in_the_way(rules: &str) -> Option<String> {
    let netns = NetNs::new("steer-t", "rules").unwrap();
    let conntrack = netns.run(|| Conntrack::new(Handling::ByRules)).unwrap();
    run(&netns, "nft", &[TRACKING]);
    run(&netns, "nft", &[rules]);
    ask(&netns, &conntrack)
}

/// Starts tracking. The rule looks at forwarded packets only, as those of Docker do.
const TRACKING: &str =
    "table inet t { chain f { type filter hook forward priority 0; ct state invalid drop; }; }";

fn ask(netns: &NetNs, conntrack: &Conntrack) -> Option<String> {
    let ask = || {
        let (peer, local, _sockets) = connect("127.0.0.1");
        conntrack.is_tracked(peer, local).map_err(|obstacle| match obstacle {
            Obstacle::Rule(looking) => looking.to_string(),
            other => panic!("{other:?}"),
        })
    };
    match netns.run(ask).unwrap() {
        Ok(tracked) => {
            assert!(tracked);
            None
        }
        Err(text) => {
            let (_, rule) = text.split_once('`').unwrap();
            Some(rule.split_once(" handle ").unwrap().0.to_owned())
        }
    }
}

#[test]
fn rules_that_look_at_connections_of_this_host_are_found() {
    if !require::root() || !nft() {
        return;
    }
    let base = |hook: &str| format!("type filter hook {hook} priority 0;");
    for hook in ["prerouting", "input", "output", "postrouting"] {
        for family in ["inet", "ip", "ip6"] {
            let rules =
                format!("table {family} f {{ chain c {{ {} ct state invalid counter; }}; }}", base(hook));
            assert_eq!(rule_in_the_way(&rules), Some(format!("{family} f c")), "{rules}");
        }
    }
    let chains = |rules: &str| format!("table inet f {{ {rules} }}");
    let looks = "chain looks { ct mark 1 accept; };";
    for (rules, rule) in [
        // Each field of an entry counts: an invalid packet has no entry.
        (chains(&format!("chain c {{ {} ct status assured accept; }};", base("input"))), "inet f c"),
        (
            chains(&format!("{looks} chain c {{ {} tcp dport 1 jump looks; }};", base("input"))),
            "inet f looks",
        ),
        (chains(&format!("{looks} chain c {{ {} goto looks; }};", base("input"))), "inet f looks"),
        (
            chains(&format!("{looks} chain a {{ jump looks; }}; chain c {{ {} jump a; }};", base("output"))),
            "inet f looks",
        ),
        (
            chains(&format!(
                "{looks} chain c {{ {} tcp dport vmap {{ 1 : jump looks, 2 : drop }}; }};",
                base("input")
            )),
            "inet f looks",
        ),
        (
            chains(&format!(
                "chain c {{ {} ct state vmap {{ established : accept, invalid : drop }}; }};",
                base("input")
            )),
            "inet f c",
        ),
        (
            chains(&format!(
                "set s {{ type ipv4_addr; flags dynamic; }}; chain c {{ {} add @s {{ ip saddr ct count over 9 }} drop; }};",
                base("input")
            )),
            "inet f c",
        ),
    ] {
        assert_eq!(rule_in_the_way(&rules).as_deref(), Some(rule), "{rules}");
    }
}

#[test]
fn rules_for_forwarded_packets_and_rules_that_do_not_look_are_not_in_the_way() {
    if !require::root() || !nft() {
        return;
    }
    let looks = "chain looks { ct state invalid drop; };";
    for rules in [
        "chain c { type filter hook forward priority 0; ct state invalid drop; };".to_owned(),
        format!("{looks} chain c {{ type filter hook forward priority 0; jump looks; }};"),
        format!("{looks} chain c {{ type filter hook input priority 0; tcp dport 1 drop; }};"),
        "chain c { type nat hook prerouting priority dstnat; ct state new tcp dport 1 redirect to :2; };"
            .to_owned(),
        "chain c { type filter hook prerouting priority 0; ct mark set 1; };".to_owned(),
        "chain c { type filter hook prerouting priority raw; tcp dport 1 notrack; };".to_owned(),
        "chain c { type filter hook input priority 0; policy drop; accept; };".to_owned(),
    ] {
        let rules = format!("table inet f {{ {rules} }}");
        assert_eq!(rule_in_the_way(&rules), None, "{rules}");
    }
}

#[test]
fn the_answer_follows_the_rules() {
    if !require::root() || !nft() {
        return;
    }
    let netns = NetNs::new("steer-t", "follows").unwrap();
    let conntrack = netns.run(|| Conntrack::new(Handling::ByRules)).unwrap();
    run(&netns, "nft", &[TRACKING]);
    for _ in 0..2 {
        assert_eq!(ask(&netns, &conntrack), None);
        // More rules than one answer of the kernel has room for.
        let many = "tcp dport 1 counter drop; ".repeat(2000);
        let chain = format!("type filter hook input priority 0; {many} ct state invalid drop;");
        run(&netns, "nft", &[&format!("table inet f {{ chain c {{ {chain} }}; }}")]);
        assert_eq!(ask(&netns, &conntrack).as_deref(), Some("inet f c"));
        run(&netns, "nft", &["delete table inet f"]);
    }
}

#[test]
fn a_forgotten_connection_has_no_entry() {
    if !require::root() || !nft() {
        return;
    }
    let netns = NetNs::new("steer-t", "forgotten").unwrap();
    let conntrack = netns.run(|| Conntrack::new(Handling::ByRules)).unwrap();
    run(&netns, "nft", &[TRACKING]);
    for address in ["127.0.0.1", "::1"] {
        let forget = || {
            let (peer, local, _sockets) = connect(address);
            assert!(conntrack.is_tracked(peer, local).unwrap());
            conntrack.forget(peer, local).unwrap();
            assert!(!conntrack.is_tracked(peer, local).unwrap());
            // Nothing is left to forget, and that is no error.
            conntrack.forget(local, peer).unwrap();
        };
        netns.run(forget).unwrap();
    }
}
