//! Asks the kernel for the facts that [`decide`](super::decide) needs: about the host, and about
//! the two connections of a stream.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use proxy_common::reason::Reason;
use steer_kernel::net::canonical;
use steer_kernel::net::conntrack::Conntrack;
use steer_kernel::net::host::{self, InterfaceKind};
use steer_kernel::net::next_hop::{NextHop, NextHops};
use steer_kernel::net::route::RouteError;
use steer_kernel::tcp::repair;
use steer_kernel::tcp::tcp_info::TcpInfo;
use tokio::net::TcpStream;

use super::decide::{Host, Leg};

/// The settings of the host are read again after this time. They may change, but reading them for
/// each stream costs too much.
const HOST_AGE: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct Survey {
    next_hops: NextHops,
    conntrack: Conntrack,
    host: ArcSwap<(Instant, Host)>,
}

impl Survey {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            next_hops: NextHops::new()?,
            conntrack: Conntrack::new(),
            host: ArcSwap::from_pointee((Instant::now(), ask_host())),
        })
    }

    /// The settings of the host, at most [`HOST_AGE`] old.
    pub(super) fn host(&self) -> Host {
        let (asked, host) = **self.host.load();
        if asked.elapsed() <= HOST_AGE {
            return host;
        }
        // Two workers may read the settings at the same time. The answers are equally good.
        let host = ask_host();
        self.host.store((Instant::now(), host).into());
        host
    }

    /// The interface by which packets from `source` to `peer` leave. `None`: there is no route, or
    /// no program can be attached to the interface.
    pub(super) fn interface_towards(&self, source: IpAddr, peer: IpAddr) -> Option<u32> {
        let [next_hop] = self.next_hops.of([(source, peer)]);
        next_hop.ok().filter(|hop| hop.interface != InterfaceKind::Other).map(|hop| hop.ifindex)
    }

    /// The facts about the two connections of a stream.
    pub(super) fn legs(&self, sockets: &[TcpStream; 2]) -> Result<[Leg; 2], Reason> {
        let [downstream, upstream] = sockets;
        let [down, up] = [ends(downstream)?, ends(upstream)?];
        let [down_hop, up_hop] = self.next_hops.of([down, up].map(|(peer, local)| (local.ip(), peer.ip())));
        Ok([self.leg(downstream, down, down_hop)?, self.leg(upstream, up, up_hop)?])
    }

    fn leg(
        &self,
        socket: &TcpStream,
        (peer, local): (SocketAddr, SocketAddr),
        next_hop: Result<NextHop, RouteError>,
    ) -> Result<Leg, Reason> {
        let info = TcpInfo::of(socket).map_err(unreadable)?;
        if !info.is_established() {
            return Err(Reason::NotEstablished);
        }
        Ok(Leg {
            peer,
            local,
            options: info.options(),
            timestamp_offset: repair::timestamp_offset(socket, &info),
            send_window: info.send_window(),
            send_scale: info.send_scale(),
            receive_scale: info.receive_scale(),
            announced_mss: info.announced_mss(),
            send_mss: info.send_mss(),
            next_hop: next_hop.map_err(|error| error.reason()),
            conntrack_in_the_way: self.conntrack.is_in_the_way(peer, local),
        })
    }
}

/// The peer's address, and the local one.
fn ends(socket: &TcpStream) -> Result<(SocketAddr, SocketAddr), Reason> {
    // A connection that was reset does not have a peer any more.
    let peer = socket.peer_addr().map_err(|_| Reason::NotEstablished)?;
    let local = socket.local_addr().map_err(unreadable)?;
    Ok((canonical(peer), canonical(local)))
}

fn unreadable(_: std::io::Error) -> Reason {
    Reason::StateUnreadable
}

fn ask_host() -> Host {
    Host { loopback_takes_redirected: host::early_demux() || host::loopback_accepts_redirects() }
}
