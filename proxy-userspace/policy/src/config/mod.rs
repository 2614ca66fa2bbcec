//! The typed configuration: what every reader (`native`, `envoy_v3`, `envoy_v1`, the flags of
//! `steer run`) produces and everything else consumes. A value of these types has been checked:
//! names resolve, limits hold, regexes compile. Nothing here opens a socket.
//!
//! Words and defaults are Envoy's (v3) unless a field says otherwise.

mod envoy_v1;
mod envoy_v3;
mod error;
mod flags;
mod hash_policy;
mod instance;
mod listening;
mod load;
mod load_balancing;
mod native;
mod packet_splice;
mod print;
mod protobuf_json;
mod re2;
mod reader;
mod scalar;
mod tree;

#[cfg(test)]
mod tests;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use proxy_common::instance::Instance;
use regex::bytes::Regex;

pub use error::{LoadError, Problem};
pub use flags::from_flags;
pub use load::{Format, Loaded, load, parse, read};
pub use native::DEFAULT_ADMIN;
pub use packet_splice::{ConntrackMode, Keepalive, MSS, PacketSplice};
pub use print::to_yaml;

#[derive(Debug, Clone)]
pub struct Config {
    pub listeners: Vec<Listener>,
    pub clusters: Vec<Cluster>,
    /// Where `/healthz`, `/readyz`, `/metrics` and `/flows` are served; `None` = nowhere.
    pub admin: Option<SocketAddr>,
    /// How upgraded streams are carried.
    pub splice: SpliceMode,
    pub packet_splice: PacketSplice,
    /// The packet splice's streams outlive the process under this name; no two processes have the
    /// same.
    pub instance: Instance,
    /// How long a process that another one has taken over from goes on with what is still under way
    /// in it; then it cuts what is left.
    pub drain_timeout: Duration,
    /// What the file asks for and Steer does not honour, without harm to correctness.
    pub warnings: Vec<Warning>,
}

impl Config {
    /// With the defaults for everything else. Only a native file can say otherwise.
    fn new(listeners: Vec<Listener>, clusters: Vec<Cluster>, admin: Option<SocketAddr>) -> Self {
        Self {
            listeners,
            clusters,
            admin,
            splice: SpliceMode::default(),
            packet_splice: PacketSplice::default(),
            instance: Instance::default(),
            drain_timeout: native::DEFAULT_DRAIN_TIMEOUT,
            warnings: Vec::new(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// 1-based; 0 when the setting came from a flag.
    pub line: usize,
    pub column: usize,
    /// One sentence: the field by its path, and what Steer does instead.
    pub text: String,
}

/// Which path carries a stream after its 101.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SpliceMode {
    /// The packet splice where possible, else the relay.
    #[default]
    Auto,
    /// The same, but Steer does not start where it cannot be had at all.
    Packet,
    /// The socket splice where possible, else the relay.
    Sockmap,
    /// The relay: always copy in userspace.
    Relay,
}

impl SpliceMode {
    pub const ALL: [Self; 4] = [Self::Auto, Self::Packet, Self::Sockmap, Self::Relay];

    /// As files and flags name it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Packet => "packet",
            Self::Sockmap => "sockmap",
            Self::Relay => "relay",
        }
    }
}

#[derive(Debug, Clone)]
pub struct Listener {
    pub name: String,
    pub address: SocketAddr,
    pub options: HttpOptions,
    /// In file order; domains are unique over all of them (as Envoy demands).
    pub virtual_hosts: Vec<VirtualHost>,
}

/// The HTTP connection manager's settings.
#[derive(Debug, Clone)]
pub struct HttpOptions {
    /// `true`: the peer's address is the client's; it is appended to x-forwarded-for.
    pub use_remote_address: bool,
    pub xff_num_trusted_hops: u32,
    pub skip_xff_append: bool,
    /// Appended to `via` both ways.
    pub via: Option<String>,
    /// The `server` header of every response.
    pub server_name: String,
    pub generate_request_id: bool,
    pub preserve_external_request_id: bool,
    /// `true`: header names keep the letter case in which a peer wrote them. `false`: they are sent
    /// in lower case.
    pub preserve_case: bool,
    /// `false`: HTTP/1.0 is answered with 426.
    pub accept_http_10: bool,
    /// Whether routes that say nothing allow `Upgrade: websocket`.
    pub upgrade_websocket: bool,
    /// A longer request head is answered with 431.
    pub max_request_headers_bytes: usize,
    /// More request header lines are answered with 431.
    pub max_request_headers_count: usize,
    /// From the first byte of a request head to its end. Steer's default is 10 s (Envoy: off),
    /// since a head that never ends is the cheapest attack there is.
    pub request_headers_timeout: Option<Duration>,
    /// A downstream connection without a request in flight is closed after this.
    pub idle_timeout: Option<Duration>,
    /// A request, or an upgraded stream, on which nothing moves in either direction. Steer's
    /// default is off (Envoy: 5 min), because it ends healthy WebSockets.
    pub stream_idle_timeout: Option<Duration>,
}

impl Default for HttpOptions {
    fn default() -> Self {
        Self {
            use_remote_address: false,
            xff_num_trusted_hops: 0,
            skip_xff_append: false,
            via: None,
            server_name: "steer".to_owned(),
            generate_request_id: true,
            preserve_external_request_id: false,
            accept_http_10: false,
            upgrade_websocket: false,
            preserve_case: false,
            max_request_headers_bytes: 60 * 1024,
            max_request_headers_count: 100,
            request_headers_timeout: Some(Duration::from_secs(10)),
            idle_timeout: Some(Duration::from_secs(3600)),
            stream_idle_timeout: None,
        }
    }
}

#[derive(Debug, Clone)]
pub struct VirtualHost {
    pub name: String,
    /// Lower case: `example.com`, `example.com:8080`, `*.example.com`, `example.*`, `*`.
    pub domains: Vec<String>,
    /// The first match wins.
    pub routes: Vec<Route>,
}

#[derive(Debug, Clone)]
pub struct Route {
    pub path: PathMatch,
    /// The name of one of [`Config::clusters`].
    pub cluster: String,
    /// Until the response head has arrived; `None` = no limit. Steer's default is no limit, since
    /// polls of socket.io wait for up to 25 s. Envoy's files keep Envoy's default of 15 s.
    pub timeout: Option<Duration>,
    /// Overrides [`HttpOptions::stream_idle_timeout`] where set; `Some(None)` = no limit.
    pub idle_timeout: Option<Option<Duration>>,
    /// Overrides [`HttpOptions::upgrade_websocket`].
    pub upgrade_websocket: Option<bool>,
    pub hash_policy: Vec<HashPolicy>,
}

/// Compared bytewise and case-sensitively with the request target, without any normalisation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathMatch {
    Prefix(String),
    /// Ignores the query.
    Exact(String),
}

#[derive(Debug, Clone)]
pub struct HashPolicy {
    pub source: HashSource,
    /// Stop after this policy if there is a hash by now.
    pub terminal: bool,
}

#[derive(Debug, Clone)]
pub enum HashSource {
    Header {
        name: HeaderSource,
        rewrite: Option<RegexRewrite>,
    },
    Cookie(CookiePolicy),
    /// The trusted client address, without port.
    SourceIp,
    QueryParameter {
        name: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeaderSource {
    Name(http::HeaderName),
    /// `:path`
    Path,
    /// `:authority`, also reached as `host`
    Authority,
    /// `:method`
    Method,
    /// `:scheme`
    Scheme,
}

#[derive(Debug, Clone)]
pub struct RegexRewrite {
    pub pattern: Regex,
    /// With `\0`..`\9` for groups and `\\` for a backslash; checked against the pattern's groups.
    pub substitution: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CookiePolicy {
    pub name: String,
    /// Set: a client without the cookie is given one. Zero: a session cookie.
    pub ttl: Option<Duration>,
    pub path: Option<String>,
    /// Name and value; an empty value prints as the bare name.
    pub attributes: Vec<(String, String)>,
}

#[derive(Debug, Clone)]
pub struct Cluster {
    pub name: String,
    pub lb_policy: LbPolicy,
    pub connect_timeout: Duration,
    /// In file order, which the ring depends on. Duplicates are kept, as Envoy does.
    pub endpoints: Vec<Endpoint>,
    /// Percent of healthy endpoints below which all of them are used. Default 50; 0 = never.
    pub healthy_panic_threshold: f64,
    /// Where connections to endpoints come from; those of an endpoint's family share them. Empty:
    /// the kernel's choice. Canonical, without duplicates.
    pub source_addresses: Vec<IpAddr>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LbPolicy {
    RingHash { hash_function: HashFunction, minimum_ring_size: u64, maximum_ring_size: u64 },
    Maglev { table_size: u64 },
}

impl LbPolicy {
    /// A ring with all defaults.
    pub const RING_HASH: Self = Self::RingHash {
        hash_function: HashFunction::XxHash,
        minimum_ring_size: Self::DEFAULT_MINIMUM_RING_SIZE,
        maximum_ring_size: Self::DEFAULT_MAXIMUM_RING_SIZE,
    };
    pub const DEFAULT_MINIMUM_RING_SIZE: u64 = 1024;
    /// Also the greatest value that either ring size may have.
    pub const DEFAULT_MAXIMUM_RING_SIZE: u64 = 8 * 1024 * 1024;
    pub const DEFAULT_TABLE_SIZE: u64 = 65537;
    pub const MAXIMUM_TABLE_SIZE: u64 = 5_000_011;
}

/// Hashes the points of a ring; keys of requests are always xxHash64.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum HashFunction {
    #[default]
    XxHash,
    MurmurHash2,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    pub address: SocketAddr,
    /// 1 or more; the weights of a cluster add up to at most `u32::MAX`.
    pub weight: u32,
    /// What stands for this endpoint on the ring: metadata `hash_key`, else the host name if the
    /// cluster hashes by it, else the address as Envoy prints it.
    pub hash_key: String,
    /// As configured.
    pub health: Health,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Health {
    #[default]
    Healthy,
    /// `UNHEALTHY` or `TIMEOUT`.
    Unhealthy,
    /// Gets nothing new, and does not count for panic.
    Draining,
    Degraded,
}
