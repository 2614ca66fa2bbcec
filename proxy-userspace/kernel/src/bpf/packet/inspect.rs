//! Reads the connection records of a running Steer from another process, without the help of the
//! running one: the kernel lists all maps to a process with CAP_SYS_ADMIN.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::time::Duration;

use aya::maps::{MapInfo, MapType, loaded_maps};
use proxy_common::abi;
use proxy_common::flow::{Direction, Record, state};

use super::key::Ends;
use super::mapped::MappedRecords;
use crate::bpf::sock::maps::into_io;

/// How many times to read a record that changes while it is being read.
const LOOKS: usize = 4;

/// Why the maps cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    #[error("the kernel does not list its BPF maps to this user; run as root (CAP_SYS_ADMIN)")]
    NoPermission,
    #[error("cannot list the BPF maps of the kernel")]
    List(#[source] io::Error),
    #[error("cannot read BPF map {id}")]
    Read {
        id: u32,
        #[source]
        source: io::Error,
    },
}

/// The records of one running Steer.
#[derive(Debug)]
pub struct Found {
    /// The kernel's id of the map, as in `bpftool map`.
    pub map: u32,
    /// The number of streams for which there is room.
    pub limit: u32,
    /// Oldest first; `None` if this version cannot read the layout of the map.
    pub streams: Option<Vec<Stream>>,
}

/// A stream as its record tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    /// The peer of the downstream connection.
    pub client: SocketAddr,
    /// The address that the client connected to.
    pub listener: SocketAddr,
    /// The address from which Steer connected to the endpoint.
    pub source: SocketAddr,
    /// The peer of the upstream connection.
    pub endpoint: SocketAddr,
    /// One of [`state`], not OFF.
    pub state: u32,
    /// xxh64 of the cluster's name.
    pub cluster: u64,
    /// `None`: there was no hash key and the endpoint was chosen at random.
    pub key_hash: Option<u64>,
    pub opened_unix_ms: u64,
    /// Payload bytes by [`Direction`], with the bytes that userspace moved before the hand-over.
    pub bytes: [u64; 2],
    /// Packets that the kernel has forwarded, by [`Direction`].
    pub packets: [u64; 2],
    /// The time since the last payload in either direction.
    pub idle: Duration,
}

/// The streams that each Steer on this host, also in containers, splices by packets now. `now_ns`
/// is the time of [`monotonic_ns`](crate::tcp::clock::monotonic_ns).
///
/// # Errors
/// This needs CAP_SYS_ADMIN.
pub fn running(now_ns: u64) -> Result<Vec<Found>, InspectError> {
    let mut found = Vec::new();
    for info in loaded_maps() {
        let info = match info.map_err(into_io) {
            Ok(info) => info,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return Err(InspectError::NoPermission);
            }
            // The map was removed after it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(InspectError::List(error)),
        };
        if is_records(&info) {
            let (map, limit) = (info.id(), info.max_entries());
            let streams = (info.value_size() as usize == size_of::<Record>()).then(|| streams(&info, now_ns));
            let streams = streams.transpose().map_err(|source| InspectError::Read { id: map, source })?;
            found.push(Found { map, limit, streams });
        }
    }
    Ok(found)
}

/// The socket splice loads the same object, but shrinks this map to one record.
fn is_records(info: &MapInfo) -> bool {
    info.name() == abi::MAP_CONNS.as_bytes()
        && matches!(info.map_type(), Ok(MapType::Array))
        && info.max_entries() > 1
}

fn streams(info: &MapInfo, now_ns: u64) -> io::Result<Vec<Stream>> {
    let map = info.fd().map_err(into_io)?;
    let records = MappedRecords::map_read_only(map.as_fd(), size_of::<Record>() as u32, info.max_entries())?;
    let in_use = (0..records.count()).filter_map(|index| read(&records, index));
    let mut streams: Vec<_> = in_use.map(|record| stream(&record, now_ns)).collect();
    streams.sort_by_key(|stream| stream.opened_unix_ms);
    Ok(streams)
}

/// A record that is in use, and that belonged to one stream the whole time it was read.
fn read(records: &MappedRecords, index: u32) -> Option<Record> {
    for _ in 0..LOOKS {
        let before = records.snapshot(index);
        let after = records.snapshot(index);
        if after.state == state::OFF {
            return None;
        }
        if before.state != state::OFF && before.generation == after.generation {
            return Some(after);
        }
    }
    None
}

fn stream(record: &Record, now_ns: u64) -> Stream {
    let [to_upstream, to_downstream] = &record.flows;
    let last_payload_ns = to_upstream.live.last_payload_ns.max(to_downstream.live.last_payload_ns);
    let downstream = Ends::of(record, Direction::ToUpstream);
    let upstream = Ends::of(record, Direction::ToDownstream);
    let by_direction =
        |count: fn(&Record, usize) -> u64| Direction::BOTH.map(|way| count(record, way as usize));
    Stream {
        client: downstream.peer,
        listener: downstream.local,
        source: upstream.local,
        endpoint: upstream.peer,
        state: record.state,
        cluster: record.cluster,
        key_hash: (record.has_key == 1).then_some(record.key_hash),
        opened_unix_ms: record.opened_unix_ms,
        bytes: by_direction(|record, way| record.relayed[way].wrapping_add(record.flows[way].live.bytes)),
        packets: by_direction(|record, way| record.flows[way].live.packets),
        idle: Duration::from_nanos(now_ns.saturating_sub(last_payload_ns)),
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;
    use proxy_common::flow::DirFixed;

    use super::super::{wire_address, wire_ports};
    use super::*;

    fn toward(source: SocketAddr, destination: SocketAddr) -> DirFixed {
        DirFixed {
            to_source: wire_address(source.ip()),
            to_destination: wire_address(destination.ip()),
            to_ports: wire_ports(source.port(), destination.port()),
            ..DirFixed::zeroed()
        }
    }

    #[test]
    fn a_record_tells_its_stream() {
        for (family, at) in [(4, ["192.0.2.1", "192.0.2.2"]), (6, ["2001:db8::1", "2001:db8::2"])] {
            let address = |host: usize, port| SocketAddr::new(at[host].parse().unwrap(), port);
            let mut record = Record {
                state: state::SPLICED,
                family,
                has_key: 1,
                key_hash: 7,
                cluster: 9,
                opened_unix_ms: 1000,
                relayed: [10, 20],
                ..Record::zeroed()
            };
            record.flows[0].fixed = toward(address(1, 20000), address(0, 3000));
            record.flows[1].fixed = toward(address(1, 80), address(0, 50000));
            record.flows[0].live.bytes = 1;
            record.flows[1].live.packets = 2;
            record.flows[0].live.last_payload_ns = 5_000_000_000;
            record.flows[1].live.last_payload_ns = 4_000_000_000;
            let expected = Stream {
                client: address(0, 50000),
                listener: address(1, 80),
                source: address(1, 20000),
                endpoint: address(0, 3000),
                state: state::SPLICED,
                cluster: 9,
                key_hash: Some(7),
                opened_unix_ms: 1000,
                bytes: [11, 20],
                packets: [0, 2],
                idle: Duration::from_secs(2),
            };
            assert_eq!(stream(&record, 7_000_000_000), expected);
            record.has_key = 0;
            assert_eq!(stream(&record, 0).key_hash, None);
            assert_eq!(stream(&record, 0).idle, Duration::ZERO);
        }
    }
}
