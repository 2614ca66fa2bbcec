//! Every map. "Userspace" is always its `kernel/` module. All maps live as long as the daemon:
//! nothing is pinned, and an entry's lifetime is that of the session unless stated otherwise.

use aya_ebpf::macros::map;
use aya_ebpf::maps::{HashMap, RingBuf, SockHash};
use proxy_common::abi::{SOCK_ENTRIES, SOCK_EVENTS_BYTES};
use proxy_common::sock::{SockCredit, SockFlow};

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
    HashMap::with_max_entries(SOCK_ENTRIES, aya_ebpf::bindings::BPF_F_NO_PREALLOC);

/// Cookie of a source socket -> how far it may go.
/// Writer: userspace. Reader: `sock_splice`. Apart from [`SOCK_FLOW`], so that no value has two
/// writers.
#[map]
pub(crate) static SOCK_CREDIT: HashMap<u64, SockCredit> =
    HashMap::with_max_entries(SOCK_ENTRIES, aya_ebpf::bindings::BPF_F_NO_PREALLOC);

/// [`proxy_common::sock::SockEvent`]s. Writer: `sock_splice`. Reader: userspace.
#[map]
pub(crate) static SOCK_EVENTS: RingBuf = RingBuf::with_byte_size(SOCK_EVENTS_BYTES, 0);
