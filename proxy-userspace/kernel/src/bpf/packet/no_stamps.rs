//! Where the programs take the timestamps out of the SYNs of clients.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use aya::maps::{HashMap, Map, MapData, MapError};
use proxy_common::abi;
use proxy_common::no_stamps::{LocalEnd, Until};
use proxy_common::packet::headers::Ethernet;

use super::key::wire_address;
use crate::bpf::loader::{self, LoadError};
use crate::bpf::sock::maps::into_io;
use crate::tcp::clock::monotonic_ns;

type Handle = HashMap<MapData, LocalEnd, Until>;

/// The map `STEER_NO_STAMPS`.
pub(super) struct NoStamps(Mutex<Handle>);

impl fmt::Debug for NoStamps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // aya's maps are not `Debug`.
        f.write_str("NoStamps")
    }
}

impl NoStamps {
    pub(super) fn new(map: Map) -> Result<Self, LoadError> {
        loader::typed(map, abi::MAP_NO_STAMPS).map(Mutex::new).map(Self)
    }

    /// Adds an entry, or makes it last longer. If the map is full, entries that are over make room.
    pub(super) fn add(&self, local: SocketAddr, time: Duration) -> io::Result<()> {
        // The handle holds a descriptor and nothing that a panic could leave half done.
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = monotonic_ns();
        let until = Until { ns: now.saturating_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)) };
        let key = key(local);
        match map.insert(key, until, 0).map_err(into_io) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC)) => {
                remove_over(&mut map, now);
                map.insert(key, until, 0).map_err(into_io)
            }
            added => added,
        }
    }
}

/// The entry for clients that connect to `local`.
fn key(local: SocketAddr) -> LocalEnd {
    let ip = local.ip().to_canonical();
    let kind = if ip.is_ipv4() { Ethernet::IPV4 } else { Ethernet::IPV6 };
    LocalEnd { address: wire_address(ip), port: local.port().to_be(), kind }
}

fn remove_over(map: &mut Handle, now: u64) {
    // Another process of the instance may remove the same entries.
    let is_over = |entry: Result<(LocalEnd, Until), MapError>| {
        entry.ok().filter(|(_, until)| until.is_over(now)).map(|(key, _)| key)
    };
    let over: Vec<_> = map.iter().filter_map(is_over).collect();
    for key in over {
        map.remove(&key).ok();
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;
    use proxy_common::packet::headers::{Ip as _, Ipv4, Ipv6};

    use super::*;
    use crate::bpf::packet::key::wire_ports;

    #[test]
    fn an_entry_matches_what_arrives_at_the_address() {
        let ports = wire_ports(50_000, 8080);
        let v4 = Ipv4 { destination: u32::from_ne_bytes([192, 0, 2, 9]), ..Ipv4::zeroed() };
        assert_eq!(v4.local_end(ports), key("192.0.2.9:8080".parse().unwrap()));
        assert_eq!(v4.local_end(ports), key("[::ffff:192.0.2.9]:8080".parse().unwrap()));
        assert_ne!(v4.local_end(ports), key("192.0.2.9:8081".parse().unwrap()));
        let v6 = "[2001:db8::9]:8080".parse().unwrap();
        let destination = wire_address("2001:db8::9".parse().unwrap());
        assert_eq!(Ipv6 { destination, ..Ipv6::zeroed() }.local_end(ports), key(v6));
    }
}
