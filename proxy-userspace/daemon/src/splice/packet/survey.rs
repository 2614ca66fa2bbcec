//! Asks the kernel for the facts that [`decide`](super::decide) needs: about the host, and about
//! the two connections of a stream.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use proxy_common::reason::Reason;
use steer_kernel::net::canonical;
use steer_kernel::net::conntrack::Conntrack;
use steer_kernel::net::host::{self, InterfaceKind};
use steer_kernel::net::route::Routes;
use steer_kernel::tcp::repair;
use steer_kernel::tcp::tcp_info::TcpInfo;
use tokio::net::TcpStream;

use super::decide::{Host, Leg};

/// The settings of the host are read again after this time. They may change, but reading them for
/// each stream costs too much.
const HOST_AGE: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct Survey {
    routes: Routes,
    conntrack: Conntrack,
    host: Mutex<(Instant, Host)>,
}

impl Survey {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            routes: Routes::new()?,
            conntrack: Conntrack::new(),
            host: Mutex::new((Instant::now(), ask_host())),
        })
    }

    /// The settings of the host, at most [`HOST_AGE`] old.
    pub(super) fn host(&self) -> Host {
        let mut known = self.host.lock().unwrap_or_else(PoisonError::into_inner);
        if known.0.elapsed() > HOST_AGE {
            *known = (Instant::now(), ask_host());
        }
        known.1
    }

    pub(super) fn leg(&self, socket: &TcpStream) -> Result<Leg, Reason> {
        let unreadable = |_| Reason::StateUnreadable;
        let info = TcpInfo::of(socket).map_err(unreadable)?;
        if !info.is_established() {
            return Err(Reason::NotEstablished);
        }
        let peer = canonical(socket.peer_addr().map_err(unreadable)?);
        let local = canonical(socket.local_addr().map_err(unreadable)?);
        let hop = self.routes.lookup(local.ip(), peer.ip()).map_err(|error| error.reason());
        let interface = hop.as_ref().ok().and_then(|hop| self.routes.interface(hop.ifindex).ok());
        Ok(Leg {
            peer,
            local,
            options: info.options(),
            timestamp_offset: repair::timestamp_offset(socket),
            send_window: info.send_window(),
            send_scale: info.send_scale(),
            receive_scale: info.receive_scale(),
            announced_mss: info.announced_mss(),
            send_mss: info.send_mss(),
            hop,
            interface: interface.map_or(InterfaceKind::Other, |interface| interface.kind),
            conntrack_in_the_way: self.conntrack.is_in_the_way(peer, local),
        })
    }
}

fn ask_host() -> Host {
    Host { loopback_takes_redirected: host::early_demux() || host::loopback_accepts_redirects() }
}
