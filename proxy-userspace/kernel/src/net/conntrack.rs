//! Whether connection tracking would disturb a hand-over.
//!
//! Connection tracking follows the windows of both peers, and the trimmed acknowledgements of a
//! hand-over lie outside of these windows. A firewall that drops invalid packets (`ct state invalid
//! drop`) would drop these acknowledgements. There is no harm if the connection is not tracked
//! (`notrack` in both directions) or `net.netfilter.nf_conntrack_tcp_be_liberal` is on.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};

use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Protocol, Tuple,
};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage};

use super::netlink::Netlink;
use super::pool::Pool;
use super::sysctl::Sysctl;

/// Asks about connections of the network namespace in which it was made. Needs CAP_NET_ADMIN.
/// Threads that ask at the same time have sockets of their own; all of these threads must be in
/// that namespace.
#[derive(Debug)]
pub struct Conntrack {
    /// The number of tracked connections. Missing if the module is not loaded; 0 as long as no rule
    /// has started tracking in this namespace.
    entries: Sysctl,
    /// Whether segments outside of the windows count as valid.
    is_liberal: Sysctl,
    netlink: Pool<Netlink<NetfilterMessage>>,
    /// The kernel has no module that could answer.
    nobody_answers: AtomicBool,
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
        let netlink = Netlink::netfilter();
        Self {
            entries: Sysctl::new("netfilter/nf_conntrack_count"),
            is_liberal: Sysctl::new("netfilter/nf_conntrack_tcp_be_liberal"),
            // If the protocol is missing, this kernel has no netfilter, or none that can be asked.
            nobody_answers: AtomicBool::new(netlink.is_err()),
            netlink: netlink.map(Pool::of).unwrap_or_default(),
        }
    }

    /// Whether the connection between these addresses should not be handed over. If the kernel
    /// cannot be asked about one connection (nf_conntrack_netlink is missing), the answer is yes as
    /// soon as the kernel tracks any connection. An entry in a zone of its own (`ct zone set`) is
    /// not seen.
    ///
    /// Nothing is remembered, since a firewall may start tracking at any time. As long as nothing
    /// is tracked, the answer costs one system call.
    pub fn is_in_the_way(&self, peer: SocketAddr, local: SocketAddr) -> bool {
        let is_positive = |setting: &Sysctl| setting.number().is_some_and(|number| number > 0);
        is_positive(&self.entries)
            && !is_positive(&self.is_liberal)
            && self.tracks(peer, local).unwrap_or(true)
    }

    fn tracks(&self, peer: SocketAddr, local: SocketAddr) -> io::Result<bool> {
        if self.nobody_answers.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        match self.netlink.with(Netlink::netfilter, |netlink| netlink.ask(request(peer, local)))? {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => {
                if error.raw_os_error() == Some(libc::EINVAL) {
                    // The module is missing. The kernel would look for it at each request.
                    self.nobody_answers.store(true, Ordering::Relaxed);
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
