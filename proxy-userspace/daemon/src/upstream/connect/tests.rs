//! Against real sockets on loopback. The ports are ones that the kernel gives to nobody, and each test has its own.

use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex};

use steer_policy::config::LbPolicy;
use tokio::net::TcpListener;

use super::*;

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// No way to connect without timestamps.
const IMPOSSIBLE: fn(IpAddr, IpAddr) -> Option<u32> = |_, _| None;

struct Rig {
    connector: Connector,
    ports: SourcePorts,
    metrics: Arc<Metrics>,
    listener: TcpListener,
}

impl Rig {
    async fn new(sources: &[&str], ports: RangeInclusive<u16>) -> Self {
        let metrics = Metrics::new();
        let cluster = config::Cluster {
            name: "sio".to_owned(),
            lb_policy: LbPolicy::RING_HASH,
            connect_timeout: Duration::from_secs(5),
            endpoints: Vec::new(),
            healthy_panic_threshold: 50.0,
            source_addresses: sources.iter().map(|source| source.parse().unwrap()).collect(),
        };
        let ports = SourcePorts::new(&[ports], &metrics);
        let connector = Connector::new(&cluster, &metrics);
        Self { connector, ports, metrics, listener: TcpListener::bind((HERE, 0)).await.unwrap() }
    }

    fn endpoint(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    async fn stream(&self) -> Connected {
        self.connector.connect_stream(self.endpoint(), None, Some(&self.ports), &IMPOSSIBLE).await.unwrap()
    }

    fn used(&self) -> i64 {
        let endpoint = self.endpoint().to_string();
        self.metrics.source_ports.with_label_values(&[endpoint.as_str(), "used"]).get()
    }
}

#[tokio::test]
async fn a_stream_has_a_leased_port_and_others_are_relayed_from_the_kernels() {
    let rig = Rig::new(&[], 20100..=20101).await;
    let streams = [rig.stream().await, rig.stream().await];
    for (stream, port) in streams.iter().zip([20100, 20101]) {
        let address = SocketAddr::new(HERE, port);
        assert_eq!(stream.source.as_ref().map(Lease::address), Some(address));
        assert_eq!(stream.socket.local_addr().unwrap(), address);
    }
    // In the order in which they are acknowledged, which a request would do.
    let port = async || rig.listener.accept().await.unwrap().1.port();
    assert_eq!(port().await + port().await, 20100 + 20101);
    let more = rig.stream().await;
    assert!(more.source.is_none());
    assert!(!(20100..=20101).contains(&more.socket.local_addr().unwrap().port()));
    assert_eq!(rig.used(), 2);
    drop(streams);
    assert_eq!(rig.used(), 0);
}

#[tokio::test]
async fn one_port_serves_several_endpoints() {
    let rig = Rig::new(&[], 20110..=20110).await;
    let other = TcpListener::bind((HERE, 0)).await.unwrap();
    let first = rig.stream().await;
    let second = rig
        .connector
        .connect_stream(other.local_addr().unwrap(), None, Some(&rig.ports), &IMPOSSIBLE)
        .await
        .unwrap();
    assert_eq!(first.socket.local_addr().unwrap(), second.socket.local_addr().unwrap());
    assert!(first.source.is_some() && second.source.is_some());
}

#[tokio::test]
async fn ports_of_others_are_passed_over() {
    let rig = Rig::new(&[], 20120..=20122).await;
    let _listens = TcpListener::bind((HERE, 20120)).await.unwrap();
    let connected =
        connect_from("127.0.0.1:20121".parse().unwrap(), rig.endpoint(), None, None).await.unwrap();
    let stream = rig.stream().await;
    assert_eq!(stream.socket.local_addr().unwrap().port(), 20122);
    assert_eq!(rig.used(), 1);
    assert!(connected.is_some());
    assert!(rig.stream().await.source.is_none(), "the two others are left alone for a while");
}

#[tokio::test]
async fn source_addresses_are_used_evenly_and_by_ordinary_connections_too() {
    let rig = Rig::new(&["127.0.0.2", "::2", "127.0.0.3"], 20130..=20139).await;
    let mut streams = Vec::new();
    for _ in 0..20 {
        streams.push(rig.stream().await);
    }
    assert!(streams.iter().all(|stream| stream.source.is_some()));
    let from = |last| {
        let from =
            |stream: &&Connected| stream.socket.local_addr().unwrap().ip() == Ipv4Addr::new(127, 0, 0, last);
        streams.iter().filter(from).count()
    };
    assert_eq!((from(2), from(3)), (10, 10));
    let relayed = rig.stream().await;
    assert!(relayed.source.is_none());
    let plain = rig.connector.connect(rig.endpoint()).await.unwrap();
    for socket in [relayed.socket, plain] {
        assert_ne!(socket.local_addr().unwrap().ip(), HERE);
    }
}

#[tokio::test]
async fn an_endpoint_learns_what_the_client_accepts() {
    let rig = Rig::new(&[], 20140..=20149).await;
    for (accepts, expected) in [(1000, 900..=1000), (20, 40..=88), (u16::MAX, 30000..=65483)] {
        let client = Some(ClientTcp { accepts, told: accepts, window_scale: 7, timestamps: true });
        let _stream = rig
            .connector
            .connect_stream(rig.endpoint(), client, Some(&rig.ports), &IMPOSSIBLE)
            .await
            .unwrap();
        let (socket, _) = rig.listener.accept().await.unwrap();
        let mss = SockRef::from(&socket).tcp_mss().unwrap();
        assert!(expected.contains(&mss), "{mss} for {accepts}");
    }
}

#[tokio::test]
async fn an_endpoint_is_told_windows_in_units_of_the_clients() {
    let rig = Rig::new(&[], 20200..=20229).await;
    let plain = TcpInfo::of(&rig.stream().await.socket).unwrap().receive_scale();
    rig.listener.accept().await.unwrap();
    for window_scale in 0..=14 {
        let client = Some(ClientTcp { accepts: 1460, told: 1460, window_scale, timestamps: true });
        let stream = rig
            .connector
            .connect_stream(rig.endpoint(), client, Some(&rig.ports), &IMPOSSIBLE)
            .await
            .unwrap();
        let (socket, _) = rig.listener.accept().await.unwrap();
        let told = TcpInfo::of(&socket).unwrap().send_scale();
        assert_eq!(told, window_scale.min(plain));
        assert_eq!(TcpInfo::of(&stream.socket).unwrap().receive_scale(), told);
    }
}

#[tokio::test]
async fn only_a_client_without_timestamps_is_connected_with_a_mark_that_is_taken_off_again() {
    let rig = Rig::new(&["127.0.0.2"], 20240..=20249).await;
    let asked = Mutex::new(Vec::new());
    let mark = |source, endpoint| {
        asked.lock().unwrap().push((source, endpoint));
        Some(0x1234)
    };
    for timestamps in [true, false] {
        let client = Some(ClientTcp { accepts: 1460, told: 1460, window_scale: 7, timestamps });
        let stream =
            rig.connector.connect_stream(rig.endpoint(), client, Some(&rig.ports), &mark).await.unwrap();
        assert!(stream.source.is_some());
        assert_eq!(SockRef::from(&stream.socket).mark().unwrap(), 0);
        let expected = if timestamps { vec![] } else { vec![(IpAddr::from([127, 0, 0, 2]), HERE)] };
        assert_eq!(*asked.lock().unwrap(), expected);
    }
}

#[tokio::test]
async fn what_an_endpoint_accepts_is_asked_once_if_the_client_may_send_more() {
    let rig = Rig::new(&[], 20170..=20179).await;
    let client = Some(ClientTcp { accepts: 1000, told: 1460, window_scale: 7, timestamps: true });
    let stream =
        rig.connector.connect_stream(rig.endpoint(), client, Some(&rig.ports), &IMPOSSIBLE).await.unwrap();
    assert!(stream.source.as_ref().unwrap().endpoint_mss().unwrap() > 1460);
    let port = async || rig.listener.accept().await.unwrap().1.port();
    assert!(!(20170..=20179).contains(&port().await), "asked on another connection");
    assert_eq!(port().await, 20170);
    let _more =
        rig.connector.connect_stream(rig.endpoint(), client, Some(&rig.ports), &IMPOSSIBLE).await.unwrap();
    assert_eq!(port().await, 20171);
}

#[tokio::test]
async fn a_source_address_that_is_not_here_is_an_error() {
    let rig = Rig::new(&["192.0.2.1"], 20150..=20159).await;
    let error =
        rig.connector.connect_stream(rig.endpoint(), None, Some(&rig.ports), &IMPOSSIBLE).await.unwrap_err();
    assert!(matches!(error, ConnectError::Failed { .. }), "{error:?}");
}

#[tokio::test]
async fn a_source_address_that_is_not_here_is_passed_over() {
    let rig = Rig::new(&["192.0.2.1", "127.0.0.2"], 20180..=20199).await;
    for _ in 0..10 {
        let stream = rig.stream().await;
        assert_eq!(stream.source.unwrap().address().ip(), Ipv4Addr::new(127, 0, 0, 2));
        rig.connector.connect(rig.endpoint()).await.unwrap();
    }
}

#[tokio::test]
async fn a_refused_stream_gives_its_port_back() {
    let rig = Rig::new(&[], 20160..=20160).await;
    let endpoint = rig.endpoint();
    let Rig { connector, ports, metrics, listener } = rig;
    drop(listener);
    for _ in 0..3 {
        let error = connector.connect_stream(endpoint, None, Some(&ports), &IMPOSSIBLE).await.unwrap_err();
        assert!(matches!(error, ConnectError::Refused { .. }), "{error:?}");
    }
    let endpoint = endpoint.to_string();
    assert_eq!(metrics.source_ports.with_label_values(&[endpoint.as_str(), "used"]).get(), 0);
}
