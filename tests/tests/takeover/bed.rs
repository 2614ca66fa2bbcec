//! One `steer` between clients and an endpoint, under load.

use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use steer_tests::eventually::eventually;
use steer_tests::require;
use steer_tests::socketio;
use steer_tests::steer::{Attach, Steer, binary, binary_with_failpoints};
use steer_tests::topology::Topology;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;

use crate::load::{Load, Size, serve};

const FRONT_PORT: u16 = 8080;
const ENDPOINT_PORT: u16 = 3000;
/// Much longer than any step takes. A step that takes longer hangs.
pub(crate) const HANG: Duration = Duration::from_secs(60);

pub(crate) const SMALL: Size = Size { streams: 20, short_streams: 2, clients: 4 };

/// The addresses of proxy and endpoint.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ends {
    pub(crate) front: SocketAddr,
    pub(crate) endpoint: SocketAddr,
}

pub(crate) fn v4() -> Ends {
    Ends {
        front: (Topology::PROXY, FRONT_PORT).into(),
        endpoint: (Topology::endpoint(0), ENDPOINT_PORT).into(),
    }
}

pub(crate) fn v6() -> Ends {
    Ends {
        front: (Topology::PROXY6, FRONT_PORT).into(),
        endpoint: (Topology::endpoint6(0), ENDPOINT_PORT).into(),
    }
}

/// A configuration for these hosts. `more` are further keys.
pub(crate) fn config(ends: Ends, more: &str) -> String {
    format!("{more}\n{}", socketio::config(ends.front, &[ends.endpoint]))
}

/// Splices packets. The linger is so short that no test has to wait for it.
pub(crate) const PACKET: &str = "splice: packet\npacket_splice: { linger: 1s }\n";

pub(crate) fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// The binary that dies at chosen places. `None` if it was not built.
pub(crate) fn failpoints() -> Option<PathBuf> {
    let binary = binary_with_failpoints();
    if binary.is_none() {
        require::skip("needs `cargo build -p steer --features failpoints --target-dir target/failpoints`");
    }
    binary
}

pub(crate) struct Bed<'n> {
    pub(crate) topology: &'n Topology,
    pub(crate) steer: Steer<'n>,
    pub(crate) ends: Ends,
}

impl<'n> Bed<'n> {
    pub(crate) fn start(topology: &'n Topology, ends: Ends, more: &str) -> Self {
        Self::start_attaching(Attach::Links, topology, ends, more)
    }

    pub(crate) fn start_attaching(attach: Attach, topology: &'n Topology, ends: Ends, more: &str) -> Self {
        let steer = Steer::start_attaching(attach, &config(ends, more), Some(&topology.proxy), &[]).unwrap();
        Self { topology, steer, ends }
    }

    /// Runs `work` while the endpoint serves.
    pub(crate) fn with_endpoint(&mut self, work: impl FnOnce(&mut Self)) {
        thread::scope(|scope| {
            let (topology, address) = (self.topology, self.ends.endpoint);
            let (stop, stopped) = oneshot::channel::<()>();
            let (listens, listening) = std::sync::mpsc::channel();
            let endpoint = scope.spawn(move || {
                topology.endpoints[0].run(|| {
                    runtime().block_on(async {
                        let listener = TcpListener::bind(address).await.unwrap();
                        listens.send(()).unwrap();
                        tokio::select! {
                            () = serve(listener) => {}
                            _ = stopped => {}
                        }
                    });
                })
            });
            listening.recv().unwrap();
            let worked = catch_unwind(AssertUnwindSafe(|| work(self)));
            drop(stop);
            endpoint.join().unwrap().unwrap();
            worked.unwrap_or_else(|panic| resume_unwind(panic));
        });
    }

    /// Runs `work` under load, then ends the load. Nothing may have gone wrong.
    pub(crate) fn under_load(&mut self, size: Size, work: impl FnOnce(&mut Self, &Load)) {
        self.with_endpoint(|bed| {
            let load = Arc::new(Load::default());
            thread::scope(|scope| {
                let (topology, front, of_clients) = (bed.topology, bed.ends.front, Arc::clone(&load));
                let clients = scope.spawn(move || {
                    topology.clients.run(|| runtime().block_on(of_clients.clients(front, size)))
                });
                let worked = catch_unwind(AssertUnwindSafe(|| {
                    let all = "all lasting streams open";
                    let open = || load.opened.load(Ordering::Relaxed) == u64::from(size.streams);
                    eventually(all, HANG, || Ok(open().then_some(()))).unwrap();
                    work(bed, &load);
                }));
                load.stop();
                clients.join().unwrap().unwrap();
                worked.unwrap_or_else(|panic| resume_unwind(panic));
            });
            let errors = load.errors.lock().unwrap();
            let some: Vec<_> = errors.iter().take(20).collect();
            assert!(errors.is_empty(), "{} things went wrong: {some:#?}", errors.len());
            eprintln!(
                "{} connections, {} requests, {} messages, {} short streams",
                load.connections.load(Ordering::Relaxed),
                load.requests.load(Ordering::Relaxed),
                load.messages.load(Ordering::Relaxed),
                load.short_streams.load(Ordering::Relaxed)
            );
        });
    }

    /// How many streams the kernel carries, according to the serving process.
    pub(crate) fn spliced(&self) -> usize {
        self.steer.flows().unwrap().iter().filter(|row| row["path"] == "packet").count()
    }

    /// Waits until the kernel carries at least `streams` streams.
    pub(crate) fn expect_spliced(&self, streams: u32) {
        let spliced = || Ok((self.spliced() >= streams as usize).then_some(()));
        eventually("all lasting streams on the packet path", HANG, spliced).unwrap();
    }

    /// Waits until Steer has nothing of any stream.
    pub(crate) fn expect_no_stream(&self) {
        let used = |name| self.steer.metric(name, &[("kind", "used")]);
        let gone = eventually("end of all streams", HANG, || {
            let is_used = used("steer_packet_streams")? + used("steer_source_ports")? > 0.0;
            Ok((!is_used && self.steer.flows()?.is_empty()).then_some(()))
        });
        gone.unwrap();
    }

    /// The log of a `steer run --takeover` in a namespace, which must be refused.
    pub(crate) fn refused(&self, netns: &steer_tests::netns::NetNs, args: &[&str]) -> String {
        let mut command = Command::new(binary().unwrap());
        command.args(["run", "-c"]).arg(self.steer.config()).args(["--admin", "off", "--takeover"]);
        command.args(["--instance", self.steer.instance()]).args(args);
        netns.enter(&mut command).unwrap();
        let Output { status, stderr, .. } = command.output().unwrap();
        let said = String::from_utf8(stderr).unwrap();
        assert!(!status.success(), "{said}");
        said
    }
}
