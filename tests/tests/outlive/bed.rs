//! One `steer` between clients and an endpoint, the traffic through `steer`, and what it leaves in
//! the kernel.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use aya::programs::{SchedClassifier, TcAttachType};
use proxy_common::abi;
use serde_json::Value;
use steer_tests::eventually::eventually;
use steer_tests::steer::{Attach, Steer, wrapped};
use steer_tests::topology::Topology;
use steer_tests::{instance, socketio, sockets};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};

use crate::traffic::{Traffic, serve};

pub(crate) const FRONT_PORT: u16 = 8080;
pub(crate) const ENDPOINT_PORT: u16 = 3000;
/// Much longer than any step takes. A step that takes longer hangs.
pub(crate) const HANG: Duration = Duration::from_secs(30);
const DEVICES: [&str; 3] = ["lo", "clients", "endpoint0"];

pub(crate) fn front() -> SocketAddr {
    SocketAddr::from((Topology::PROXY, FRONT_PORT))
}

pub(crate) fn endpoint() -> SocketAddr {
    SocketAddr::from((Topology::endpoint(0), ENDPOINT_PORT))
}

fn front6() -> SocketAddr {
    SocketAddr::from((Topology::PROXY6, FRONT_PORT))
}

fn endpoint6() -> SocketAddr {
    SocketAddr::from((Topology::endpoint6(0), ENDPOINT_PORT))
}

/// A configuration for these hosts. `packet_splice` are further keys, as `key: value` lines.
pub(crate) fn config(packet_splice: &[&str]) -> String {
    config_for(front(), endpoint(), packet_splice)
}

fn config_for(front: SocketAddr, endpoint: SocketAddr, packet_splice: &[&str]) -> String {
    let mut config = "splice: packet\npacket_splice:\n  linger: 1s\n".to_owned();
    config.extend(packet_splice.iter().map(|line| format!("  {line}\n")));
    config + &socketio::config(front, &[endpoint])
}

pub(crate) fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

pub(crate) struct Bed<'n> {
    pub(crate) topology: &'n Topology,
    pub(crate) steer: Steer<'n>,
    pub(crate) front: SocketAddr,
    endpoint: SocketAddr,
    /// See [`Steer::start_wrapped`].
    wrapper: Vec<String>,
}

impl<'n> Bed<'n> {
    pub(crate) fn start(topology: &'n Topology, packet_splice: &[&str]) -> Self {
        Self::start_attaching(Attach::Links, topology, packet_splice)
    }

    pub(crate) fn start_attaching(attach: Attach, topology: &'n Topology, packet_splice: &[&str]) -> Self {
        Self::start_with(attach, topology, &config(packet_splice))
    }

    pub(crate) fn start_ipv6(topology: &'n Topology, packet_splice: &[&str]) -> Self {
        let (front, endpoint) = (front6(), endpoint6());
        let config = config_for(front, endpoint, packet_splice);
        Self { front, endpoint, ..Self::start_with(Attach::Links, topology, &config) }
    }

    /// Starts Steer with `config` as the whole configuration.
    pub(crate) fn start_with(attach: Attach, topology: &'n Topology, config: &str) -> Self {
        let steer = Steer::start_attaching(attach, config, Some(&topology.proxy), &[]).unwrap();
        Self { topology, steer, front: front(), endpoint: endpoint(), wrapper: Vec::new() }
    }

    /// Like [`Steer::start_wrapped`]: `wrapper` runs each process of Steer and each command of
    /// [`cli`](Self::cli).
    pub(crate) fn start_wrapped(topology: &'n Topology, wrapper: Vec<String>) -> Self {
        let steer = Steer::start_wrapped(&wrapper, &config(&[]), Some(&topology.proxy)).unwrap();
        Self { topology, steer, front: front(), endpoint: endpoint(), wrapper }
    }

    /// Writes another configuration of the packet splice. The next start reads it.
    pub(crate) fn configure(&self, packet_splice: &[&str]) {
        let config = config_for(self.front, self.endpoint, packet_splice);
        fs::write(self.steer.config(), config).unwrap();
    }

    /// Runs `work` while `streams` spliced streams echo. Then closes the streams. All of them must
    /// have been intact.
    pub(crate) fn under_traffic(&mut self, streams: u32, work: impl FnOnce(&mut Self, &Traffic)) {
        let traffic = Arc::new(Traffic::default());
        // Binds before the first client needs the endpoint.
        let at = self.endpoint;
        let listener = self.topology.endpoints[0].run(|| std::net::TcpListener::bind(at).unwrap()).unwrap();
        listener.set_nonblocking(true).unwrap();
        thread::scope(|scope| {
            let (topology, front) = (self.topology, self.front);
            let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
            let endpoint = scope.spawn(move || {
                topology.endpoints[0].run(|| {
                    runtime().block_on(async {
                        let listener = TcpListener::from_std(listener).unwrap();
                        tokio::select! {
                            () = serve(listener) => {}
                            _ = stopped => {}
                        }
                    });
                })
            });
            let of_clients = Arc::clone(&traffic);
            let clients = scope.spawn(move || {
                topology.clients.run(|| runtime().block_on(of_clients.clients(front, streams)))
            });
            // Catches a panic, so that the clients and the endpoint are always stopped.
            let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                self.expect_spliced(&traffic, streams);
                work(self, &traffic);
            }));
            traffic.stop();
            clients.join().unwrap().unwrap();
            // Fails only if the endpoint has panicked, which `join` reports.
            stop.send(()).ok();
            endpoint.join().unwrap().unwrap();
            worked.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        });
        let errors = traffic.errors.lock().unwrap();
        let some: Vec<_> = errors.iter().take(20).collect();
        assert!(errors.is_empty(), "{} of {streams} streams are damaged: {some:#?}", errors.len());
    }

    fn expect_spliced(&mut self, traffic: &Traffic, streams: u32) {
        let opened = eventually("all streams on the packet path", HANG, || {
            let errors = traffic.errors.lock().unwrap();
            anyhow::ensure!(errors.is_empty(), "{errors:?}");
            let is_open = traffic.opened.load(Ordering::Relaxed) == streams;
            Ok((is_open && self.spliced() == streams as usize).then_some(()))
        });
        opened.unwrap();
    }

    /// How many streams have no socket any more.
    pub(crate) fn spliced(&self) -> usize {
        let sockets = self.topology.proxy.run(sockets::tcp).unwrap().unwrap();
        let held = sockets
            .iter()
            .filter(|socket| socket.state == sockets::State::Connection && socket.remote == self.endpoint);
        let rows = self.rows();
        rows.iter().filter(|row| row["path"] == "packet").count().saturating_sub(held.count())
    }

    pub(crate) fn rows(&self) -> Vec<Value> {
        self.steer.flows().unwrap()
    }

    pub(crate) fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.steer.metric(name, labels).unwrap()
    }

    /// Waits until Steer has nothing of any stream.
    pub(crate) fn expect_no_stream(&self) {
        let gone = eventually("end of all streams", HANG, || {
            let used = ["steer_packet_streams", "steer_source_ports"]
                .map(|name| self.metric(name, &[("kind", "used")]));
            Ok((self.rows().is_empty() && used == [0.0; 2]).then_some(()))
        });
        gone.unwrap();
    }

    /// The directory of the instance's maps.
    pub(crate) fn maps(&self) -> PathBuf {
        self.pins().join(format!("abi{}", abi::ABI_VERSION))
    }

    pub(crate) fn pins(&self) -> PathBuf {
        Path::new(instance::DIRECTORY).join(self.steer.instance())
    }

    /// The binary under test.
    pub(crate) fn binary(&self) -> PathBuf {
        self.steer.attach().binary().unwrap()
    }

    /// The output of `steer ARGS --instance ...` in the proxy's namespace.
    pub(crate) fn cli(&self, args: &[&str]) -> Output {
        let mut command = wrapped(&self.wrapper, &self.binary());
        command.args(args).args(["--instance", self.steer.instance()]);
        self.topology.proxy.enter(&mut command).unwrap();
        command.output().unwrap()
    }

    /// The standard output of the same command, which must succeed.
    pub(crate) fn cli_text(&self, args: &[&str]) -> String {
        let output = self.cli(args);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The standard output of `steer ARGS` in the proxy's namespace of `topology`. The command must
    /// succeed.
    pub(crate) fn cli_in(&self, topology: &Topology, args: &[&str]) -> String {
        let mut command = Command::new(self.binary());
        command.args(args);
        topology.proxy.enter(&mut command).unwrap();
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

/// Everything that a Steer can leave in a network namespace and in the BPF file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// For each device: the number of links, and of filters.
    programs: Vec<(String, [usize; 2])>,
    qdiscs: String,
    sockets: usize,
    /// Whether the instance's pins exist, and whether its directory of sockets exists.
    directories: [bool; 2],
    /// The settings of `net.ipv4` and `net.core`, by path.
    sysctls: BTreeMap<PathBuf, String>,
}

impl Kernel {
    pub(crate) fn now(topology: &Topology, pins: &Path) -> Self {
        let attached = |device: &str| {
            let of = |hook| SchedClassifier::query_tcx(device, hook).unwrap().1.len();
            let links = of(TcAttachType::Ingress) + of(TcAttachType::Egress);
            (device.to_owned(), [links, filters_of(topology, device)])
        };
        let look = || {
            let mut sysctls = BTreeMap::new();
            for tree in ["/proc/sys/net/ipv4", "/proc/sys/net/core"] {
                read_sysctls(Path::new(tree), &mut sysctls);
            }
            // The kernel itself forgets connections that have ended.
            let owned = |socket: &sockets::Tuple| socket.state != sockets::State::Unowned;
            (
                DEVICES.map(attached).to_vec(),
                sysctls,
                sockets::tcp().unwrap().into_iter().filter(owned).count(),
            )
        };
        let (programs, sysctls, sockets) = topology.proxy.run(look).unwrap();
        Self {
            programs,
            qdiscs: tc(topology, &["qdisc", "show"]),
            sockets,
            directories: [
                pins.exists(),
                Path::new(instance::SOCKETS).join(pins.file_name().unwrap()).exists(),
            ],
            sysctls,
        }
    }

    /// Waits until the state is the same again. The kernel detaches a program a little after its
    /// link is gone.
    pub(crate) fn expect(&self, topology: &Topology, pins: &Path) {
        let is_so = eventually("the kernel as it was", HANG, || {
            Ok((Self::now(topology, pins) == *self).then_some(()))
        });
        // Shows what differs.
        is_so.unwrap_or_else(|_| assert_eq!(Self::now(topology, pins), *self));
    }
}

/// The output of `tc` about the proxy's interfaces.
pub(crate) fn tc(topology: &Topology, args: &[&str]) -> String {
    let mut tc = Command::new("tc");
    tc.args(args);
    topology.proxy.enter(&mut tc).unwrap();
    String::from_utf8(tc.output().unwrap().stdout).unwrap()
}

/// How many filters of Steer a device of the proxy has.
pub(crate) fn filters_of(topology: &Topology, device: &str) -> usize {
    let shown = ["ingress", "egress"].map(|hook| tc(topology, &["filter", "show", "dev", device, hook]));
    shown.iter().flat_map(|shown| shown.lines()).filter(|line| line.contains(" packet_")).count()
}

/// Reads all settings of a tree that can be read.
fn read_sysctls(tree: &Path, found: &mut BTreeMap<PathBuf, String>) {
    for entry in fs::read_dir(tree).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read_sysctls(&path, found);
        } else if let Ok(value) = fs::read_to_string(&path) {
            found.insert(path, value);
        }
    }
}
