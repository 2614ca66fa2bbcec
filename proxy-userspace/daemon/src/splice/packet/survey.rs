//! Asks the kernel for the facts that [`decide`](super::decide) needs: about the host, and about
//! the two connections of a stream.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use proxy_common::instance::Instance;
use proxy_common::reason::Reason;
use steer_kernel::net::canonical;
use steer_kernel::net::conntrack::{Conntrack, Handling, Obstacle};
use steer_kernel::net::host::{self, InterfaceKind};
use steer_kernel::net::next_hop::{NextHop, NextHops};
use steer_kernel::net::route::RouteError;
use steer_kernel::tcp::repair;
use steer_kernel::tcp::tcp_info::TcpInfo;
use steer_policy::config::ConntrackMode;
use tokio::net::TcpStream;

use super::decide::{Host, Leg};
use super::liberal;

/// The settings of the host are read again after this time. They may change, but reading them for
/// each stream costs too much.
const HOST_AGE: Duration = Duration::from_secs(5);
/// How many obstacles of connection tracking are logged. There are a few, unless the rules change
/// all the time.
const OBSTACLES: usize = 32;

#[derive(Debug)]
pub(super) struct Survey {
    next_hops: NextHops,
    conntrack: Conntrack,
    /// The instance, with [`ConntrackMode::Liberal`].
    liberal: Option<Instance>,
    /// The obstacles that were logged.
    said: Mutex<HashSet<String>>,
    host: ArcSwap<(Instant, Host)>,
}

impl Survey {
    pub(super) fn new(conntrack: ConntrackMode, instance: &Instance) -> std::io::Result<Self> {
        let liberal = (conntrack == ConntrackMode::Liberal).then(|| instance.clone());
        // An earlier process may have had another mode.
        let changed = if liberal.is_some() { liberal::turn_on(instance) } else { liberal::restore(instance) };
        if let Err(error) = changed {
            tracing::warn!(%error, "cannot change net.netfilter.nf_conntrack_tcp_be_liberal");
        }
        Ok(Self {
            next_hops: NextHops::new()?,
            conntrack: Conntrack::new(match conntrack {
                ConntrackMode::Auto | ConntrackMode::Liberal => Handling::ByRules,
                ConntrackMode::Relay => Handling::Relay,
            }),
            liberal,
            said: Mutex::default(),
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

    fn is_tracked(&self, peer: SocketAddr, local: SocketAddr) -> Result<bool, Obstacle> {
        let tracked = self.conntrack.is_tracked(peer, local);
        match (&tracked, &self.liberal) {
            // The module was loaded after the start, or somebody has turned the setting off.
            (Err(Obstacle::Rule(_)), Some(instance)) if liberal::turn_on(instance).is_ok() => {
                self.conntrack.is_tracked(peer, local)
            }
            _ => tracked,
        }
    }

    /// Logs each obstacle once: an operator learns which rule is in the way.
    fn say(&self, obstacle: &Obstacle) {
        let text = obstacle.to_string();
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.len() < OBSTACLES && !said.contains(&text) {
            let (reason, fix) = (Reason::Conntrack.as_str(), fix(obstacle));
            let error: &dyn std::error::Error = obstacle;
            tracing::warn!(
                reason,
                error,
                fix,
                "streams with a tracked connection are relayed; said once for each cause"
            );
            said.insert(text);
        }
    }

    /// Removes the entries of connections whose packets netfilter does not see any more.
    pub(super) fn forget(&self, tracked: &[(SocketAddr, SocketAddr)]) {
        for (peer, local) in tracked {
            if let Err(error) = self.conntrack.forget(*peer, *local) {
                tracing::debug!(%error, %peer, %local, "the entry of a spliced connection stays");
            }
        }
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
        let tracked = self.is_tracked(peer, local);
        if let Err(obstacle) = &tracked {
            self.say(obstacle);
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
            conntrack_in_the_way: tracked.is_err(),
            tracked: tracked.unwrap_or(false),
        })
    }
}

/// What an operator can do about an obstacle.
const fn fix(obstacle: &Obstacle) -> &'static str {
    match obstacle {
        Obstacle::Rewritten => "move the NAT to another host or network namespace",
        Obstacle::Tracked => {
            "set packet_splice.conntrack: auto, or exempt both connections from tracking (notrack)"
        }
        Obstacle::Rule(_) => {
            "set packet_splice.conntrack: liberal, or exempt both connections from tracking (notrack): see docs/splice.md"
        }
        Obstacle::Unreadable(_) => {
            "load the kernel module nf_conntrack_netlink, or exempt both connections from tracking (notrack)"
        }
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
