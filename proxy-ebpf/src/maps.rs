//! Every map. "Userspace" is always the crate `steer-kernel`. The maps of the packet splice
//! (`STEER_*`) are pinned where that is possible. Pinned maps live until no stream and no daemon is
//! left. All other maps live as long as the daemon. An entry's lifetime is that of the stream
//! unless stated otherwise.

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, bpf_timer};
use aya_ebpf::btf_maps;
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf, SockHash};
use proxy_common::abi::{
    DEFAULT_MAX_RECORDS, FLOW_EVENTS_BYTES, NO_STAMPS_ENTRIES, SOCK_ENTRIES, SOCK_EVENTS_BYTES,
};
use proxy_common::about::About;
use proxy_common::expiry::Expiry;
use proxy_common::flow::{FlowKey4, FlowKey6, FlowRef, Record};
use proxy_common::layout::{ENTRY_COUNT, Entry};
use proxy_common::no_stamps::{LocalEnd, Until};
use proxy_common::packet::options::Walk;
use proxy_common::packet::shape::{FirstPiece, PieceKey};
use proxy_common::sock::{SockCredit, SockFlow};
use proxy_common::stat::Stat;

use crate::packet::Chunk;

/// Tuple of a packet that arrives -> its flow. Two entries for each stream.
/// Never an LRU map: an eviction would reset a living stream.
/// Writer: userspace inserts and removes; `packet_ingress` removes when a SYN takes a tuple whose
/// stream is over. Readers: `packet_ingress`, `packet_egress`.
#[map]
pub(crate) static STEER_FLOWS4: HashMap<FlowKey4, FlowRef> =
    HashMap::with_max_entries(2 * DEFAULT_MAX_RECORDS, BPF_F_NO_PREALLOC);

/// As [`STEER_FLOWS4`].
#[map]
pub(crate) static STEER_FLOWS6: HashMap<FlowKey6, FlowRef> =
    HashMap::with_max_entries(2 * DEFAULT_MAX_RECORDS, BPF_F_NO_PREALLOC);

/// One record for each stream; an array, so a record is never freed but used again under a new
/// generation. Writers, field by field: see [`Record`]. Readers: the programs, and userspace
/// through mmap.
#[map]
pub(crate) static STEER_CONNS: Array<Record> = Array::with_max_entries(DEFAULT_MAX_RECORDS, BPF_F_MMAPABLE);

/// [`proxy_common::flow::FlowEvent`]s. Writer: `packet_ingress`. Reader: userspace.
#[map]
pub(crate) static STEER_EVENTS: RingBuf = RingBuf::with_byte_size(FLOW_EVENTS_BYTES, 0);

/// Counters by [`Stat`]. Writers: the packet programs, each CPU its own. Reader: userspace.
#[map]
pub(crate) static STEER_STATS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Stat::ALL.len() as u32, 0);

/// What these maps are, for the next process that finds them. Writer: userspace. Reader: userspace.
#[map]
pub(crate) static STEER_ABOUT: Array<About> = Array::with_max_entries(1, 0);

/// How they are laid out. Writer: userspace. Reader: userspace of another build.
#[map]
pub(crate) static STEER_LAYOUT: Array<Entry> = Array::with_max_entries(ENTRY_COUNT as u32, 0);

/// Whether a process lives, and how long streams are kept without one. Writer: userspace. Reader:
/// the timer of `packet_expire`.
#[map]
pub(crate) static STEER_AGEING: Array<Expiry> = Array::with_max_entries(1, 0);

/// The timer by which streams expire. The kernel stops the timer when the map is neither open nor
/// pinned any more. The kernel finds the timer in the value by the BTF of the type, which maps of
/// the other kind do not have. Writer and reader: `packet_expire`.
#[btf_map]
pub(crate) static STEER_TIMER: btf_maps::Array<Timer, 1> = btf_maps::Array::new();

#[repr(C)]
pub(crate) struct Timer {
    /// The kernel's own (`struct bpf_timer`).
    pub(crate) timer: bpf_timer,
    /// The first record that the next tick examines.
    pub(crate) next: u32,
    _pad: u32,
}

/// Where the SYNs of clients lose their timestamps. An entry ends at the time in it. Writer:
/// userspace. Reader: `packet_ingress`.
#[map]
pub(crate) static STEER_NO_STAMPS: HashMap<LocalEnd, Until> =
    HashMap::with_max_entries(NO_STAMPS_ENTRIES, BPF_F_NO_PREALLOC);

/// Room for the work on unusual TCP options, which does not fit on the stack. Only `packet_ingress`
/// uses it, for one packet at a time.
#[map]
pub(crate) static STEER_OPTIONS: PerCpuArray<Walk> = PerCpuArray::with_max_entries(1, 0);

/// What the first piece of a packet has told, for the later pieces. An LRU map: an entry is needed
/// only while the pieces of a packet are under way. If an entry is evicted, the pieces are lost,
/// and the sender repeats the packet. Only `packet_ingress` uses it.
#[map]
pub(crate) static STEER_PIECES: LruHashMap<PieceKey, FirstPiece> = LruHashMap::with_max_entries(2048, 0);

/// Room for parts of a segment whose checksum is verified. Only `packet_ingress` uses it, for one
/// packet at a time.
#[map]
pub(crate) static STEER_CHUNK: PerCpuArray<Chunk> = PerCpuArray::with_max_entries(1, 0);

/// Cookie of a source socket -> its *peer* socket. No program is attached here, so that being a
/// target does not make a socket a source.
/// Writer: userspace (both sockets, before any byte is redirected); the kernel removes a socket
/// when it is closed or reset. Reader: `sock_splice`.
#[map]
pub(crate) static SOCK_TARGET: SockHash<u64> = SockHash::with_max_entries(SOCK_ENTRIES, 0);

/// Cookie -> the same socket. `sock_splice` is attached to this map: being in it switches a
/// direction to the kernel.
/// Writer: userspace; the kernel removes as above. Reader: none.
#[map]
pub(crate) static SOCK_SOURCE: SockHash<u64> = SockHash::with_max_entries(SOCK_ENTRIES, 0);

/// Cookie of a source socket -> what was done with its bytes.
/// Writer: userspace inserts zeroes and removes; in between only `sock_splice`. Reader: userspace.
#[map]
pub(crate) static SOCK_FLOW: HashMap<u64, SockFlow> =
    HashMap::with_max_entries(SOCK_ENTRIES, BPF_F_NO_PREALLOC);

/// Cookie of a source socket -> how far it may go.
/// Writer: userspace. Reader: `sock_splice`. Apart from [`SOCK_FLOW`], so that no value has two
/// writers.
#[map]
pub(crate) static SOCK_CREDIT: HashMap<u64, SockCredit> =
    HashMap::with_max_entries(SOCK_ENTRIES, BPF_F_NO_PREALLOC);

/// [`proxy_common::sock::SockEvent`]s. Writer: `sock_splice`. Reader: userspace.
#[map]
pub(crate) static SOCK_EVENTS: RingBuf = RingBuf::with_byte_size(SOCK_EVENTS_BYTES, 0);
