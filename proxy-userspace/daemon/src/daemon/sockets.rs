//! Listening sockets: inherited from another process or from the service manager, or bound by this
//! process.

use std::net::{SocketAddr, TcpListener};

use anyhow::Context as _;
use steer_policy::config::Config;

use crate::http;

/// Sockets that another process or the service manager has passed to this process, by their
/// addresses.
pub(super) struct InheritedSockets(Vec<(SocketAddr, TcpListener)>);

impl InheritedSockets {
    pub(super) fn new(sockets: Vec<TcpListener>) -> Self {
        let with_address = |socket: TcpListener| match socket.local_addr() {
            Ok(address) => Some((address, socket)),
            Err(error) => {
                tracing::warn!(%error, "an inherited socket has no address, and is closed");
                None
            }
        };
        Self(sockets.into_iter().filter_map(with_address).collect())
    }

    /// Adds sockets, which are preferred to those that were passed before.
    pub(super) fn add(&mut self, sockets: Vec<TcpListener>) {
        let more = Self::new(sockets);
        self.0.splice(0..0, more.0);
    }

    fn take(&mut self, address: SocketAddr) -> Option<TcpListener> {
        let position = self.0.iter().position(|(given, _)| *given == address)?;
        Some(self.0.remove(position).1)
    }

    /// Warns of sockets that no listener has taken.
    pub(super) fn warn_of_unused(&self) {
        for (address, _) in &self.0 {
            tracing::warn!(%address, "no listener of the configuration has this address: the inherited socket is closed");
        }
    }

    /// A listening socket, from which no connection is accepted yet.
    fn open(&mut self, what: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
        let given = self.take(address);
        let is_given = given.is_some();
        let socket = given.map_or_else(|| http::bind(address), http::inherit);
        let socket = socket.with_context(|| format!("cannot bind {what} to {address}"))?;
        tracing::info!(%address, given = is_given, "{what} listens");
        Ok(socket)
    }
}

/// All listening sockets that a configuration needs.
pub(super) struct Sockets {
    /// In the order of the configuration.
    pub(super) listeners: Vec<TcpListener>,
    pub(super) admin: Option<tokio::net::TcpListener>,
}

impl Sockets {
    /// Opens all sockets before the first connection is accepted, so a bad address stops the start.
    pub(super) fn open(config: &Config, inherited: &mut InheritedSockets) -> anyhow::Result<Self> {
        let listeners = config.listeners.iter();
        let open = |listener: &steer_policy::config::Listener| {
            inherited.open(&format!("listener {}", listener.name), listener.address)
        };
        let listeners = listeners.map(open).collect::<anyhow::Result<_>>()?;
        let admin = config.admin.map(|address| {
            if !address.ip().is_loopback() {
                tracing::warn!(%address, "the admin listener has no access control and is not on loopback");
            }
            let socket = inherited.open("the admin listener", address);
            let socket = socket.context("choose another address with --admin, or --admin off")?;
            tokio::net::TcpListener::from_std(socket).context("cannot watch the admin listener")
        });
        Ok(Self { listeners, admin: admin.transpose()? })
    }
}
