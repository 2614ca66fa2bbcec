//! Whether connection tracking would disturb a hand-over.
//!
//! Connection tracking follows the windows of both peers, and the trimmed acknowledgements of a
//! hand-over lie outside of these windows. A firewall that drops invalid packets (`ct state invalid
//! drop`) would drop these acknowledgements. There is no harm if the connection is not tracked
//! (`notrack` in both directions) or `net.netfilter.nf_conntrack_tcp_be_liberal` is on.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};

use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Protocol, Tuple,
};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage};

use super::host;
use super::netlink::Netlink;

/// Asks about connections of the network namespace in which it was made. Needs CAP_NET_ADMIN.
pub struct Conntrack(Mutex<Option<Netlink<NetfilterMessage>>>);

impl fmt::Debug for Conntrack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Conntrack")
    }
}

impl Default for Conntrack {
    fn default() -> Self {
        Self::new()
    }
}

impl Conntrack {
    /// Never fails. If the kernel cannot be asked, [`is_in_the_way`](Self::is_in_the_way) makes a
    /// careful guess.
    pub fn new() -> Self {
        // If the protocol is missing, this kernel has no netfilter, or none that can be asked.
        Self(Mutex::new(Netlink::netfilter().ok()))
    }

    /// Whether the connection between these addresses should not be handed over. If the kernel
    /// cannot be asked about one connection (nf_conntrack_netlink is missing), the answer is yes as
    /// soon as the kernel tracks any connection. An entry in a zone of its own (`ct zone set`) is
    /// not seen.
    pub fn is_in_the_way(&self, peer: SocketAddr, local: SocketAddr) -> bool {
        let Some(entries) = host::tracked_connections() else { return false };
        entries > 0 && !host::conntrack_is_liberal() && self.tracks(peer, local).unwrap_or(true)
    }

    fn tracks(&self, peer: SocketAddr, local: SocketAddr) -> io::Result<bool> {
        // The handle keeps nothing between two requests that a panic could leave half done.
        let mut netlink = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = netlink.as_mut().ok_or(io::ErrorKind::Unsupported)?.ask(request(peer, local));
        match answer {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => {
                if error.raw_os_error() == Some(libc::EINVAL) {
                    // The module is missing. The kernel would look for it at each request.
                    *netlink = None;
                }
                Err(error)
            }
        }
    }
}

/// The packets of the peer; the kernel finds an entry by either direction.
fn request(peer: SocketAddr, local: SocketAddr) -> NetfilterMessage {
    let (source, destination) = (peer.ip().to_canonical(), local.ip().to_canonical());
    let family = match destination {
        IpAddr::V4(_) => libc::NFPROTO_IPV4,
        IpAddr::V6(_) => libc::NFPROTO_IPV6,
    };
    let addresses = vec![IPTuple::SourceAddress(source), IPTuple::DestinationAddress(destination)];
    let ports = vec![
        ProtoTuple::Protocol(Protocol::Tcp),
        ProtoTuple::SourcePort(peer.port()),
        ProtoTuple::DestinationPort(local.port()),
    ];
    let tuple = ConntrackAttribute::CtaTupleOrig(vec![Tuple::Ip(addresses), Tuple::Proto(ports)]);
    NetfilterMessage::new(
        NetfilterHeader::new((family as u8).into(), 0, 0),
        ConntrackMessage::Get(vec![tuple]),
    )
}
