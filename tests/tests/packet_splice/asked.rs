//! A stream that the process itself ends while the kernel carries it.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use steer::http;
use steer::splice::packet::Predecessor;
use steer::splice::{Session, Splicer};
use steer::streams::ports::SourcePorts;
use steer::streams::{End, Path, StreamInfo, Streams};
use steer::telemetry::Metrics;
use steer::upstream::connect::{Connected, Connector};
use steer::upstream::mss::ClientTcp;
use steer_policy::config;
use steer_tests::instance::Instance;
use steer_tests::require;
use steer_tests::topology::Topology;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::net::{ENDPOINT_PORT, FRONT_PORT};
use crate::stream::HANG;

/// The parts of a `steer` in the namespace of this thread, and what is at its ends.
struct Bed<'t> {
    topology: &'t Topology,
    front: SocketAddr,
    endpoint: TcpListener,
    connector: Connector,
    ports: SourcePorts,
    splicer: Splicer,
    streams: Arc<Streams>,
    metrics: Arc<Metrics>,
}

impl<'t> Bed<'t> {
    fn new(topology: &'t Topology, instance: &str) -> Self {
        let front = SocketAddr::from((Topology::PROXY, FRONT_PORT));
        let address = SocketAddr::from((Topology::endpoint(0), ENDPOINT_PORT));
        let text = format!(
            "
listeners: [{{ address: '{front}', routes: [{{ cluster: sio }}] }}]
clusters: [{{ name: sio, lb_policy: ring_hash, endpoints: ['{address}'] }}]
splice: packet
instance: {instance}
"
        );
        let config = config::parse(&text, "test").unwrap().config;
        let metrics = Metrics::new();
        let streams = Streams::new(&metrics);
        let splicer =
            Splicer::start(Arc::clone(&metrics), Arc::clone(&streams), &config, Predecessor::Exited).unwrap();
        let endpoint = topology.endpoints[0].run(|| TcpListener::bind(address).unwrap()).unwrap();
        Self {
            topology,
            front,
            endpoint,
            connector: Connector::new(&config.clusters[0], &metrics),
            ports: SourcePorts::start(None, &metrics).unwrap(),
            splicer,
            streams,
            metrics,
        }
    }

    /// Both peers of a stream that the kernel carries.
    async fn spliced(&self) -> (TcpStream, TcpStream) {
        let tokio = |socket: std::net::TcpStream| {
            socket.set_nonblocking(true).unwrap();
            TcpStream::from_std(socket).unwrap()
        };
        let listener = tokio::net::TcpListener::from_std(http::bind(self.front).unwrap()).unwrap();
        let connect = || std::net::TcpStream::connect(self.front).unwrap();
        let client = tokio(self.topology.clients.run(connect).unwrap());
        let (downstream, _) = listener.accept().await.unwrap();
        let endpoint = self.endpoint.local_addr().unwrap();
        let client_tcp = ClientTcp::of(&downstream);
        let Connected { socket: upstream, source } = self
            .connector
            .connect_stream(endpoint, client_tcp, Some(&self.ports), &|_, _| None)
            .await
            .unwrap();
        let backend = tokio(self.endpoint.accept().unwrap().0);
        let guard = self.streams.open(StreamInfo {
            client: client.local_addr().unwrap(),
            cluster: "sio".into(),
            endpoint,
            key_hash: None,
        });
        let session = Session {
            downstream,
            upstream,
            source,
            to_upstream: Default::default(),
            to_downstream: Default::default(),
            idle_timeout: None,
            guard,
        };
        timeout(HANG, self.splicer.carry(session)).await.expect("the kernel takes the stream");
        (client, backend)
    }
}

#[test]
fn a_spliced_stream_that_is_asked_to_end_resets_both_peers() {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let instance = Instance::new().unwrap();
    let test = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let bed = Bed::new(&topology, instance.name());
            let (mut client, mut backend) = bed.spliced().await;
            let [stream] = &bed.streams.of_endpoint(bed.endpoint.local_addr().unwrap())[..] else {
                panic!("one stream is live")
            };
            assert_eq!(stream.path(), Path::Packet);
            client.write_all(b"carried").await.unwrap();
            timeout(HANG, backend.read_exact(&mut [0; 7])).await.unwrap().unwrap();

            stream.end(End::IdleTimeout);
            for peer in [&mut client, &mut backend] {
                let error = timeout(HANG, peer.read(&mut [0])).await.expect("a RST comes").unwrap_err();
                assert_eq!(error.kind(), ErrorKind::ConnectionReset);
            }
            assert!(bed.streams.is_empty());
            let closed = &bed.metrics.streams_closed;
            assert_eq!(closed.with_label_values(&["sio", "idle_timeout"]).get(), 1);
            bed.splicer.stop().await;
        });
    };
    topology.proxy.run(test).unwrap();
}
