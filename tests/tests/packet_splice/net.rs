//! One `steer` between a client's host and an endpoint's, and its state as seen from outside.

use std::io::{self, ErrorKind};
use std::iter;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};
use steer_tests::eventually::eventually;
use steer_tests::netns::NetNs;
use steer_tests::sockets::State;
use steer_tests::steer::Steer;
pub(crate) use steer_tests::topology::Family;
use steer_tests::topology::Topology;
use steer_tests::{require, socketio, sockets};

use crate::maps;
use crate::stream::{HANG, Stream, accept_upgrade, ask_upgrade, read_head};

pub(crate) const FRONT_PORT: u16 = 8080;
pub(crate) const ENDPOINT_PORT: u16 = 3000;
/// How long the tuple of a finished stream stays in these tests.
pub(crate) const LINGER: Duration = Duration::from_secs(1);
/// A reset is repeated after a second. The tuple goes a second later, and Steer checks once a
/// second. Then there are grace periods. The machine may be busy.
pub(crate) const GONE_WITHIN: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Path {
    Packet,
    Relay,
}

impl Path {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Packet => "packet",
            Self::Relay => "relay",
        }
    }
}

/// The parameters of [`Net::start`].
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) path: Path,
    pub(crate) front: SocketAddr,
    pub(crate) endpoint: SocketAddr,
    /// Further keys of `packet_splice`, as `key: value` lines.
    pub(crate) packet_splice: Vec<String>,
    pub(crate) source_addresses: Vec<IpAddr>,
}

impl Setup {
    /// The client is on its own host, the endpoint on the first of the endpoints' hosts.
    pub(crate) fn new(path: Path, family: Family) -> Self {
        Self::of_families(path, family, family)
    }

    /// The same with a client and an endpoint of these families.
    pub(crate) fn of_families(path: Path, client: Family, endpoint: Family) -> Self {
        let front = match client {
            Family::V4 => IpAddr::from(Topology::PROXY),
            Family::V6 => Topology::PROXY6.into(),
        };
        let endpoint = match endpoint {
            Family::V4 => IpAddr::from(Topology::endpoint(0)),
            Family::V6 => Topology::endpoint6(0).into(),
        };
        Self {
            path,
            front: SocketAddr::new(front, FRONT_PORT),
            endpoint: SocketAddr::new(endpoint, ENDPOINT_PORT),
            packet_splice: Vec::new(),
            source_addresses: Vec::new(),
        }
    }

    pub(crate) fn with(mut self, line: &str) -> Self {
        self.packet_splice.push(line.to_owned());
        self
    }

    pub(crate) fn config(&self) -> String {
        let mut config = format!("splice: {}\n", self.path.as_str());
        if self.path == Path::Packet {
            config += &format!("packet_splice:\n  linger: {}s\n", LINGER.as_secs());
            config.extend(self.packet_splice.iter().map(|line| format!("  {line}\n")));
        }
        config += &socketio::config(self.front, &[self.endpoint]);
        if !self.source_addresses.is_empty() {
            let addresses: Vec<_> = self.source_addresses.iter().map(|a| format!("\"{a}\"")).collect();
            config += &format!("  source_addresses: [{}]\n", addresses.join(", "));
        }
        config
    }
}

pub(crate) struct Net<'n> {
    pub(crate) topology: &'n Topology,
    pub(crate) steer: Steer<'n>,
    pub(crate) setup: Setup,
    clients: &'n NetNs,
    listener: TcpListener,
}

impl<'n> Net<'n> {
    pub(crate) fn start(topology: &'n Topology, setup: Setup) -> Self {
        // Each address belongs to one host. Loopback addresses belong to the proxy's host.
        let near = setup.endpoint.ip().is_loopback();
        let host = if near { &topology.proxy } else { &topology.endpoints[0] };
        Self::between(topology, setup, &topology.clients, host)
    }

    /// Starts Steer with clients and the endpoint on other hosts than those of the topology.
    pub(crate) fn between(
        topology: &'n Topology,
        setup: Setup,
        clients: &'n NetNs,
        endpoint: &NetNs,
    ) -> Self {
        let listener = endpoint.run(|| listen(setup.endpoint)).unwrap();
        let steer = Steer::start(&setup.config(), Some(&topology.proxy), &[]).unwrap();
        Self { topology, steer, setup, clients, listener }
    }

    /// Moves the clients to the proxy's own host.
    pub(crate) fn with_clients_beside_the_proxy(mut self) -> Self {
        self.clients = &self.topology.proxy;
        self
    }

    /// Opens a stream, and returns it after its 101.
    pub(crate) fn open(&self) -> Stream {
        self.open_from(None)
    }

    /// The same from the client's address `local`.
    pub(crate) fn open_from(&self, local: Option<SocketAddr>) -> Stream {
        self.open_with(|socket| {
            // If the port is to be used again, the first socket must have set this option, too.
            socket.set_reuse_address(true).unwrap();
            if let Some(local) = local {
                socket.bind(&local.into()).unwrap();
            }
        })
    }

    /// The same. `prepare` changes the client's socket before it connects.
    pub(crate) fn open_with(&self, prepare: impl FnOnce(&Socket) + Send) -> Stream {
        self.open_at(self.setup.front, prepare)
    }

    /// The same through another Steer, which listens at `front` and has the same endpoint.
    pub(crate) fn open_at(&self, front: SocketAddr, prepare: impl FnOnce(&Socket) + Send) -> Stream {
        let connect = || {
            let socket = Socket::new(Domain::for_address(front), Type::STREAM, Some(Protocol::TCP)).unwrap();
            prepare(&socket);
            socket.connect_timeout(&front.into(), HANG).unwrap();
            TcpStream::from(socket)
        };
        let mut client = self.clients.run(connect).unwrap();
        ask_upgrade(&mut client, front);
        let backend = accept_upgrade(&self.listener);
        let head = read_head(&mut client);
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        Stream::new(client, backend)
    }

    /// Opens a stream and waits until the configured path carries it. With the packet splice, the
    /// proxy's namespace then has no socket for it.
    pub(crate) fn carried(&self) -> Stream {
        self.carried_from(None)
    }

    pub(crate) fn carried_from(&self, local: Option<SocketAddr>) -> Stream {
        let mut stream = self.open_from(local);
        self.expect_path(&stream, self.setup.path);
        stream.echo();
        stream
    }

    /// Waits until `path` carries the stream.
    pub(crate) fn expect_path(&self, stream: &Stream, path: Path) {
        let settled = eventually(&format!("stream on path {}", path.as_str()), HANG, || {
            let row = self.row(stream);
            let row = row.as_ref().filter(|row| row["path"] == path.as_str());
            Ok(row.is_some_and(|_| path == Path::Relay || self.sockets_of(stream).is_empty()).then_some(()))
        });
        settled.unwrap_or_else(|error| {
            panic!("{error:#}; row: {:?}, sockets: {:?}", self.row(stream), self.sockets_of(stream))
        });
    }

    /// Waits until Steer has decided to relay the stream, and expects `reason`.
    pub(crate) fn expect_relayed(&self, stream: &Stream, reason: &str) {
        // Before the stream is old enough for a hand-over, it is relayed without a reason.
        let decided = || Ok(self.row(stream).filter(|row| !row["reason"].is_null()));
        let row = eventually("reason of a relayed stream", HANG, decided).unwrap();
        assert_eq!((&row["path"], &row["reason"]), (&Path::Relay.as_str().into(), &reason.into()), "{row}");
        assert!(self.steer.metric("steer_splice_fallback_total", &[("reason", reason)]).unwrap() >= 1.0);
    }

    /// The stream's row in `/flows`.
    pub(crate) fn row(&self, stream: &Stream) -> Option<Value> {
        let client = stream.client_address.to_string();
        self.steer.flows().unwrap().into_iter().find(|row| row["client"] == client.as_str())
    }

    pub(crate) fn sockets_of(&self, stream: &Stream) -> Vec<sockets::Tuple> {
        let mut all = self.topology.proxy.run(sockets::tcp).unwrap().unwrap();
        let tuples = stream.proxy_tuples();
        all.retain(|one| one.state == State::Connection && tuples.contains(&(one.local, one.remote)));
        all
    }

    pub(crate) fn packets(&self, what: &str) -> u64 {
        self.steer.metric("steer_packet_total", &[("what", what)]).unwrap() as u64
    }

    pub(crate) fn ended(&self, end: &str) -> u64 {
        self.steer.metric("steer_streams_closed_total", &[("end", end)]).unwrap() as u64
    }

    /// Waits until nothing of any stream is left.
    pub(crate) fn expect_nothing_left(&self) {
        let left = || {
            let used = |metric| self.steer.metric(metric, &[("kind", "used")]).unwrap();
            let proxy = &self.topology.proxy;
            let sockets = proxy.run(sockets::tcp).unwrap().unwrap();
            let sockets = sockets
                .into_iter()
                .filter(|socket| socket.local == self.setup.front || socket.remote == self.setup.endpoint);
            [
                self.steer.flows().unwrap().len(),
                used("steer_packet_streams") as usize,
                used("steer_source_ports") as usize,
                maps::flow_keys(self.steer.pid()),
                sockets.filter(|socket| socket.state == State::Connection).count(),
            ]
        };
        let begin = Instant::now();
        let mut last = left();
        while last != [0; 5] {
            let waited = begin.elapsed();
            assert!(
                waited < GONE_WITHIN,
                "after {waited:?} [rows, records, ports, keys, sockets] = {last:?}"
            );
            thread::sleep(Duration::from_millis(50));
            last = left();
        }
    }
}

/// Waits until an earlier listener of the address is gone. A process that another case starts holds
/// that listener for a moment, between fork and exec.
fn listen(address: SocketAddr) -> TcpListener {
    let free = || match try_listen(address) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => Ok(None),
        result => Ok(Some(result?)),
    };
    eventually("a free address to listen at", HANG, free).unwrap()
}

fn try_listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(1024)?;
    Ok(socket.into())
}

/// The relay, and the packet splice between peers of each family.
pub(crate) fn every_path() -> impl Iterator<Item = Setup> {
    let spliced = Family::BOTH
        .into_iter()
        .flat_map(|client| Family::BOTH.map(|endpoint| Setup::of_families(Path::Packet, client, endpoint)));
    iter::once(Setup::new(Path::Relay, Family::V4)).chain(spliced)
}

/// Runs a scenario on every path, one after the other.
pub(crate) fn on_every_path(scenario: impl Fn(&mut Net<'_>)) {
    every_path().for_each(|setup| on(setup, &scenario));
}

/// Runs all cases at the same time, each in its own network. For scenarios that mostly wait. Not
/// for scenarios in which a closed socket has to be gone at once: a process that another case
/// starts holds such a socket for a moment, too.
pub(crate) fn at_once<T: Send>(cases: impl IntoIterator<Item = T>, run: impl Fn(T) + Sync) {
    let run = &run;
    thread::scope(|scope| {
        for case in cases {
            scope.spawn(move || run(case));
        }
    });
}

/// Runs a scenario with this setup.
pub(crate) fn on(setup: Setup, scenario: impl Fn(&mut Net<'_>)) {
    if !require::root() {
        return;
    }
    eprintln!("--- {} {} {}", setup.path.as_str(), setup.front, setup.endpoint);
    let topology = Topology::new(2).unwrap();
    let mut net = Net::start(&topology, setup);
    scenario(&mut net);
}
