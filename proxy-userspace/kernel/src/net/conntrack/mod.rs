//! Whether connection tracking would disturb a hand-over.
//!
//! Connection tracking follows the windows of both peers, and the trimmed acknowledgements of a
//! hand-over lie outside of these windows: they count as invalid. Connection tracking itself drops
//! nothing. But a rule that looks at the state of packets may drop invalid ones (`ct state invalid
//! drop`), or let only established ones in. There is no harm if
//!
//! - the connection is not tracked (`notrack` in both directions), or
//! - no rule looks, or
//! - `net.netfilter.nf_conntrack_tcp_be_liberal` is on: then these packets do not count as invalid.
//!
//! A connection that a rule rewrites (NAT) cannot be handed over in any case: netfilter does not
//! see spliced packets, so the packets would keep the addresses that the sockets know.

mod entry;
mod nftables;
mod rules;

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};

use netlink_packet_netfilter::NetfilterMessage;

use self::entry::Entry;
pub use self::nftables::Rule;
pub use self::rules::Looking;
use self::rules::Rules;
use super::host;
use super::netlink::Netlink;
use super::pool::Pool;
use super::sysctl::Sysctl;

const LIBERAL: &str = "netfilter/nf_conntrack_tcp_be_liberal";

/// What to do with a tracked connection that no rule rewrites, while
/// `nf_conntrack_tcp_be_liberal` is off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handling {
    /// Hand it over if no rule looks at connection tracking.
    ByRules,
    Relay,
}

/// Why a connection should not be handed over.
#[derive(Debug, thiserror::Error)]
pub enum Obstacle {
    #[error("a rule rewrites the addresses of the connection (NAT)")]
    Rewritten,
    #[error("the connection is tracked")]
    Tracked,
    #[error("{0} looks at the state of the connection")]
    Rule(Looking),
    #[error("the kernel does not tell what it tracks, or its rules")]
    Unreadable(#[source] io::Error),
}

/// Asks about connections of the network namespace in which it was made. Needs CAP_NET_ADMIN.
/// Threads that ask at the same time have sockets of their own; all of these threads must be in
/// that namespace.
#[derive(Debug)]
pub struct Conntrack {
    handling: Handling,
    /// The number of tracked connections. Missing if the module is not loaded; 0 as long as no rule
    /// has started tracking in this namespace.
    entries: Sysctl,
    /// Whether segments outside of the windows count as valid.
    is_liberal: Sysctl,
    rules: Rules,
    netlink: Pool<Netlink<NetfilterMessage>>,
    /// The kernel has no module that could answer.
    nobody_answers: AtomicBool,
}

impl Conntrack {
    /// Never fails. If the kernel cannot be asked, [`is_tracked`](Self::is_tracked) makes a careful
    /// guess.
    pub fn new(handling: Handling) -> Self {
        let netlink = Netlink::netfilter();
        Self {
            handling,
            entries: Sysctl::new("netfilter/nf_conntrack_count"),
            is_liberal: Sysctl::new(LIBERAL),
            rules: Rules::default(),
            // If the protocol is missing, this kernel has no netfilter, or none that can be asked.
            nobody_answers: AtomicBool::new(netlink.is_err()),
            netlink: netlink.map(Pool::of).unwrap_or_default(),
        }
    }

    /// Whether the connection between these addresses, as its socket knows them, is tracked by an
    /// entry that no rule needs, so that it can be [forgotten](Self::forget). An entry in a zone of its
    /// own (`ct zone set`) is not seen.
    ///
    /// A firewall may start tracking at any time, so nothing is remembered about entries. As long as
    /// nothing is tracked, the answer costs one system call. For a tracked connection the kernel is
    /// also asked whether its rules have changed.
    ///
    /// # Errors
    /// Why the connection should not be handed over. If the kernel cannot be asked about one
    /// connection (nf_conntrack_netlink is missing), that is an obstacle as soon as the kernel
    /// tracks any connection.
    pub fn is_tracked(&self, peer: SocketAddr, local: SocketAddr) -> Result<bool, Obstacle> {
        if !is_positive(&self.entries) {
            return Ok(false);
        }
        match self.entry(peer, local).map_err(Obstacle::Unreadable)? {
            None => Ok(false),
            Some(Entry::Rewritten) => Err(Obstacle::Rewritten),
            // A rule that looks may still meet later packets, such as a RST from Steer or the FIN of a
            // container. Without their entry, these packets would be invalid.
            Some(Entry::Plain) if is_positive(&self.is_liberal) => {
                Ok(self.rules.looking().is_ok_and(|looking| looking.is_none()))
            }
            Some(Entry::Plain) if self.handling == Handling::Relay => Err(Obstacle::Tracked),
            Some(Entry::Plain) => match self.rules.looking().map_err(Obstacle::Unreadable)? {
                Some(looking) => Err(Obstacle::Rule(looking)),
                None => Ok(true),
            },
        }
    }

    /// Removes the entry of a connection that [is tracked](Self::is_tracked), and whose packets
    /// netfilter does not see any more. Otherwise the entry would stay for
    /// `nf_conntrack_tcp_timeout_established`, five days by default.
    ///
    /// A packet of the connection may reach the local stack later, when the stream was given up.
    /// Connection tracking then begins in the middle (`nf_conntrack_tcp_loose`, on by default): the
    /// packet counts as the first of a new connection. The stack answers with a RST, which ends
    /// the new entry after ten seconds.
    ///
    /// # Errors
    /// What the kernel answered. No error if there is no entry.
    pub fn forget(&self, peer: SocketAddr, local: SocketAddr) -> io::Result<()> {
        let request = entry::delete(peer, local);
        match self.netlink.with(Netlink::netfilter, |netlink| netlink.tell(request))? {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            told => told,
        }
    }

    fn entry(&self, peer: SocketAddr, local: SocketAddr) -> io::Result<Option<Entry>> {
        if self.nobody_answers.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let request = entry::get(peer, local);
        match self.netlink.with(Netlink::netfilter, |netlink| netlink.ask(request))? {
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

/// Whether segments outside of the windows count as valid in the caller's network namespace. `None`:
/// connection tracking is not loaded.
///
/// # Errors
/// The setting cannot be read.
pub fn is_liberal() -> io::Result<Option<bool>> {
    match fs::read_to_string(host::path(LIBERAL)) {
        Ok(text) => Ok(Some(text.trim() != "0")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// # Errors
/// CAP_NET_ADMIN is missing, or /proc/sys is read-only.
pub fn set_liberal(on: bool) -> io::Result<()> {
    fs::write(host::path(LIBERAL), if on { "1" } else { "0" })
}

fn is_positive(setting: &Sysctl) -> bool {
    setting.number().is_some_and(|number| number > 0)
}
