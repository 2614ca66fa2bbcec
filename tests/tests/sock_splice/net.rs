//! Clients, proxy and endpoint in their own namespaces, with a socket splice.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use steer::splice::Session;
use steer::splice::sock::SockSplice;
use steer::streams::{StreamInfo, Streams};
use steer::telemetry::Metrics;
use steer_kernel::bpf::sock::maps::Entries;
use steer_tests::require;
use steer_tests::topology::Topology;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::sleep;

/// Both connections of a stream: the peers' sockets, and the proxy's.
pub(crate) struct Legs {
    pub(crate) client: TcpStream,
    pub(crate) downstream: TcpStream,
    pub(crate) upstream: TcpStream,
    pub(crate) backend: TcpStream,
}

pub(crate) struct Net {
    topology: Topology,
    front: TcpListener,
    endpoint: TcpListener,
    pub(crate) splice: Arc<SockSplice>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) streams: Arc<Streams>,
}

impl Net {
    fn new() -> Self {
        let topology = Topology::new(1).unwrap();
        let listen = |address: SocketAddr| move || TcpListener::bind(address).unwrap();
        let front = topology.proxy.run(listen((Topology::PROXY, 8080).into())).unwrap();
        let endpoint = topology.endpoints[0].run(listen((Topology::endpoint(0), 3000).into())).unwrap();
        let metrics = Metrics::new();
        let streams = Streams::new(&metrics);
        let splice = SockSplice::start(Arc::clone(&metrics)).expect("the socket splice starts");
        Self { topology, front, endpoint, splice, metrics, streams }
    }

    pub(crate) fn legs(&self, count: usize) -> Vec<Legs> {
        // The thread that connects must be in the namespace. Any thread can accept.
        let connect = |netns: &steer_tests::netns::NetNs, listener: &TcpListener| {
            let address = listener.local_addr().unwrap();
            let pair = || {
                let near = std::net::TcpStream::connect(address).unwrap();
                (near, listener.accept().unwrap().0)
            };
            netns.run(|| (0..count).map(|_| pair()).collect::<Vec<_>>()).unwrap()
        };
        let front = connect(&self.topology.clients, &self.front);
        let back = connect(&self.topology.proxy, &self.endpoint);
        let tokio = |stream: std::net::TcpStream| {
            stream.set_nonblocking(true).unwrap();
            stream.set_nodelay(true).unwrap();
            TcpStream::from_std(stream).unwrap()
        };
        front
            .into_iter()
            .zip(back)
            .map(|((client, downstream), (upstream, backend))| Legs {
                client: tokio(client),
                downstream: tokio(downstream),
                upstream: tokio(upstream),
                backend: tokio(backend),
            })
            .collect()
    }

    pub(crate) fn session(
        &self,
        downstream: TcpStream,
        upstream: TcpStream,
        [to_upstream, to_downstream]: [Bytes; 2],
        idle_timeout: Option<Duration>,
    ) -> Session {
        let info = StreamInfo {
            client: downstream.peer_addr().unwrap(),
            cluster: "sio".into(),
            endpoint: upstream.peer_addr().unwrap(),
            key_hash: None,
        };
        let guard = self.streams.open(info);
        Session { downstream, upstream, source: None, to_upstream, to_downstream, idle_timeout, guard }
    }

    /// Splices a new stream, and returns the peers' sockets.
    pub(crate) fn spliced(&self, idle_timeout: Option<Duration>) -> (TcpStream, TcpStream, JoinHandle<()>) {
        let Legs { client, downstream, upstream, backend } = self.legs(1).remove(0);
        let session = self.session(downstream, upstream, Default::default(), idle_timeout);
        let splice = Arc::clone(&self.splice);
        let carried = tokio::spawn(async move {
            splice.carry(session).await.expect("the session is spliced");
        });
        (client, backend, carried)
    }

    pub(crate) fn ended(&self, end: &str) -> u64 {
        self.metrics.streams_closed.with_label_values(&["sio", end]).get()
    }

    pub(crate) fn fallbacks(&self, reason: &str) -> u64 {
        self.metrics.splice_fallbacks.with_label_values(&[reason]).get()
    }

    pub(crate) async fn expect_entries(&self, expected: Entries) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.splice.entries() != expected {
            assert!(Instant::now() < deadline, "{:?}, not {expected:?}", self.splice.entries());
            sleep(Duration::from_millis(5)).await;
        }
    }
}

const NO_ENTRIES: Entries = Entries { target: 0, source: 0, flow: 0, credit: 0 };
pub(crate) const ONE_SESSION: Entries = Entries { target: 2, source: 2, flow: 2, credit: 2 };

/// Runs a test with the splice, and checks that nothing of the splice is left.
pub(crate) fn with_net<F: Future<Output = ()>>(test: impl FnOnce(Arc<Net>) -> F) {
    if !require::root() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let net = Arc::new(Net::new());
        let before = open_descriptors();
        test(Arc::clone(&net)).await;
        assert_eq!(net.streams.len(), 0, "streams are left");
        net.expect_entries(NO_ENTRIES).await;
        assert_eq!(open_descriptors(), before, "descriptors are left");
    });
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
