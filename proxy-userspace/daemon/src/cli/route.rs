//! `steer route`: says where requests would go. It opens no socket, and decides with the same code
//! that serves traffic.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use http::HeaderValue;
use http::header::HOST;
use serde::{Deserialize, Serialize};
use steer_kernel::net::node;
use steer_policy::config::{self, Config, Listener};
use steer_policy::http1::malformed::Malformed;
use steer_policy::http1::request::RequestHead;
use steer_policy::http1::scan::{HeadScan, Limits, Scanned};
use steer_policy::routing::{self, Connection, Refusal};

use crate::telemetry::Metrics;
use crate::upstream::Clusters;

/// The port of a source address without a port.
const SOURCE_PORT: u16 = 50000;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The configuration: native YAML, Envoy v3 bootstrap or Envoy v1 JSON
    #[arg(short, long, value_name = "FILE", env = "STEER_CONFIG")]
    config: PathBuf,
    /// Answer one JSON request for each line of a file, or of stdin for `-`
    #[arg(long, value_name = "FILE", conflicts_with_all = ["host", "path", "method", "headers", "source", "local"])]
    batch: Option<PathBuf>,
    /// The Host header [default: localhost]
    #[arg(long)]
    host: Option<String>,
    /// The request target, with query [default: /]
    #[arg(long)]
    path: Option<String>,
    /// [default: GET]
    #[arg(long)]
    method: Option<String>,
    /// A header line, as `name: value`; may be repeated
    #[arg(long = "header", value_name = "LINE", value_parser = header_line)]
    headers: Vec<(String, Text)>,
    /// The client's address [default: 127.0.0.1:50000]
    #[arg(long, value_name = "IP:PORT")]
    source: Option<String>,
    /// The address that the client connected to; also chooses the listener [default: the
    /// listener's]
    #[arg(long, value_name = "IP:PORT")]
    local: Option<String>,
    /// The listener by name [default: that of the local address, else the first]
    #[arg(long, value_name = "NAME")]
    listener: Option<String>,
    /// The address in x-forwarded-for for clients on loopback [default: this host's first address]
    #[arg(long, value_name = "IP", hide = true)]
    node_address: Option<IpAddr>,
}

fn header_line(line: &str) -> Result<(String, Text), String> {
    let (name, value) = line.split_once(':').ok_or("give `name: value`")?;
    Ok((name.to_owned(), Text::Utf8(value.to_owned())))
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let config = config::load(&args.config)?;
    let router = Router {
        clusters: Clusters::new(&config, &Metrics::new()),
        config: &config,
        node: args.node_address.unwrap_or_else(node::node_address),
        listener: args.listener.as_deref(),
    };
    let mut out = io::stdout().lock();
    let bad = match args.batch.as_deref() {
        Some(path) if path == Path::new("-") => router.answer_all(io::stdin().lock(), &mut out),
        Some(path) => {
            let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
            router.answer_all(BufReader::new(file), &mut out)
        }
        None => {
            let answer = router.answer(&args.request());
            answer.print(&mut out).map(|()| u64::from(!answer.decided))
        }
    };
    let bad = bad.context("cannot read the batch or write the answers")?;
    anyhow::ensure!(bad == 0, "{bad} of the lines are not valid requests: their answers say why");
    Ok(())
}

impl Args {
    fn request(&self) -> Request {
        Request {
            host: self.host.clone().map(Text::Utf8),
            path: self.path.clone().map(Text::Utf8),
            method: self.method.clone(),
            headers: self.headers.clone(),
            source: self.source.clone(),
            local: self.local.clone(),
            listener: None,
        }
    }
}

/// A line of a batch. A field that is absent or null has the default of the flag of the same name.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Request {
    host: Option<Text>,
    path: Option<Text>,
    method: Option<String>,
    headers: Vec<(String, Text)>,
    source: Option<String>,
    local: Option<String>,
    listener: Option<String>,
}

/// Bytes: as a string or, if they are not UTF-8, in hexadecimal.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "expected a string or {\"hex\": \"…\"}")]
enum Text {
    Utf8(String),
    Hex { hex: String },
}

impl Text {
    fn bytes(&self) -> Result<Vec<u8>, String> {
        match self {
            Self::Utf8(text) => Ok(text.as_bytes().to_vec()),
            Self::Hex { hex } => {
                let digits: Option<Vec<u8>> = hex
                    .chars()
                    .map(|digit| digit.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
                    .collect();
                let (pairs, rest) = digits.as_deref().unwrap_or(&[0]).as_chunks::<2>();
                if !rest.is_empty() {
                    return Err(format!("{hex:?} is not pairs of hexadecimal digits"));
                }
                Ok(pairs.iter().map(|[high, low]| high << 4 | low).collect())
            }
        }
    }
}

/// An answer, printed as one line.
#[derive(Debug, Serialize)]
struct Answer {
    cluster: Option<String>,
    endpoint: Option<SocketAddr>,
    /// 16 hexadecimal digits. `None`: the endpoint would be chosen at random, so none is named.
    hash: Option<String>,
    set_cookie: Vec<String>,
    error: Option<String>,
    /// `false`: the line was not a valid request, so nothing was decided.
    #[serde(skip)]
    decided: bool,
}

impl Answer {
    fn refused(error: &str) -> Self {
        Self {
            cluster: None,
            endpoint: None,
            hash: None,
            set_cookie: vec![],
            error: Some(error.to_owned()),
            decided: true,
        }
    }

    fn undecided(error: &str) -> Self {
        Self { decided: false, ..Self::refused(error) }
    }

    /// Flushes, so that a program can ask line by line.
    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        serde_json::to_writer(&mut *out, self)?;
        out.write_all(b"\n")?;
        out.flush()
    }
}

struct Router<'c> {
    config: &'c Config,
    clusters: Clusters,
    node: IpAddr,
    /// The name of the listener for all requests that name none.
    listener: Option<&'c str>,
}

impl<'c> Router<'c> {
    /// Answers each line that is not blank. Returns how many of these lines were not valid
    /// requests.
    fn answer_all(&self, mut lines: impl BufRead, out: &mut impl Write) -> io::Result<u64> {
        let mut bad = 0;
        let mut line = Vec::new();
        // Buffered, so that each answer is one write.
        let mut out = io::BufWriter::new(out);
        for number in 1_u64.. {
            line.clear();
            if lines.read_until(b'\n', &mut line)? == 0 {
                break;
            }
            if line.trim_ascii().is_empty() {
                continue;
            }
            let answer = match Request::parse(&line) {
                Ok(request) => self.answer(&request),
                Err(error) => Answer::undecided(&format!("line {number}: {error}")),
            };
            bad += u64::from(!answer.decided);
            answer.print(&mut out)?;
        }
        Ok(bad)
    }

    fn answer(&self, request: &Request) -> Answer {
        self.decide(request).unwrap_or_else(|error| Answer::undecided(&error))
    }

    /// # Errors
    /// Why the request is not valid: a server would not look at it.
    fn decide(&self, request: &Request) -> Result<Answer, String> {
        let local = request.local.as_deref().map(|text| address(text, None)).transpose()?;
        let listener = self.listener_of(request, local)?;
        let source = request.source.as_deref().map(|text| address(text, Some(SOURCE_PORT))).transpose()?;
        let connection = Connection {
            remote: source.unwrap_or((Ipv4Addr::LOCALHOST, SOURCE_PORT).into()),
            local: local.unwrap_or_else(|| reachable(listener.address)),
            node: self.node,
            interface_index: node::interface_index,
        };
        let (bytes, lines) = request.head()?;
        let mut head = match parse(&bytes, lines) {
            Ok(head) => head,
            Err(Malformed::RepeatedHost) => return Ok(Answer::refused(error_of(Refusal::MissingHost))),
            Err(why) => return Err(why.to_string()),
        };
        let routed = match routing::route(listener, &connection, &mut head) {
            Ok(routed) => routed,
            Err(refusal) => return Ok(Answer::refused(error_of(refusal))),
        };
        let name = &routed.route.cluster;
        let cluster = self.clusters.get(name).ok_or_else(|| format!("there is no cluster {name:?}"))?;
        let (picked, error) = match cluster.pick(routed.hash) {
            Ok(pick) => (Some(pick), None),
            Err(error) => (None, Some(error.to_string())),
        };
        let cookie = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
        Ok(Answer {
            cluster: Some(cluster.name.to_string()),
            endpoint: picked.filter(|_| routed.hash.is_some()).map(|pick| pick.endpoint.address),
            hash: routed.hash.map(|hash| format!("{hash:016x}")),
            set_cookie: routed.set_cookies.iter().map(cookie).collect(),
            error,
            decided: true,
        })
    }

    fn listener_of(&self, request: &Request, local: Option<SocketAddr>) -> Result<&'c Listener, String> {
        let listeners = &self.config.listeners;
        if let Some(name) = request.listener.as_deref().or(self.listener) {
            let named = listeners.iter().find(|listener| listener.name == name);
            return named.ok_or_else(|| format!("no listener is called {name:?}"));
        }
        let at = |local: SocketAddr| {
            let exact = listeners.iter().find(|listener| listener.address == local);
            exact.or_else(|| listeners.iter().find(|listener| listener.address.port() == local.port()))
        };
        local.and_then(at).or_else(|| listeners.first()).ok_or_else(|| "no listener is configured".to_owned())
    }
}

impl Request {
    fn parse(line: &[u8]) -> Result<Self, String> {
        // serde would also accept a JSON array with the fields in order.
        if !line.trim_ascii_start().starts_with(b"{") {
            return Err("not a JSON object".to_owned());
        }
        serde_json::from_slice(line).map_err(|error| error.to_string())
    }

    /// The head, as a client would send it, and the number of its lines.
    fn head(&self) -> Result<(Vec<u8>, usize), String> {
        let mut head = self.method.as_deref().unwrap_or("GET").as_bytes().to_vec();
        head.push(b' ');
        head.extend(self.path.as_ref().map_or_else(|| Ok(b"/".to_vec()), Text::bytes)?);
        head.extend_from_slice(b" HTTP/1.1\r\n");

        let mut lines = Vec::with_capacity(self.headers.len() + 1);
        let given = self.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case(HOST.as_str()));
        match &self.host {
            Some(host) => lines.push(("host", host.bytes()?)),
            None if !given => lines.push(("host", b"localhost".to_vec())),
            None => {}
        }
        for (name, value) in &self.headers {
            lines.push((name, value.bytes()?));
        }
        for (name, value) in &lines {
            head.extend_from_slice(name.as_bytes());
            head.extend_from_slice(b": ");
            head.extend_from_slice(value);
            head.extend_from_slice(b"\r\n");
        }
        head.extend_from_slice(b"\r\n");
        Ok((head, lines.len() + 2))
    }
}

/// Reads a head that was put together of `lines` lines.
fn parse(bytes: &[u8], lines: usize) -> Result<RequestHead<'_>, Malformed> {
    let limits = Limits { head_bytes: usize::MAX, headers: usize::MAX };
    match HeadScan::new(limits).next(bytes) {
        Scanned::Head(len) if len == bytes.len() && memchr::memchr_iter(b'\n', bytes).count() == lines => {
            RequestHead::parse(bytes)
        }
        Scanned::Malformed(why) => Err(why),
        // There is a line break within what is to be one line.
        Scanned::Head(_) | Scanned::Blank(_) | Scanned::Incomplete => Err(Malformed::HeaderLine),
    }
}

fn address(text: &str, default_port: Option<u16>) -> Result<SocketAddr, String> {
    let bare = || {
        let ip: IpAddr = text.trim_matches(['[', ']']).parse().ok()?;
        Some(SocketAddr::new(ip, default_port?))
    };
    text.parse().ok().or_else(bare).ok_or_else(|| format!("{text:?} is not IP:PORT"))
}

/// The address at which a client on this host reaches a listener.
fn reachable(listener: SocketAddr) -> SocketAddr {
    let ip = match listener.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listener.port())
}

fn error_of(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::MissingHost => "not exactly one host",
        Refusal::BadHost => "bad host",
        Refusal::BadTarget => "bad request target",
        Refusal::BadConnection => "bad connection header",
        Refusal::Http10 => "http/1.0 not accepted",
        Refusal::NoRoute => "no route",
        Refusal::UpgradeNotAllowed => "upgrade not allowed",
    }
}
