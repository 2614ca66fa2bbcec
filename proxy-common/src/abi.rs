//! Names and sizes that both sides spell the same way.

/// Version of every map layout in this crate; raised by any change to a shared type.
pub const ABI_VERSION: u32 =
    if cfg!(feature = "other-layout") { OWN_ABI_VERSION + 1000 } else { OWN_ABI_VERSION };
const OWN_ABI_VERSION: u32 = 8;

/// The sk_skb stream verdict program of the socket splice.
pub const PROG_SOCK_SPLICE: &str = "sock_splice";

/// The packet splice's program for the TC ingress hook of an interface. The program forwards the
/// packets of streams, and lets all other packets pass.
pub const PROG_PACKET_INGRESS: &str = "packet_ingress";
/// The packet splice's program for the TC egress hook of an interface. The program looks after the
/// packets that the local stack sends on the connections of a stream.
pub const PROG_PACKET_EGRESS: &str = "packet_egress";
/// The program that starts the packet splice's timer, to be run once with BPF_PROG_TEST_RUN. It
/// returns 0, or the negative error number of the helper that failed.
pub const PROG_PACKET_EXPIRE: &str = "packet_expire";

// Names of the maps as they stand in the object. The kernel keeps the first 15 bytes of a name.
// `proxy-ebpf/src/maps.rs` says who writes and who reads each map.

/// The hash map from [`FlowKey4`](crate::flow::FlowKey4) to [`FlowRef`](crate::flow::FlowRef).
pub const MAP_FLOWS4: &str = "STEER_FLOWS4";
/// The hash map from [`FlowKey6`](crate::flow::FlowKey6) to [`FlowRef`](crate::flow::FlowRef).
pub const MAP_FLOWS6: &str = "STEER_FLOWS6";
/// The array of [`Record`](crate::flow::Record)s, one for each stream. Userspace maps the array
/// into its memory.
pub const MAP_CONNS: &str = "STEER_CONNS";
/// The ring of [`FlowEvent`](crate::flow::FlowEvent)s, from the programs to userspace.
pub const MAP_FLOW_EVENTS: &str = "STEER_EVENTS";
/// The array of counters (`u64`). Each CPU has its own. The index is the number of a
/// [`Stat`](crate::stat::Stat).
pub const MAP_FLOW_STATS: &str = "STEER_STATS";
/// The array with one [`About`](crate::about::About): whose packets the maps are about.
pub const MAP_ABOUT: &str = "STEER_ABOUT";
/// The array with one [`Expiry`](crate::expiry::Expiry): whether a process lives, and how long the
/// kernel keeps streams without one.
pub const MAP_AGEING: &str = "STEER_AGEING";
/// The array with one value: the kernel's timer by which streams expire, and the number of the
/// record that the timer examines next.
pub const MAP_TIMER: &str = "STEER_TIMER";
/// The array of [`Entry`](crate::layout::Entry): where each field of a record is, for a process of
/// another build.
pub const MAP_LAYOUT: &str = "STEER_LAYOUT";
/// The hash map from [`LocalEnd`](crate::no_stamps::LocalEnd) to
/// [`Until`](crate::no_stamps::Until): where SYNs lose their timestamps.
pub const MAP_NO_STAMPS: &str = "STEER_NO_STAMPS";
/// A global of the object: the mark (`SO_MARK`) of the proxy's own sockets during a hand-over. The
/// mark plus one is that of copied acknowledgements. The mark plus two ([`syn_mark`]) is that of
/// sockets whose SYN is to leave without timestamps.
pub const GLOBAL_MARK: &str = "MARK";
/// A global of the object: whether (1) the kernel has bpf_loop.
pub const GLOBAL_HAS_LOOP: &str = "HAS_LOOP";
/// The mark if the configuration names no other (`packet_splice.mark`). The next two numbers are
/// used as well, as [`GLOBAL_MARK`] says.
pub const DEFAULT_MARK: u32 = 0x5b11_ce00;
/// The largest mark that a configuration may name: no mark is 0.
pub const MAX_MARK: u32 = u32::MAX - 2;

/// The mark of a socket whose SYN the egress program is to send without timestamps. `mark`: that of
/// hand-overs.
#[inline(always)]
pub const fn syn_mark(mark: u32) -> u32 {
    mark.wrapping_add(2)
}

/// Streams that the packet splice has room for, unless userspace sets another size when it loads
/// the maps (`STEER_CONNS` has so many entries, the flow maps twice as many).
pub const DEFAULT_MAX_RECORDS: u32 = 65_536;
/// Local addresses with a port that can be without timestamps at the same time. Clients of further
/// ones have timestamps, as if nothing were known.
pub const NO_STAMPS_ENTRIES: u32 = 1024;
/// Bytes of the event ring; events may be lost, so it need not hold all that can be under way.
pub const FLOW_EVENTS_BYTES: u32 = 1 << 20;

// The maps of the socket splice. All but the ring have a socket cookie as the key.

/// The socket map from the cookie of a source socket to the *peer* socket, into which the program
/// redirects.
pub const MAP_SOCK_TARGET: &str = "SOCK_TARGET";
/// The socket map from a cookie to the socket itself. The program runs for what these sockets
/// receive.
pub const MAP_SOCK_SOURCE: &str = "SOCK_SOURCE";
/// The hash map from the cookie of a source socket to [`SockFlow`](crate::sock::SockFlow).
pub const MAP_SOCK_FLOW: &str = "SOCK_FLOW";
/// The hash map from the cookie of a source socket to [`SockCredit`](crate::sock::SockCredit).
pub const MAP_SOCK_CREDIT: &str = "SOCK_CREDIT";
/// The ring of [`SockEvent`](crate::sock::SockEvent)s, from the program to userspace.
pub const MAP_SOCK_EVENTS: &str = "SOCK_EVENTS";

/// Entries in each socket map: one for each direction, hence two for each stream.
pub const SOCK_ENTRIES: u32 = 131_072;

/// Bytes of the event ring; a power of two and a multiple of the page size.
///
/// A flow can have two events under way, one warning (user space arms the next one) and one gate
/// event (there is only one in its life). An event takes 16 bytes and the ring's own 8. So a ring
/// of 2 * 24 bytes for each entry is never full: 131,072 * 48 = 6 MiB, rounded up.
pub const SOCK_EVENTS_BYTES: u32 = 8 << 20;

const _: () = assert!(SOCK_EVENTS_BYTES.is_power_of_two());
const _: () = assert!(
    SOCK_EVENTS_BYTES as usize >= SOCK_ENTRIES as usize * 2 * (size_of::<crate::sock::SockEvent>() + 8)
);
