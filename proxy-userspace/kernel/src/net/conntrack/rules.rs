//! The rules of this network namespace, as far as they look at connection tracking.

use std::fmt;
use std::fs;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use netlink_packet_netfilter::NetfilterMessage;

use super::nftables::{self, Rule};
use crate::net::netlink::Netlink;
use crate::net::pool::Pool;

/// Legacy tables are listed again after this time, since the kernel does not report that a table
/// was made. The same holds for a kernel without nftables: the module may be loaded later.
const LEGACY_AGE: Duration = Duration::from_secs(1);
/// How many times to read a rule set that changes while it is being read.
const READS: usize = 3;
/// In `/proc/thread-self/net`, with the command that belongs to each.
const LEGACY: [(&str, &str); 2] =
    [("ip_tables_names", "iptables-legacy"), ("ip6_tables_names", "ip6tables-legacy")];

/// A rule, or a table with rules, that may drop the packets of a hand-over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Looking {
    Nftables(Rule),
    /// The rules of such tables are not read: only `nft` and `iptables-nft` are common now.
    Legacy {
        command: &'static str,
        table: String,
    },
}

impl fmt::Display for Looking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nftables(rule) => write!(f, "the nftables rule `{rule}`"),
            Self::Legacy { command, table } => write!(f, "the table `{table}` of {command}"),
        }
    }
}

/// Remembers the answer. The rules are read again only after they have changed.
#[derive(Debug, Default)]
pub(super) struct Rules {
    netlink: Pool<Netlink<NetfilterMessage>>,
    /// With the generation that the answer belongs to.
    nftables: Mutex<Option<(u32, Option<Rule>)>>,
    legacy: Mutex<Option<(Instant, Option<Looking>)>>,
    /// When the kernel last said that it has no nftables.
    no_nftables: Mutex<Option<Instant>>,
}

impl Rules {
    /// The first rule that looks at connection tracking, if there is one.
    ///
    /// # Errors
    /// The kernel does not show its rules.
    pub(super) fn looking(&self) -> io::Result<Option<Looking>> {
        if let Some(rule) = self.nftables()? {
            return Ok(Some(Looking::Nftables(rule)));
        }
        self.legacy()
    }

    fn nftables(&self) -> io::Result<Option<Rule>> {
        if lock(&self.no_nftables).is_some_and(|said| said.elapsed() < LEGACY_AGE) {
            return Ok(None);
        }
        let generation = match self.generation() {
            // The kernel has no such module. It looks for the module at each request.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                *lock(&self.no_nftables) = Some(Instant::now());
                return Ok(None);
            }
            generation => generation?,
        };
        let mut known = lock(&self.nftables);
        match &*known {
            Some((of, rule)) if *of == generation => Ok(rule.clone()),
            _ => {
                let read = self.read()?;
                Ok(known.insert(read).1.clone())
            }
        }
    }

    fn generation(&self) -> io::Result<u32> {
        self.netlink.with(Netlink::netfilter, nftables::generation)?
    }

    /// The answer with its generation.
    fn read(&self) -> io::Result<(u32, Option<Rule>)> {
        let mut last = io::Error::from(io::ErrorKind::Interrupted);
        for _ in 0..READS {
            let before = self.generation()?;
            // A socket of its own: after an error, answers may be left in the socket.
            match nftables::first_that_looks(&mut Netlink::netfilter()?) {
                Ok(rule) if self.generation()? == before => return Ok((before, rule)),
                Ok(_) => {}
                // A chain may be removed after it was listed.
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn legacy(&self) -> io::Result<Option<Looking>> {
        let mut known = lock(&self.legacy);
        match &*known {
            Some((listed, table)) if listed.elapsed() < LEGACY_AGE => Ok(table.clone()),
            _ => Ok(known.insert((Instant::now(), list_legacy()?)).1.clone()),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn list_legacy() -> io::Result<Option<Looking>> {
    for (file, command) in LEGACY {
        let names = match fs::read_to_string(format!("/proc/thread-self/net/{file}")) {
            Ok(names) => names,
            // The module is not loaded.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        if let Some(table) = looking_table(&names) {
            return Ok(Some(Looking::Legacy { command, table: table.to_owned() }));
        }
    }
    Ok(None)
}

/// `nat` sees the first packet of a connection only, and `raw` sees packets before they are
/// tracked.
fn looking_table(names: &str) -> Option<&str> {
    names.lines().find(|name| !matches!(*name, "" | "nat" | "raw"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legacy_tables_before_tracking_and_for_nat_do_not_look() {
        assert_eq!(looking_table("nat\nraw\n"), None);
        assert_eq!(looking_table(""), None);
        assert_eq!(looking_table("nat\nfilter\n"), Some("filter"));
        let table = Looking::Legacy { command: "iptables-legacy", table: "filter".to_owned() };
        assert_eq!(table.to_string(), "the table `filter` of iptables-legacy");
    }
}
