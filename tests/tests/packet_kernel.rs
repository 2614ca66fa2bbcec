//! The packet splice's programs, maps and interfaces (`bpf::packet`), in namespaces.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::cell::RefCell;
use std::ffi::CString;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::process::Command;
use std::time::Duration;

use aya::programs::{SchedClassifier, TcAttachType};
use bytemuck::Zeroable as _;
use proxy_common::flow::{Direction, FlowEvent, FlowRef, Record, event, state};
use proxy_common::stat::Stat;
use socket2::{Domain, SockRef, Socket, Type};
use steer_kernel::bpf::packet::{
    AttachError, FlowEvents, FlowKey, Hook, InsertError, PacketKernel, wire_address, wire_ports,
};
use steer_kernel::net::host::LOOPBACK_IFINDEX;
use steer_tests::netns::NetNs;
use steer_tests::require;
use tokio::runtime::{Builder, Runtime};

const NEAR: &str = "10.75.0.1:8080";
const FAR: &str = "10.75.0.2:40000";
const MARK: u32 = 0x5b11_ce00;
const HOOKS: [Hook; 2] = [Hook::Tcx, Hook::Clsact];

/// Two namespaces, each with one end of the veth pair `wire`.
struct Network {
    near: NetNs,
    far: NetNs,
}

impl Network {
    fn new() -> Self {
        let network =
            Self { near: NetNs::new("steer-t", "near").unwrap(), far: NetNs::new("steer-t", "far").unwrap() };
        network.join(&[]);
        network
    }

    fn join(&self, near: &[&str]) {
        let (add, peer) =
            (["link", "add", "name", "wire"], ["type", "veth", "peer", "name", "wire", "netns"]);
        self.near.ip(&[&add, near, &peer, &[self.far.name()]].concat()).unwrap();
        for (netns, address) in [(&self.near, "10.75.0.1/24"), (&self.far, "10.75.0.2/24")] {
            netns.ip(&["address", "add", address, "dev", "wire"]).unwrap();
            netns.ip(&["link", "set", "wire", "up"]).unwrap();
        }
    }

    /// Runs `work` in the near namespace, inside a runtime, with all programs loaded and attached
    /// to the wire.
    fn with_programs(&self, hook: Hook, work: impl FnOnce(&PacketKernel, Reader<'_>) + Send) {
        let inside = || {
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            let _entered = runtime.enter();
            let (kernel, events) = PacketKernel::load_for(hook, 16, MARK, None).unwrap();
            kernel.attach(index_of("wire")).unwrap();
            work(&kernel, Reader { runtime: &runtime, events });
        };
        self.near.run(inside).unwrap();
    }

    /// Opens a connection from the far side and sends four bytes.
    fn connect(&self) {
        let near: SocketAddr = NEAR.parse().unwrap();
        let listener = TcpListener::bind(near).unwrap();
        let talk = || {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket.bind(&FAR.parse::<SocketAddr>().unwrap().into()).unwrap();
            socket.connect_timeout(&near.into(), Duration::from_secs(5)).unwrap();
            (&socket).write_all(b"word").unwrap();
            // Leaves no socket in TIME_WAIT.
            SockRef::from(&socket).set_linger(Some(Duration::ZERO)).unwrap();
            let (mut accepted, _) = listener.accept().unwrap();
            accepted.read_exact(&mut [0; 4]).unwrap();
        };
        self.far.run(talk).unwrap();
    }

    /// The programs on an interface, in order: the kernel's names of tcx programs, and the output
    /// of `tc` about filters.
    fn attached(&self, interface: &str, direction: TcAttachType) -> Vec<String> {
        let tcx = || {
            let (_, programs) = SchedClassifier::query_tcx(interface, direction).unwrap();
            programs.iter().map(|program| program.name_as_str().unwrap().to_owned()).collect()
        };
        let mut names: Vec<String> = self.near.run(tcx).unwrap();
        let hook = if direction == TcAttachType::Ingress { "ingress" } else { "egress" };
        let mut tc = Command::new("tc");
        tc.args(["filter", "show", "dev", interface, hook]);
        self.near.enter(&mut tc).unwrap();
        let filters = String::from_utf8(tc.output().unwrap().stdout).unwrap();
        // A filter's line has `handle 0x1 NAME/TOKEN direct-action`, and may have the name a second
        // time.
        let words: Vec<_> = filters.split_whitespace().collect();
        let named = words.windows(3).filter(|words| words[0] == "handle");
        let named = named.map(|words| words[2].split('/').next().unwrap().to_owned());
        names.extend(named);
        names
    }
}

/// Reads the events, in the runtime that the events need.
struct Reader<'a> {
    runtime: &'a Runtime,
    events: FlowEvents,
}

impl Reader<'_> {
    /// The events that are there. Waits for the next one if there is none.
    fn read(&mut self) -> Vec<FlowEvent> {
        let seen = RefCell::new(Vec::new());
        let read = async {
            let read = self.events.read(|event| seen.borrow_mut().push(event));
            tokio::time::timeout(Duration::from_secs(5), read).await
        };
        self.runtime.block_on(read).unwrap().unwrap();
        seen.into_inner()
    }
}

fn index_of(interface: &str) -> u32 {
    let name = CString::new(interface).unwrap();
    // SAFETY: the pointer is to a string that ends with a nul.
    unsafe { libc::if_nametoindex(name.as_ptr()) }
}

fn key() -> FlowKey {
    FlowKey::new(FAR.parse().unwrap(), NEAR.parse().unwrap())
}

/// A record whose packets to upstream arrive with [`key`].
fn record() -> Record {
    let [far, near]: [SocketAddr; 2] = [FAR, NEAR].map(|address| address.parse().unwrap());
    let mut record = Record { family: 4, ..Record::zeroed() };
    // These packets arrive on the connection on which the packets to downstream leave.
    let fixed = &mut record.flows[Direction::ToDownstream as usize].fixed;
    fixed.to_source = wire_address(near.ip());
    fixed.to_destination = wire_address(far.ip());
    fixed.to_ports = wire_ports(near.port(), far.port());
    assert_eq!(FlowKey::of(&record, Direction::ToUpstream), key());
    record
}

fn count(kernel: &PacketKernel, stat: Stat) -> u64 {
    kernel.stats().unwrap().into_iter().find(|(which, _)| *which == stat).unwrap().1
}

/// The ingress program has seen the SYN of a client whose record is not active. The egress program
/// has seen the stack's answer, which takes the tuple from the record.
fn ensure_both_saw(kernel: &PacketKernel) {
    assert_eq!((count(kernel, Stat::PassOff), count(kernel, Stat::Reused)), (1, 1));
    assert!(kernel.keys().unwrap().is_empty());
}

#[test]
fn programs_see_packets_as_long_as_they_are_attached() {
    if !require::root() {
        return;
    }
    let network = Network::new();
    for hook in HOOKS {
        network.with_programs(hook, |kernel, _| {
            for interface in ["wire", "lo"] {
                // A second attachment changes nothing.
                kernel.attach(index_of(interface)).unwrap();
                kernel.attach(index_of(interface)).unwrap();
                for (direction, program) in
                    [(TcAttachType::Ingress, "packet_ingress"), (TcAttachType::Egress, "packet_egress")]
                {
                    assert_eq!(network.attached(interface, direction), [program], "{hook:?} {interface}");
                }
            }
            network.connect();
            assert_eq!(count(kernel, Stat::PassOff), 0);
            kernel.insert(&key(), FlowRef::new(3, Direction::ToUpstream)).unwrap();
            network.connect();
            ensure_both_saw(kernel);
            assert_eq!(count(kernel, Stat::Spliced), 0);
        });
        for interface in ["wire", "lo"] {
            for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
                assert!(network.attached(interface, direction).is_empty(), "{hook:?} {interface}");
            }
        }
    }
}

#[test]
fn an_interface_that_comes_back_is_attached_again() {
    if !require::root() {
        return;
    }
    for hook in HOOKS {
        let network = Network::new();
        network.with_programs(hook, |kernel, _| {
            let index = index_of("wire");
            kernel.insert(&key(), FlowRef::new(3, Direction::ToUpstream)).unwrap();
            network.near.ip(&["link", "del", "wire"]).unwrap();
            assert!(matches!(kernel.attach(index), Err(AttachError::Gone { .. })));
            // The new interface has the same index, which the kernel gives out only on demand.
            network.join(&["index", &index.to_string()]);
            kernel.attach(index).unwrap();
            assert_eq!(network.attached("wire", TcAttachType::Ingress), ["packet_ingress"], "{hook:?}");
            network.connect();
            ensure_both_saw(kernel);
        });
    }
}

#[test]
fn changes_of_other_interfaces_do_not_matter() {
    if !require::root() {
        return;
    }
    let network = Network::new();
    network.near.ip(&["link", "add", "bridge", "type", "bridge"]).unwrap();
    network.with_programs(Hook::Tcx, |kernel, _| {
        // The kernel sends the same message for a port that leaves its bridge as for a deleted
        // interface.
        for bridge in [&["master", "bridge"][..], &["nomaster"]] {
            network.near.ip(&[&["link", "set", "wire"], bridge].concat()).unwrap();
            kernel.attach(index_of("wire")).unwrap();
            assert_eq!(network.attached("wire", TcAttachType::Ingress), ["packet_ingress"]);
        }
        // More messages than fit into the monitor's socket.
        for _ in 0..60 {
            network.near.ip(&["link", "add", "other", "type", "veth", "peer", "name", "another"]).unwrap();
            network.near.ip(&["link", "del", "other"]).unwrap();
        }
        kernel.attach(index_of("wire")).unwrap();
        assert_eq!(network.attached("wire", TcAttachType::Ingress), ["packet_ingress"]);
    });
}

#[test]
fn only_ethernet_and_loopback_are_attached() {
    if !require::root() {
        return;
    }
    let network = Network::new();
    network.near.ip(&["tuntap", "add", "mode", "tun", "name", "tunnel"]).unwrap();
    network.with_programs(Hook::of_this_kernel(), |kernel, _| {
        let tunnel = kernel.attach(index_of("tunnel")).unwrap_err();
        assert_eq!(tunnel.to_string(), "tunnel is neither Ethernet nor loopback");
        assert!(matches!(kernel.attach(9999), Err(AttachError::Gone { ifindex: 9999 })));
        kernel.attach(LOOPBACK_IFINDEX).unwrap();
    });
}

#[test]
fn a_key_has_one_flow_and_only_that_removes_it() {
    if !require::root() {
        return;
    }
    let network = Network::new();
    network.with_programs(Hook::of_this_kernel(), |kernel, _| {
        let [flow, other] = [1, 2].map(|index| FlowRef::new(index, Direction::ToUpstream));
        let v6 = FlowKey::new("[fd75::2]:1".parse().unwrap(), "[fd75::1]:2".parse().unwrap());
        for key in [key(), v6] {
            kernel.insert(&key, flow).unwrap();
            assert!(matches!(kernel.insert(&key, other), Err(InsertError::Taken)));
            kernel.remove(&key, other);
            assert!(matches!(kernel.insert(&key, other), Err(InsertError::Taken)));
            kernel.remove(&key, flow);
            kernel.remove(&key, flow);
            kernel.insert(&key, other).unwrap();
            kernel.remove(&key, other);
        }
        let numbered = |port| FlowKey::new(SocketAddr::from(([10, 0, 0, 1], port)), NEAR.parse().unwrap());
        for port in 1..=32 {
            kernel.insert(&numbered(port), flow).unwrap();
        }
        assert!(matches!(kernel.insert(&numbered(33), flow), Err(InsertError::Full)));
    });
}

/// The program reads the mapped record, removes the key and tells userspace.
#[test]
fn a_new_connection_takes_the_tuple_of_a_finished_one() {
    if !require::root() {
        return;
    }
    let network = Network::new();
    for hook in HOOKS {
        network.with_programs(hook, |kernel, mut reader| {
            let records = kernel.records();
            let index = records.allocate().unwrap();
            let generation = records.prepare(index, record());
            let flow = FlowRef::new(index, Direction::ToUpstream);
            kernel.insert(&key(), flow).unwrap();
            records.set_state(index, state::FINISHED);
            network.connect();
            assert_eq!((records.state(index), count(kernel, Stat::Reused)), (state::DEAD, 1));
            let expected = FlowEvent { flow, generation, kind: event::REUSED, _pad: 0 };
            assert_eq!(reader.read(), [expected]);
            kernel.insert(&key(), flow).unwrap();
        });
    }
}
