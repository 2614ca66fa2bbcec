//! A proxy, backends and clients for the tests.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use proxy_common::instance::Instance;
use socket2::SockRef;
use steer::http::{self, Generation, Phase, Shared, Worker};
use steer::splice::Splicer;
use steer::splice::packet::Predecessor;
use steer::streams::Streams;
use steer::telemetry::Metrics;
use steer::upstream::Clusters;
use steer::upstream::pool::Pool;
use steer_policy::config::{
    Cluster, Config, Endpoint, HashFunction, HashPolicy, HashSource, HeaderSource, Health, HttpOptions,
    LbPolicy, Listener, PacketSplice, PathMatch, Route, SpliceMode, VirtualHost,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Longer than any step of these tests takes.
const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) async fn in_time<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what}: nothing in {PATIENCE:?}"))
}

/// Waits until `condition` holds.
pub(crate) async fn eventually(what: &str, condition: impl Fn() -> bool) {
    in_time(what, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

/// A proxy that runs in this process.
pub(crate) struct Steer {
    pub(crate) address: SocketAddr,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) streams: Arc<Streams>,
    generation: Arc<ArcSwap<Generation>>,
    drain: watch::Sender<Phase>,
    served: JoinHandle<()>,
}

/// The configuration of a proxy: one listener, one route for everything, one cluster.
pub(crate) struct Setup {
    pub(crate) options: HttpOptions,
    pub(crate) timeout: Option<Duration>,
    pub(crate) connect_timeout: Duration,
    pub(crate) endpoints: Vec<SocketAddr>,
    /// The kernel buffers as little of a response as possible.
    pub(crate) small_send_buffers: bool,
}

impl Setup {
    /// Every path goes to `endpoints`, hashed by x-forwarded-for. Upgrades are allowed.
    pub(crate) fn new(endpoints: &[SocketAddr]) -> Self {
        Self {
            options: HttpOptions { upgrade_websocket: true, ..HttpOptions::default() },
            timeout: Some(Duration::from_secs(15)),
            connect_timeout: Duration::from_secs(5),
            endpoints: endpoints.to_vec(),
            small_send_buffers: false,
        }
    }

    pub(crate) async fn start(self) -> Steer {
        Steer::start(&self.config(), self.small_send_buffers)
    }

    fn config(&self) -> Config {
        let route = |path: &str, upgrade_websocket| Route {
            path: PathMatch::Prefix(path.into()),
            cluster: "c".into(),
            timeout: self.timeout,
            idle_timeout: None,
            upgrade_websocket,
            hash_policy: vec![HashPolicy {
                source: HashSource::Header {
                    name: HeaderSource::Name(::http::HeaderName::from_static("x-forwarded-for")),
                    rewrite: None,
                },
                terminal: false,
            }],
        };
        Config {
            listeners: vec![Listener {
                name: "test".into(),
                address: "127.0.0.1:0".parse().unwrap(),
                options: self.options.clone(),
                virtual_hosts: vec![VirtualHost {
                    name: "all".into(),
                    domains: vec!["*".into()],
                    routes: vec![route("/plain", Some(false)), route("/", None)],
                }],
            }],
            clusters: vec![Cluster {
                name: "c".into(),
                lb_policy: LbPolicy::RingHash {
                    hash_function: HashFunction::XxHash,
                    minimum_ring_size: 1024,
                    maximum_ring_size: LbPolicy::DEFAULT_MAXIMUM_RING_SIZE,
                },
                connect_timeout: self.connect_timeout,
                endpoints: self
                    .endpoints
                    .iter()
                    .map(|&address| Endpoint {
                        address,
                        weight: 1,
                        hash_key: address.to_string(),
                        health: Health::Healthy,
                    })
                    .collect(),
                healthy_panic_threshold: 50.0,
                source_addresses: Vec::new(),
            }],
            admin: None,
            splice: SpliceMode::Relay,
            packet_splice: PacketSplice::default(),
            instance: Instance::default(),
            drain_timeout: Duration::from_secs(10),
            warnings: Vec::new(),
        }
    }
}

impl Steer {
    fn start(config: &Config, small_send_buffers: bool) -> Self {
        let metrics = Metrics::new();
        let streams = Streams::new(&metrics);
        let splicer = Splicer::start(Arc::clone(&metrics), Arc::clone(&streams), config, Predecessor::Exited);
        let clusters = Arc::new(Clusters::new(config, &metrics));
        let generation = Arc::new(ArcSwap::from_pointee(Generation::new(&config.listeners, &clusters)));
        let shared = Arc::new(Shared {
            generation: Arc::clone(&generation),
            pool: Pool::default(),
            ports: None,
            splicer: Arc::new(splicer.unwrap()),
            streams: Arc::clone(&streams),
            metrics: Arc::clone(&metrics),
            node: "192.0.2.2".parse().unwrap(),
        });
        let listener = &config.listeners[0];
        let socket = http::bind(listener.address).unwrap();
        if small_send_buffers {
            // Accepted sockets inherit the size. The kernel doubles the size and has a minimum.
            SockRef::from(&socket).set_send_buffer_size(1).unwrap();
        }
        let address = socket.local_addr().unwrap();
        let (drain, drained) = watch::channel(Phase::Open);
        let worker = Worker::new(Handle::current(), shared);
        let served =
            tokio::spawn(http::serve(listener.name.clone(), Arc::new(socket), vec![worker], drained));
        Self { address, metrics, streams, generation, drain, served }
    }

    pub(crate) async fn client(&self) -> Client {
        Client { socket: TcpStream::connect(self.address).await.unwrap(), read: Vec::new() }
    }

    /// Replaces the configuration.
    pub(crate) fn publish(&self, setup: &Setup) {
        let config = setup.config();
        self.publish_listeners(&config.listeners, &config);
    }

    /// Replaces the configuration with one that does not have the listener.
    pub(crate) fn remove_listener(&self) {
        self.publish_listeners(&[], &Setup::new(&[]).config());
    }

    fn publish_listeners(&self, listeners: &[Listener], config: &Config) {
        let clusters = Arc::new(Clusters::new(config, &self.metrics));
        self.generation.store(Arc::new(Generation::new(listeners, &clusters)));
    }

    pub(crate) fn faults(&self, kind: &str) -> u64 {
        self.metrics.faults.with_label_values(&[kind]).get()
    }

    pub(crate) fn all_faults(&self) -> String {
        let text = self.metrics.render();
        text.lines().filter(|line| line.starts_with("steer_faults_total")).collect::<Vec<_>>().join(" ")
    }

    pub(crate) fn requests(&self, cluster: &str, code: &str) -> u64 {
        self.metrics.requests.with_label_values(&[cluster, code]).get()
    }

    pub(crate) fn connects(&self, result: &str) -> u64 {
        self.metrics.upstream_connects.with_label_values(&["c", result]).get()
    }

    pub(crate) fn open_connections(&self) -> i64 {
        self.metrics.downstream_connections.with_label_values(&["test"]).get()
    }

    pub(crate) fn drain(&self, phase: Phase) {
        self.drain.send(phase).unwrap();
    }

    pub(crate) async fn served(self) {
        in_time("drain", self.served).await.unwrap();
    }
}

/// One end of a connection, for which the test writes every byte: a client of the proxy, or a
/// backend.
pub(crate) struct Client {
    pub(crate) socket: TcpStream,
    read: Vec<u8>,
}

impl Client {
    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.socket.write_all(bytes.as_ref()).await.unwrap();
    }

    /// Reads a head up to its empty line. `None` if the connection ended before.
    pub(crate) async fn try_head(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.read.windows(4).position(|four| four == b"\r\n\r\n") {
                let head: Vec<u8> = self.read.drain(..end + 4).collect();
                return Some(String::from_utf8_lossy(&head).into_owned());
            }
            if self.socket.read_buf(&mut self.read).await.ok()? == 0 {
                return None;
            }
        }
    }

    pub(crate) async fn head(&mut self) -> String {
        in_time("a head", self.try_head()).await.expect("the connection ended before a head")
    }

    /// Reads up to and including `end`.
    pub(crate) async fn until(&mut self, end: &str) -> String {
        let mut read = Vec::new();
        while !read.ends_with(end.as_bytes()) {
            read.extend(self.exactly(1).await);
        }
        String::from_utf8(read).unwrap()
    }

    pub(crate) async fn exactly(&mut self, len: usize) -> Vec<u8> {
        in_time("bytes", async {
            while self.read.len() < len {
                assert_ne!(
                    self.socket.read_buf(&mut self.read).await.unwrap(),
                    0,
                    "ended after {:?}",
                    String::from_utf8_lossy(&self.read)
                );
            }
        })
        .await;
        self.read.drain(..len).collect()
    }

    /// The head of a response, and its body by Content-Length.
    pub(crate) async fn response(&mut self) -> (String, String) {
        let head = self.head().await;
        let body = self.exactly(content_length(&head).unwrap_or(0)).await;
        (head, String::from_utf8(body).unwrap())
    }

    /// Everything until the end of the connection. `Err` after a reset.
    pub(crate) async fn rest(&mut self) -> std::io::Result<Vec<u8>> {
        in_time("the end", self.socket.read_to_end(&mut self.read)).await?;
        Ok(std::mem::take(&mut self.read))
    }

    /// A response that must be the last on the connection.
    pub(crate) async fn last_response(&mut self) -> (String, String) {
        let response = self.response().await;
        assert_eq!(self.rest().await.unwrap(), b"", "after {response:?}");
        response
    }
}

pub(crate) fn content_length(head: &str) -> Option<usize> {
    header(head, "content-length").map(|value| value.parse().unwrap())
}

/// The value of the header `name`, if the head has one.
pub(crate) fn header<'h>(head: &'h str, name: &str) -> Option<&'h str> {
    head.lines().skip(1).find_map(|line| {
        let (found, value) = line.split_once(':')?;
        found.eq_ignore_ascii_case(name).then_some(value.trim())
    })
}

pub(crate) fn status(head: &str) -> &str {
    head.split(' ').nth(1).unwrap_or_default()
}

/// A server that handles each connection with a closure.
pub(crate) struct Backend {
    pub(crate) address: SocketAddr,
    connections: Arc<AtomicUsize>,
    heads: Arc<Mutex<Vec<String>>>,
    accepting: JoinHandle<()>,
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Backend {
    pub(crate) async fn start<F>(handle: impl Fn(Client) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        let accepting = tokio::spawn(async move {
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                count.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(handle(Client { socket, read: Vec::new() }));
            }
        });
        Self { address, connections, heads: Arc::default(), accepting }
    }

    /// Answers each request with 200 and `PORT BODY`, and remembers the heads.
    pub(crate) async fn echo() -> Self {
        let heads = Arc::new(Mutex::new(Vec::new()));
        let remembered = Arc::clone(&heads);
        let mut backend = Self::start(move |mut client| {
            let heads = Arc::clone(&remembered);
            async move {
                let port = client.socket.local_addr().unwrap().port();
                while let Some(head) = client.try_head().await {
                    let body = match (content_length(&head), header(&head, "transfer-encoding")) {
                        (Some(length), _) => client.exactly(length).await,
                        (None, Some(_)) => client.chunked().await,
                        (None, None) => Vec::new(),
                    };
                    let is_head = head.starts_with("HEAD ");
                    heads.lock().unwrap().push(head);
                    let body = format!("{port} {}", String::from_utf8(body).unwrap());
                    let mut response = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
                    if !is_head {
                        response += &body;
                    }
                    if client.socket.write_all(response.as_bytes()).await.is_err() {
                        break;
                    }
                }
            }
        })
        .await;
        backend.heads = heads;
        backend
    }

    /// Answers every request head with `response`, and continues to read.
    pub(crate) async fn canned(response: &'static [u8]) -> Self {
        Self::start(move |mut client| async move {
            while client.try_head().await.is_some() {
                client.send(response).await;
            }
        })
        .await
    }

    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    pub(crate) fn heads(&self) -> Vec<String> {
        self.heads.lock().unwrap().clone()
    }
}

impl Client {
    /// Reads a chunked body without trailers, and decodes it.
    pub(crate) async fn chunked(&mut self) -> Vec<u8> {
        let mut body = Vec::new();
        loop {
            let mut line = Vec::new();
            while !line.ends_with(b"\r\n") {
                line.extend(self.exactly(1).await);
            }
            let size = usize::from_str_radix(std::str::from_utf8(&line).unwrap().trim(), 16).unwrap();
            let chunk = self.exactly(size + 2).await;
            assert_eq!(&chunk[size..], b"\r\n");
            if size == 0 {
                return body;
            }
            body.extend_from_slice(&chunk[..size]);
        }
    }
}

impl From<TcpStream> for Client {
    fn from(socket: TcpStream) -> Self {
        Self { socket, read: Vec::new() }
    }
}
