//! The memory that a subject holds, in its processes and in the kernel, from `/proc` and the
//! kernel's list of maps.

use std::fs;

use anyhow::{Context as _, Result};
use proxy_common::abi;
use steer_tests::netns::NetNs;

use crate::bpf::{self, field};
use crate::subjects::Subject;

/// In bytes, except for `sockets`.
#[derive(Debug, Clone, Default)]
pub(super) struct Footprint {
    /// Resident memory of all processes of the subject, and their page tables. A page that several
    /// processes share counts once. Mapped BPF maps do not count.
    pub(super) process: u64,
    /// BPF maps of the subject: all of an array, but only the present entries of a hash.
    pub(super) maps: u64,
    /// The records of the packet splice that are in use. Their whole array is part of `maps`.
    pub(super) records: u64,
    /// The kernel's objects for sockets, for all processes of the machine.
    pub(super) kernel: u64,
    /// TCP sockets in the subject's namespace, except those in TIME_WAIT.
    pub(super) sockets: u64,
}

impl Footprint {
    pub(super) fn of(subject: &Subject<'_>) -> Result<Self> {
        let pids = subject.pids()?;
        let maps = subject.steer().map_or(Ok(Vec::new()), |steer| bpf::maps_of(steer.pid()))?;
        let record = maps.iter().find(|map| map.name == abi::MAP_CONNS).map_or(0, |map| map.value_size);
        let used = match subject.steer() {
            Some(steer) if record > 0 => steer.metric("steer_packet_streams", &[("kind", "used")])? as u64,
            _ => 0,
        };
        Ok(Self {
            process: pids.iter().map(|pid| process(*pid)).sum::<Result<_>>()?,
            maps: maps.iter().map(|map| map.bytes).sum(),
            records: used * u64::from(record),
            kernel: kernel()?,
            sockets: sockets(&subject.lane().netns)?,
        })
    }

    /// `maps`, plus the records in use. The array of records counts in full as well, so only the
    /// difference of two such values means something: what streams have added.
    pub(super) const fn maps_in_use(&self) -> u64 {
        self.maps + self.records
    }

    pub(super) const fn all(&self) -> u64 {
        self.process + self.maps_in_use() + self.kernel
    }
}

/// The proportional memory of all mappings except BPF maps, and the page tables.
fn process(pid: u32) -> Result<u64> {
    let read = |name: &str| {
        let path = format!("/proc/{pid}/{name}");
        fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
    };
    let mut kilobytes = field(&read("status")?, "VmPTE:").context("no VmPTE")?;
    let mut counts = true;
    for line in read("smaps")?.lines() {
        // A mapping begins with its addresses, `7f00-7f01 r--p ... NAME`. A line about the mapping
        // begins with a word and a colon.
        if line.split_once(' ').is_some_and(|(first, _)| first.contains('-')) {
            counts = !line.contains("anon_inode:bpf-map");
        } else if counts && line.starts_with("Pss:") {
            kilobytes += field(line, "Pss:").context("no Pss")?;
        }
    }
    Ok(kilobytes * 1024)
}

/// The kernel's caches that hold sockets and what belongs to sockets: descriptors, epoll, buffers,
/// entries of maps. The sockets of ended connections (`tw_sock`) do not count.
const CACHES: [&str; 7] = ["TCP", "sock_inode_cache", "filp", "eventpoll", "skbuff", "kmalloc", "tcp_bind"];
/// For names of files and the like.
const RECLAIMABLE: &str = "kmalloc-rcl";
/// Each socket has one object of each of these caches. Files have them as well, and files come and
/// go, so the number of sockets' inodes is used instead.
const OF_EACH_SOCKET: [&str; 2] = ["dentry", "lsm_inode_cache"];

/// Bytes of the kernel's objects in use, of the whole machine.
fn kernel() -> Result<u64> {
    let text = fs::read_to_string("/proc/slabinfo").context("cannot read /proc/slabinfo")?;
    let counts =
        |name: &str| CACHES.iter().any(|cache| name.starts_with(cache)) && !name.starts_with(RECLAIMABLE);
    // Without the shrink, unused objects that the kernel keeps ready for each processor would count
    // as used.
    for cache in text.lines().filter_map(Cache::parse).filter(|cache| counts(cache.name)) {
        let path = format!("/sys/kernel/slab/{}/shrink", cache.name);
        // On kernels without this file, the numbers are less exact.
        fs::write(path, "1").ok();
    }
    let text = fs::read_to_string("/proc/slabinfo").context("cannot read /proc/slabinfo")?;
    let caches: Vec<_> = text.lines().filter_map(Cache::parse).collect();
    let bytes: f64 = caches.iter().filter(|cache| counts(cache.name)).map(Cache::bytes).sum();
    let inodes = caches
        .iter()
        .find(|cache| cache.name == "sock_inode_cache")
        .context("/proc/slabinfo has no sock_inode_cache")?;
    let beside = caches.iter().filter(|cache| OF_EACH_SOCKET.contains(&cache.name)).map(|cache| cache.size);
    Ok((bytes + inodes.objects * beside.sum::<f64>()) as u64)
}

/// A line of `/proc/slabinfo`.
struct Cache<'a> {
    name: &'a str,
    /// The number of objects in use.
    objects: f64,
    /// Bytes for one object, with its share of the unused rest of the cache's pages.
    size: f64,
}

impl<'a> Cache<'a> {
    /// `name active_objs num_objs objsize objperslab pagesperslab : ...`
    fn parse(line: &'a str) -> Option<Self> {
        const PAGE: f64 = 4096.0;
        let mut words = line.split_whitespace();
        let name = words.next()?;
        let numbers: Vec<f64> = words.map_while(|word| word.parse().ok()).collect();
        let [objects, _, _, per_slab, pages] = numbers[..] else { return None };
        Some(Self { name, objects, size: pages * PAGE / per_slab })
    }

    fn bytes(&self) -> f64 {
        self.objects * self.size
    }
}

/// The number of TCP sockets of a namespace.
pub(super) fn sockets(netns: &NetNs) -> Result<u64> {
    let read = || fs::read_to_string("/proc/thread-self/net/sockstat");
    field(&netns.run(read)?.context("cannot read sockstat")?, "TCP: inuse")
        .context("sockstat does not have the line of TCP")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_is_read_with_what_its_pages_leave_over() {
        let cache = Cache::parse("TCP  109  156  2368  13  8 : tunables 0 0 0 : slabdata 12 12 0").unwrap();
        assert_eq!((cache.name, cache.objects, cache.size.round()), ("TCP", 109.0, 2521.0));
        assert!(Cache::parse("# name  <active_objs> <num_objs>").is_none());
    }
}
