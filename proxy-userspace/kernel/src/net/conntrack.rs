//! Whether connection tracking would disturb a hand-over.
//!
//! Connection tracking follows the windows of both peers, and the trimmed acknowledgements of a
//! hand-over lie outside of these windows. A firewall that drops invalid packets (`ct state invalid
//! drop`) would drop these acknowledgements. There is no harm if the connection is not tracked
//! (`notrack` in both directions) or `net.netfilter.nf_conntrack_tcp_be_liberal` is on.
//!
//! A connection that a rule rewrites (NAT) cannot be handed over in either case: netfilter does not
//! see spliced packets, so the packets would keep the addresses that the sockets know.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};

use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Protocol, Status, Tuple,
};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterMessageInner};

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

    /// Whether the connection between these addresses, as its socket knows them, should not be handed
    /// over. If the kernel cannot be asked about one connection (nf_conntrack_netlink is missing), the
    /// answer is yes as soon as the kernel tracks any connection. An entry in a zone of its own (`ct
    /// zone set`) is not seen.
    ///
    /// Nothing is remembered, since a firewall may start tracking at any time. As long as nothing
    /// is tracked, the answer costs one system call.
    pub fn is_in_the_way(&self, peer: SocketAddr, local: SocketAddr) -> bool {
        let is_positive = |setting: &Sysctl| setting.number().is_some_and(|number| number > 0);
        if !is_positive(&self.entries) {
            return false;
        }
        match self.entry(peer, local) {
            Ok(None) => false,
            Ok(Some(Entry::Plain)) => !is_positive(&self.is_liberal),
            Ok(Some(Entry::Rewritten)) | Err(_) => true,
        }
    }

    fn entry(&self, peer: SocketAddr, local: SocketAddr) -> io::Result<Option<Entry>> {
        if self.nobody_answers.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        match self.netlink.with(Netlink::netfilter, |netlink| netlink.ask(request(peer, local)))? {
            Ok(answer) => Ok(Some(Entry::of(&answer))),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
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

/// What connection tracking does with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    Plain,
    /// A rule gives its packets other addresses or ports.
    Rewritten,
}

impl Entry {
    fn of(answer: &NetfilterMessage) -> Self {
        let NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) = &answer.inner else {
            // An answer that cannot be read: the careful guess.
            return Self::Rewritten;
        };
        let is_rewritten = |attribute: &ConntrackAttribute| matches!(attribute, ConntrackAttribute::CtaStatus(status) if status.intersects(Status::NatMask));
        if attributes.iter().any(is_rewritten) { Self::Rewritten } else { Self::Plain }
    }
}

/// The packets that the socket sends, before any rule has rewritten them. The kernel finds an entry
/// by either direction: this is the direction of the replies for a connection that was accepted, and
/// the original direction for one that was opened. (The packets of the peer have other addresses on
/// the wire than the socket knows, if a rule rewrites them.)
fn request(peer: SocketAddr, local: SocketAddr) -> NetfilterMessage {
    let (source, destination) = (local.ip().to_canonical(), peer.ip().to_canonical());
    let family = match destination {
        IpAddr::V4(_) => libc::NFPROTO_IPV4,
        IpAddr::V6(_) => libc::NFPROTO_IPV6,
    };
    let addresses = vec![IPTuple::SourceAddress(source), IPTuple::DestinationAddress(destination)];
    let ports = vec![
        ProtoTuple::Protocol(Protocol::Tcp),
        ProtoTuple::SourcePort(local.port()),
        ProtoTuple::DestinationPort(peer.port()),
    ];
    let tuple = ConntrackAttribute::CtaTupleOrig(vec![Tuple::Ip(addresses), Tuple::Proto(ports)]);
    NetfilterMessage::new(
        NetfilterHeader::new((family as u8).into(), 0, 0),
        ConntrackMessage::Get(vec![tuple]),
    )
}
