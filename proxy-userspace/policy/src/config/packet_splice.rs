//! What the packet splice may use, and how long it waits: the map `packet_splice` of the native
//! format.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use proxy_common::abi::{DEFAULT_MARK, DEFAULT_MAX_RECORDS, MAX_MARK};
use rangemap::RangeInclusiveSet;

use super::Endpoint;
use super::reader::{Field, Map};

/// Settings of the packet splice; unused where it does not run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PacketSplice {
    /// Records in the kernel, 2 or more. Streams beyond that are relayed.
    pub max_streams: u32,
    /// Source ports towards endpoints: sorted, not overlapping, all 1024 or above. `None`: the
    /// ports of 10240-65535 that the kernel does not give out by itself.
    pub source_ports: Option<Vec<RangeInclusive<u16>>>,
    /// A stream is relayed for this long after its 101. One that ends by then does not pay for a
    /// hand-over, nor keep a record and a source port for its `linger`.
    pub hand_over_after: Duration,
    /// Each stream is handed over at a random moment within this time after that.
    pub hand_over_within: Duration,
    pub keepalive: Keepalive,
    /// How long the tuple of a finished stream stays, for late retransmissions.
    pub linger: Duration,
    /// When no process lives, the kernel gives up a stream that was silent in both directions for
    /// this long; at least `MIN_ORPHAN_TIMEOUT`. `None`: never.
    pub orphan_timeout: Option<Duration>,
    /// `SO_MARK` of a stream's sockets during its hand-over. The next two numbers are used as well,
    /// and none is 0.
    pub mark: u32,
    /// At most this is announced as MSS to clients; 88 to 32767. `None`: what fits the routes to
    /// endpoints.
    pub mss: Option<u16>,
    /// If a client has no TCP timestamps, the connection to its endpoint does without, too, so that
    /// the stream can be spliced. If an endpoint has none, later clients do without.
    pub agree_at_handshake: bool,
    pub conntrack: ConntrackMode,
}

/// What happens to a stream with a tracked connection. (A connection that a rule rewrites is always
/// relayed.)
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ConntrackMode {
    /// The stream is spliced if no rule looks at the state of connections.
    #[default]
    Auto,
    /// Steer turns `nf_conntrack_tcp_be_liberal` on, so the stream is spliced.
    Liberal,
    /// The stream is relayed, unless `nf_conntrack_tcp_be_liberal` is on.
    Relay,
}

impl ConntrackMode {
    pub const ALL: [Self; 3] = [Self::Auto, Self::Liberal, Self::Relay];

    /// As files name it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Liberal => "liberal",
            Self::Relay => "relay",
        }
    }
}

/// When a silent peer of a spliced stream is probed. None of it is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence before the first probe.
    pub time: Duration,
    /// Between probes.
    pub interval: Duration,
    /// After this many probes without an answer, the peer counts as gone.
    pub probes: u32,
}

impl Default for Keepalive {
    fn default() -> Self {
        Self { time: Duration::from_secs(60), interval: Duration::from_secs(15), probes: 4 }
    }
}

impl Default for PacketSplice {
    fn default() -> Self {
        Self {
            max_streams: DEFAULT_MAX_RECORDS,
            source_ports: None,
            hand_over_after: HAND_OVER_AFTER,
            hand_over_within: Duration::ZERO,
            keepalive: Keepalive::default(),
            linger: Duration::from_secs(60),
            orphan_timeout: Some(Duration::from_secs(3 * 3600)),
            mark: DEFAULT_MARK,
            mss: None,
            agree_at_handshake: true,
            conntrack: ConntrackMode::default(),
        }
    }
}

/// Longer than an exchange of a few messages takes on a busy machine; otherwise as short as the
/// hand-over itself.
const HAND_OVER_AFTER: Duration = Duration::from_millis(20);
/// The array of records takes 320 bytes for each: 2.5 GiB. (An array of one is what a process has
/// that does not use the packet splice.)
const MAX_STREAMS: RangeInclusive<u64> = 2..=1 << 23;
/// A process sends a heartbeat every second, and may be a little late.
const MIN_ORPHAN_TIMEOUT: Duration = Duration::from_secs(3);
/// What `TCP_MAXSEG` takes (TCP_MIN_MSS and MAX_TCP_WINDOW, net/ipv4/tcp.c).
pub const MSS: RangeInclusive<u16> = 88..=32767;
const FIRST_UNPRIVILEGED_PORT: u16 = 1024;

pub(super) fn read(field: &Field<'_>) -> Option<PacketSplice> {
    let map = field.map()?;
    let default = PacketSplice::default();
    let number = |name, range| map.get(name).and_then(|field| field.unsigned(range));
    let time = |name, default| map.get(name).and_then(|field| field.duration()).unwrap_or(default);
    let read = PacketSplice {
        max_streams: number("max_streams", MAX_STREAMS)
            .and_then(|count| u32::try_from(count).ok())
            .unwrap_or(default.max_streams),
        source_ports: map.get("source_ports").and_then(|list| port_ranges(&list)),
        hand_over_after: time("hand_over_after", default.hand_over_after),
        hand_over_within: time("hand_over_within", default.hand_over_within),
        keepalive: map.get("keepalive").and_then(|field| keepalive(&field)).unwrap_or_default(),
        linger: time("linger", default.linger),
        orphan_timeout: map
            .get("orphan_timeout")
            .and_then(|field| orphan_timeout(&field))
            .unwrap_or(default.orphan_timeout),
        mark: map.get("mark").and_then(|mark| self::mark(&mark)).unwrap_or(default.mark),
        mss: number("mss", (*MSS.start()).into()..=(*MSS.end()).into())
            .and_then(|mss| u16::try_from(mss).ok()),
        agree_at_handshake: map.boolean("agree_at_handshake").unwrap_or(default.agree_at_handshake),
        conntrack: map
            .get("conntrack")
            .and_then(|mode| mode.one_of_any_case(&ConntrackMode::ALL.map(|mode| (mode.as_str(), mode))))
            .unwrap_or_default(),
    };
    map.finish();
    Some(read)
}

fn keepalive(field: &Field<'_>) -> Option<Keepalive> {
    let map = field.map()?;
    let default = Keepalive::default();
    let time = |name, default| positive(&map, name).unwrap_or(default);
    let read = Keepalive {
        time: time("time", default.time),
        interval: time("interval", default.interval),
        probes: map
            .get("probes")
            .and_then(|probes| probes.unsigned(1..=100))
            .and_then(|probes| u32::try_from(probes).ok())
            .unwrap_or(default.probes),
    };
    map.finish();
    Some(read)
}

fn positive(map: &Map<'_>, name: &'static str) -> Option<Duration> {
    let field = map.get(name)?;
    let time = field.duration()?;
    if time.is_zero() {
        field.error("must be more than 0", "write a duration such as 60s");
        return None;
    }
    Some(time)
}

fn orphan_timeout(field: &Field<'_>) -> Option<Option<Duration>> {
    let timeout = field.limit()?;
    if timeout.is_some_and(|timeout| timeout < MIN_ORPHAN_TIMEOUT) {
        field.error("must be at least 3s, or 0s for never", "write more than the peers' keepalives take: 3h");
        return None;
    }
    Some(timeout)
}

/// Hexadecimal as marks are usually written, or decimal.
fn mark(field: &Field<'_>) -> Option<u32> {
    let text = field.scalar().map_or("", |(text, _)| text);
    let number = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    let number = number.ok().filter(|mark| (1..=MAX_MARK).contains(mark));
    if number.is_none() {
        field.error(
            format_args!("must be a number from 0x1 to {MAX_MARK:#x}"),
            "write one that no rule for packets uses, nor the next two: 0x5b11ce00",
        );
    }
    number
}

/// `[10240-32767, 61000-65535]`, sorted; touching ranges become one.
fn port_ranges(list: &Field<'_>) -> Option<Vec<RangeInclusive<u16>>> {
    let items = list.items();
    if items.is_empty() {
        list.error("must have at least one range", "write `[10240-32767]`, or remove the key");
        return None;
    }
    let ranges: RangeInclusiveSet<u16> = items.iter().filter_map(port_range).collect();
    Some(ranges.into_iter().collect())
}

fn port_range(field: &Field<'_>) -> Option<RangeInclusive<u16>> {
    let text = field.scalar().map_or("", |(text, _)| text);
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (Ok(first), Ok(last)) = (first.trim().parse::<u16>(), last.trim().parse::<u16>()) else {
        field.error("is not a range of ports", "write FIRST-LAST, such as 10240-32767");
        return None;
    };
    if first > last {
        field.error("ends before it begins", format!("write {last}-{first}"));
        return None;
    }
    if first < FIRST_UNPRIVILEGED_PORT {
        field.error(
            format_args!("port {first} is reserved for services"),
            format!("begin at {FIRST_UNPRIVILEGED_PORT} or above"),
        );
        return None;
    }
    Some(first..=last)
}

/// A cluster's `source_addresses`.
pub(super) fn source_addresses(list: &Field<'_>, endpoints: &[Endpoint]) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    for item in list.items() {
        let Some(address) = item.string().and_then(|text| source_address(&item, text)) else { continue };
        if addresses.contains(&address) {
            item.error(format_args!("{address} stands twice"), "remove one of the two");
            continue;
        }
        let family = |endpoint: &Endpoint| endpoint.address.ip().to_canonical().is_ipv4();
        if !endpoints.is_empty() && !endpoints.iter().any(|endpoint| family(endpoint) == address.is_ipv4()) {
            item.warn(format_args!(
                "no endpoint can be reached from {address}, they are of the other family"
            ));
        }
        addresses.push(address);
    }
    addresses
}

pub(super) fn source_address(field: &Field<'_>, text: &str) -> Option<IpAddr> {
    let address = text.parse::<IpAddr>().ok().map(|address| address.to_canonical());
    let address = address.filter(|address| !address.is_unspecified() && !address.is_multicast());
    if address.is_none() {
        field.error(
            format_args!("`{text}` is no address to connect from"),
            "write an address of this host without a port, such as 10.0.0.5",
        );
    }
    address
}
