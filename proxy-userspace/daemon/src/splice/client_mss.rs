//! The largest segments that listeners announce to clients. A listener announces what fits the
//! routes to its endpoints, before an endpoint is chosen. If an endpoint turns out to accept less,
//! because of a tunnel behind a router, the listener announces less to the clients that connect
//! from then on. So their streams can be spliced.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};

use socket2::SockRef;
use steer_kernel::net::canonical;
use steer_kernel::tcp::tcp_info::TcpInfo;

use super::Session;

/// A listener announces no less than this because of an endpoint: the largest segment that fits every
/// IPv6 link (RFC 8200, 5), without the headers. One strange endpoint shall not slow down all clients.
const LEAST: u16 = 1280 - 60;

/// All listeners whose MSS may become smaller.
#[derive(Debug, Default)]
pub(super) struct ClientMss(Mutex<Vec<Announcing>>);

#[derive(Debug)]
struct Announcing {
    address: SocketAddr,
    /// Whoever serves the listener decides when its socket is closed.
    socket: Weak<TcpListener>,
    /// What the socket was told; `None`: no limit.
    limit: Option<u16>,
}

impl ClientMss {
    /// Adds a listener, or forgets what was learned for it.
    pub(super) fn add(&self, socket: Weak<TcpListener>, address: SocketAddr, limit: Option<u16>) {
        let mut listeners = self.listeners();
        listeners.retain(|listener| listener.address != address);
        listeners.push(Announcing { address, socket, limit });
    }

    /// Announces less to later clients, if the endpoint of this session accepts less than its client
    /// may send.
    pub(super) fn learn(&self, session: &Session) {
        let Some(accepts) = session.source.as_ref().and_then(|source| source.endpoint_mss()) else { return };
        let told = TcpInfo::of(&session.downstream).map_or(0, |info| info.announced_mss());
        if accepts >= LEAST
            && u32::from(accepts) < told
            && let Ok(local) = session.downstream.local_addr()
        {
            self.narrow(canonical(local), accepts);
        }
    }

    fn narrow(&self, local: SocketAddr, mss: u16) {
        for listener in self.listeners().iter_mut().filter(|listener| listener.may_have_accepted(local)) {
            let Some(socket) = listener.socket.upgrade() else { continue };
            if listener.limit.is_some_and(|limit| limit <= mss) {
                continue;
            }
            listener.limit = Some(mss);
            match limit(&socket, mss) {
                Ok(()) => tracing::info!(
                    listener = %listener.address,
                    mss,
                    "an endpoint accepts only small segments: clients are told so from now on"
                ),
                Err(error) => {
                    tracing::warn!(listener = %listener.address, mss, %error, "cannot limit the MSS");
                }
            }
        }
    }

    fn listeners(&self) -> MutexGuard<'_, Vec<Announcing>> {
        // Nothing panics while the lock is held.
        let mut listeners = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.retain(|listener| listener.socket.strong_count() > 0);
        listeners
    }
}

impl Announcing {
    fn may_have_accepted(&self, local: SocketAddr) -> bool {
        let own = canonical(self.address);
        own.port() == local.port() && (own.ip().is_unspecified() || own.ip() == local.ip())
    }
}

/// Announces no larger segments to the clients that connect from now on.
pub(super) fn limit(socket: &TcpListener, mss: u16) -> io::Result<()> {
    SockRef::from(socket).set_tcp_mss(mss.into())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn listening(all: &ClientMss, limit: Option<u16>) -> (Arc<TcpListener>, SocketAddr) {
        let socket = Arc::new(TcpListener::bind("127.0.0.1:0").unwrap());
        let address = socket.local_addr().unwrap();
        all.add(Arc::downgrade(&socket), address, limit);
        (socket, address)
    }

    fn announced(socket: &TcpListener) -> u32 {
        SockRef::from(socket).tcp_mss().unwrap()
    }

    #[test]
    fn a_listener_announces_the_least_that_was_learned() {
        let all = ClientMss::default();
        let (socket, address) = listening(&all, None);
        let (other, _) = listening(&all, None);
        let usual = announced(&other);
        for (learned, announces) in [(1380, 1380), (1400, 1380), (1300, 1300)] {
            all.narrow(address, learned);
            let limits: Vec<_> = all.listeners().iter().map(|listener| listener.limit).collect();
            assert_eq!(limits, [Some(announces), None]);
        }
        assert_eq!(announced(&other), usual);
        drop(socket);
        assert_eq!(all.listeners().len(), 1, "a closed listener is forgotten");
    }

    #[test]
    fn a_listener_on_all_addresses_has_accepted_what_has_its_port() {
        let at = |address: &str| Announcing {
            address: address.parse().unwrap(),
            socket: Weak::new(),
            limit: None,
        };
        let local = "192.0.2.1:80".parse().unwrap();
        assert!(at("0.0.0.0:80").may_have_accepted(local));
        assert!(at("[::]:80").may_have_accepted(local));
        assert!(at("192.0.2.1:80").may_have_accepted(local));
        assert!(!at("192.0.2.2:80").may_have_accepted(local));
        assert!(!at("0.0.0.0:81").may_have_accepted(local));
    }
}
