//! Settings of this host, or rather of the calling thread's network namespace.
//!
//! `/proc/sys/net` shows the namespace of the thread that reads it. `/sys/class/net` shows the one
//! in which `/sys` was mounted, so interfaces are looked up by netlink.

use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixDatagram;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkLayerType, LinkMessage};

use super::netlink::Netlink;

/// The loopback interface is the first of every network namespace.
pub const LOOPBACK_IFINDEX: u32 = 1;

const SYSCTL: &str = "/proc/sys/net";
const RESERVED_PORTS: &str = "ipv4/ip_local_reserved_ports";

/// What the packet splice needs to know of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// As `ip link` shows it; may be changed at any time.
    pub name: String,
    pub kind: InterfaceKind,
    /// Bytes of the largest IP packet.
    pub mtu: u32,
}

/// By its link-layer header (ARPHRD).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InterfaceKind {
    /// Also what looks like it: veth, bridge, bond, VLAN ...
    Ethernet,
    Loopback,
    /// Tunnels, PPP, WireGuard ...
    Other,
}

/// The cookie of the caller's network namespace (Linux 5.14). No other network namespace gets the
/// same cookie until the host restarts.
///
/// # Errors
/// The kernel is older.
pub fn netns_cookie() -> io::Result<u64> {
    let socket = UnixDatagram::unbound()?;
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: both pointers are to locals, and `len` tells the size of the first.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// Looks an interface up in the caller's network namespace.
///
/// # Errors
/// `ENODEV` if there is no such interface.
pub fn interface(ifindex: u32) -> io::Result<Interface> {
    ask_interface(&mut Netlink::route()?, ifindex)
}

/// The same, with an open netlink socket.
pub(crate) fn ask_interface(
    netlink: &mut Netlink<RouteNetlinkMessage>,
    ifindex: u32,
) -> io::Result<Interface> {
    let mut request = LinkMessage::default();
    request.header.index = ifindex;
    request.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    let RouteNetlinkMessage::NewLink(link) = netlink.ask(RouteNetlinkMessage::GetLink(request))? else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let kind = match link.header.link_layer_type {
        LinkLayerType::Ether => InterfaceKind::Ethernet,
        LinkLayerType::Loopback => InterfaceKind::Loopback,
        _ => InterfaceKind::Other,
    };
    let (mut name, mut mtu) = (None, None);
    for attribute in link.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name = Some(value),
            LinkAttribute::Mtu(value) => mtu = Some(value),
            _ => {}
        }
    }
    let (name, mtu) = name.zip(mtu).ok_or(io::ErrorKind::InvalidData)?;
    Ok(Interface { name, kind, mtu })
}

/// Whether a segment that arrives finds its socket, and by it a route, before the routing tables
/// are asked (`net.ipv4.ip_early_demux` and `tcp_early_demux`). `false` also if that cannot be
/// read.
pub fn early_demux() -> bool {
    // The second one came with Linux 4.13.
    is_on("ipv4/ip_early_demux") && sysctl("ipv4/tcp_early_demux").is_none_or(|value| value != "0")
}

/// Whether loopback takes packets that are not from it, by `route_localnet` and `accept_local`
/// (IPv4): both are needed without [`early_demux`].
pub fn loopback_accepts_redirects() -> bool {
    let either = |setting: &str| {
        ["all", "lo"].iter().any(|interface| is_on(&format!("ipv4/conf/{interface}/{setting}")))
    };
    either("route_localnet") && either("accept_local")
}

/// The ports that the kernel chooses from (`net.ipv4.ip_local_port_range`, for IPv6 too).
///
/// # Errors
/// `/proc/sys` cannot be read.
pub fn ip_local_port_range() -> io::Result<RangeInclusive<u16>> {
    let text = fs::read_to_string(path("ipv4/ip_local_port_range"))?;
    let mut ports = text.split_whitespace().map(str::parse);
    match (ports.next(), ports.next()) {
        (Some(Ok(first)), Some(Ok(last))) => Ok(first..=last),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// The ports that the kernel never chooses (`net.ipv4.ip_local_reserved_ports`), in order.
///
/// # Errors
/// `/proc/sys` cannot be read.
pub fn reserved_ports() -> io::Result<Vec<RangeInclusive<u16>>> {
    parse_ports(&fs::read_to_string(path(RESERVED_PORTS))?).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Adds to the reserved ports, until somebody changes the setting.
///
/// # Errors
/// As [`set_reserved_ports`].
pub fn reserve_ports(ports: &[RangeInclusive<u16>]) -> io::Result<()> {
    let mut all = reserved_ports()?;
    all.extend_from_slice(ports);
    set_reserved_ports(&all)
}

/// Makes these the reserved ports, until somebody changes the setting.
///
/// # Errors
/// This process may not write `/proc/sys` (containers often mount it read-only).
pub fn set_reserved_ports(ports: &[RangeInclusive<u16>]) -> io::Result<()> {
    // The kernel merges overlapping ranges. It reads an empty line as no ports.
    fs::write(path(RESERVED_PORTS), print_ports(ports) + "\n")
}

/// `1,5-7`
fn parse_ports(text: &str) -> Option<Vec<RangeInclusive<u16>>> {
    let range = |text: &str| {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    text.trim().split(',').filter(|part| !part.is_empty()).map(range).collect()
}

fn print_ports(ports: &[RangeInclusive<u16>]) -> String {
    let ranges: Vec<_> = ports.iter().map(|range| format!("{}-{}", range.start(), range.end())).collect();
    ranges.join(",")
}

fn is_on(setting: &str) -> bool {
    sysctl(setting).is_some_and(|value| value != "0")
}

/// `None` if this kernel does not have it.
fn sysctl(setting: &str) -> Option<String> {
    fs::read_to_string(path(setting)).ok().map(|value| value.trim().to_owned())
}

pub(crate) fn path(setting: &str) -> String {
    format!("{SYSCTL}/{setting}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_looked_up() {
        let loopback = interface(LOOPBACK_IFINDEX).unwrap();
        assert_eq!((loopback.name.as_str(), loopback.kind), ("lo", InterfaceKind::Loopback));
        assert!(loopback.mtu >= 1500);
        let error = interface(u32::MAX >> 1).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    }

    #[test]
    fn the_network_namespace_has_a_cookie() {
        let cookie = netns_cookie().unwrap();
        assert_eq!(netns_cookie().unwrap(), cookie);
        assert_ne!(cookie, 0);
    }

    #[test]
    fn the_port_range_is_read() {
        let ports = ip_local_port_range().unwrap();
        assert!(ports.start() < ports.end());
    }

    #[test]
    fn lists_of_ports_are_read_and_written() {
        assert_eq!(parse_ports("\n"), Some(vec![]));
        assert_eq!(parse_ports("80,1000-2000\n"), Some(vec![80..=80, 1000..=2000]));
        assert_eq!(parse_ports("80,x"), None);
        assert_eq!(parse_ports("80,70000"), None);
        assert_eq!(print_ports(&[80..=80, 1000..=2000]), "80-80,1000-2000");
    }
}
