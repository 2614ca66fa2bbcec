//! What connection tracking knows of one connection.

use std::net::{IpAddr, SocketAddr};

use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Protocol, Status, Tuple,
};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterMessageInner};

/// What connection tracking does with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    Plain,
    /// A rule gives its packets other addresses or ports.
    Rewritten,
}

impl Entry {
    pub(super) fn of(answer: &NetfilterMessage) -> Self {
        let NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) = &answer.inner else {
            // An answer that cannot be read: the careful guess.
            return Self::Rewritten;
        };
        let is_rewritten = |attribute: &ConntrackAttribute| matches!(attribute, ConntrackAttribute::CtaStatus(status) if status.intersects(Status::NatMask));
        if attributes.iter().any(is_rewritten) { Self::Rewritten } else { Self::Plain }
    }
}

/// Asks for the entry of a connection.
pub(super) fn get(peer: SocketAddr, local: SocketAddr) -> NetfilterMessage {
    message(peer, ConntrackMessage::Get(vec![tuple(peer, local)]))
}

/// Removes the entry of a connection.
pub(super) fn delete(peer: SocketAddr, local: SocketAddr) -> NetfilterMessage {
    message(peer, ConntrackMessage::Delete(vec![tuple(peer, local)]))
}

fn message(peer: SocketAddr, message: ConntrackMessage) -> NetfilterMessage {
    let family = match peer.ip().to_canonical() {
        IpAddr::V4(_) => libc::NFPROTO_IPV4,
        IpAddr::V6(_) => libc::NFPROTO_IPV6,
    };
    NetfilterMessage::new(NetfilterHeader::new((family as u8).into(), 0, 0), message)
}

/// The packets that the socket sends, before any rule has rewritten them. The kernel finds an entry
/// by either direction: this is the direction of the replies for a connection that was accepted, and
/// the original direction for one that was opened. (The packets of the peer have other addresses on
/// the wire than the socket knows, if a rule rewrites them.)
fn tuple(peer: SocketAddr, local: SocketAddr) -> ConntrackAttribute {
    let (source, destination) = (local.ip().to_canonical(), peer.ip().to_canonical());
    let addresses = vec![IPTuple::SourceAddress(source), IPTuple::DestinationAddress(destination)];
    let ports = vec![
        ProtoTuple::Protocol(Protocol::Tcp),
        ProtoTuple::SourcePort(local.port()),
        ProtoTuple::DestinationPort(peer.port()),
    ];
    ConntrackAttribute::CtaTupleOrig(vec![Tuple::Ip(addresses), Tuple::Proto(ports)])
}
