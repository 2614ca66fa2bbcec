//! Map types of the packet splice.
//!
//! A *record* ([`Record`]) describes one spliced stream: two TCP connections, of each of which the
//! proxy was one end. A *flow* is the packets of one direction as they arrive, found by a map key.
//! So a stream has two flows, one from each peer. Sequence numbers of a flow are in *arrival space*
//! if they are those of the TCP connection on which the packets arrive (the packets' `seq` before
//! it is rewritten). The same holds for acknowledgements.
//!
//! Byte order: fields that say "wire" hold the bytes of the packet as a native load reads them; all
//! others are host order.

use bytemuck::{Pod, Zeroable};

use crate::shared::{Word, shared};

/// Index of a [`Record`] in the map `STEER_CONNS`, with the direction in the lowest bit: the value
/// of the flow maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(transparent)]
pub struct FlowRef(pub u32);

impl FlowRef {
    /// The flow of this direction in the record with this index. The index has at most 31 bits.
    pub const fn new(record: u32, direction: Direction) -> Self {
        Self(record << 1 | direction as u32)
    }

    /// Index of the [`Record`] in the map `STEER_CONNS`.
    pub const fn record(self) -> u32 {
        self.0 >> 1
    }

    /// Where the packets of this flow go.
    pub const fn direction(self) -> Direction {
        if self.0 & 1 == 0 { Direction::ToUpstream } else { Direction::ToDownstream }
    }
}

/// Where a flow's packets go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Direction {
    /// Arrives from the client (downstream).
    ToUpstream = 0,
    /// Arrives from the endpoint (upstream).
    ToDownstream = 1,
}

impl Direction {
    /// Both directions, each at its own index.
    pub const BOTH: [Self; 2] = [Self::ToUpstream, Self::ToDownstream];

    /// The other direction of the same stream.
    pub const fn opposite(self) -> Self {
        match self {
            Self::ToUpstream => Self::ToDownstream,
            Self::ToDownstream => Self::ToUpstream,
        }
    }
}

/// Key of `FLOWS4`: a packet as it arrives, so the source is the peer and the destination is the
/// proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct FlowKey4 {
    /// Wire.
    pub source: u32,
    /// Wire.
    pub destination: u32,
    /// Wire: the first four bytes of the TCP header, source port first.
    pub ports: u32,
}

/// Key of `FLOWS6`, as [`FlowKey4`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct FlowKey6 {
    /// Wire.
    pub source: [u32; 4],
    /// Wire.
    pub destination: [u32; 4],
    /// Wire.
    pub ports: u32,
}

/// Values of [`Record::state`]. Userspace takes OFF -> HAND_OVER -> SPLICED, and anything -> OFF
/// when it frees the record; the program takes the later ones. Every change is a compare-exchange
/// or a store that loses nothing when it is overwritten by a later state.
pub mod state {
    /// Not in use, or not active yet: packets pass to the local stack.
    pub const OFF: u32 = 0;
    /// Packets are spliced; the proxy's sockets still own bytes that are not acknowledged, so they
    /// are given copies of acknowledgements ([`super::flags::COPY_ACKS`]).
    pub const HAND_OVER: u32 = 1;
    /// Packets are spliced; there are no sockets (or there will be none in a moment).
    pub const SPLICED: u32 = 2;
    /// Both FINs were acknowledged. Late retransmissions are still spliced.
    pub const FINISHED: u32 = 3;
    /// A plausible RST went through, or Steer has ended the stream. Stragglers are still spliced,
    /// unless it is [given up](super::flags::GIVEN_UP).
    pub const RESET: u32 = 4;
    /// The tuple was taken by a new connection: packets pass to the local stack.
    pub const DEAD: u32 = 5;
}

/// Bits of [`Record::flags`].
pub mod flags {
    /// Both connections negotiated timestamps, which are translated.
    pub const TIMESTAMPS: u32 = 1 << 0;
    /// SACK blocks are translated.
    pub const SACK: u32 = 1 << 1;
    /// In HAND_OVER, give the local sockets copies of acknowledgements.
    pub const COPY_ACKS: u32 = 1 << 2;
    /// Only one of the connections negotiated ECN: clear ECT, ECE and CWR.
    pub const STRIP_ECN: u32 = 1 << 3;
    /// Steer has ended the stream, or died in its hand-over. In RESET the packets of such a stream
    /// pass to the local stack. The stack does not know the connection, and answers each packet
    /// with a RST of exactly the number that the sender expects. Userspace sets this flag. The
    /// program sets it when the process has died, or for a packet that cannot be carried.
    pub const GIVEN_UP: u32 = 1 << 4;
    /// With GIVEN_UP: a packet of the client came to the local stack, since the programs could not
    /// carry the packet. Written by the program.
    pub const NOT_CARRIED_UP: u32 = 1 << 5;
    /// The same for a packet of the endpoint.
    pub const NOT_CARRIED_DOWN: u32 = 1 << 6;

    /// The flag for the direction of the packet.
    pub const fn not_carried(direction: super::Direction) -> u32 {
        NOT_CARRIED_UP << direction as u32
    }
}

/// Values of [`DirFixed::output`].
pub mod output {
    /// Both peers are on loopback: rewritten in place, the packet goes on to the local stack.
    pub const IN_PLACE: u8 = 0;
    /// bpf_redirect_neigh to `ifindex`.
    pub const NEIGHBOUR: u8 = 1;
    /// bpf_redirect to the ingress of `ifindex`, which is loopback; MAC addresses are zeroed.
    pub const LOOPBACK: u8 = 2;
    /// The packet becomes one of the other IP version, then as [`NEIGHBOUR`].
    pub const OTHER_FAMILY: u8 = 3;
    /// The packet becomes one of the other IP version, then as [`LOOPBACK`].
    pub const OTHER_FAMILY_LOOPBACK: u8 = 4;

    /// The output of the same way for packets that change their IP version. `None`: there is none.
    pub const fn with_other_family(output: u8) -> Option<u8> {
        match output {
            NEIGHBOUR => Some(OTHER_FAMILY),
            LOOPBACK => Some(OTHER_FAMILY_LOOPBACK),
            _ => None,
        }
    }

    /// Whether packets change their IP version.
    pub const fn is_other_family(output: u8) -> bool {
        matches!(output, OTHER_FAMILY | OTHER_FAMILY_LOOPBACK)
    }
}

shared! {
    /// One stream. Userspace sees the whole array through mmap and writes single fields of it,
    /// never a whole live record (that would undo what the program writes).
    pub struct Record, shared as SharedRecord align(64) {
        /// Only in the other layout, for tests: a field that the usual layout does not have.
        #[cfg(feature = "other-layout")]
        pub other: [u64; 8],
        /// One of [`state`]. Userspace stores it with Release after everything else.
        pub state: u32,
        /// [`flags`]. Written by userspace. The program adds only the flags of a stream that it
        /// ends: [`flags::GIVEN_UP`], and the flags that go with it.
        pub flags: u32,
        /// Grows with each use of the record, so that a late event is not taken for a new stream's.
        pub generation: u32,
        /// Seconds without payload after which userspace ends the stream; 0 = never.
        pub idle_timeout_secs: u32,
        /// The hash that chose the endpoint; meaningful if `has_key` is 1.
        pub key_hash: u64,
        /// xxh64 (seed 0) of the cluster's name.
        pub cluster: u64,
        /// When the stream was opened, Unix milliseconds.
        pub opened_unix_ms: u64,
        /// By [`Direction`]. After the hand-over: the number that, added to [`DirLive::bytes`] (the
        /// sum wraps), gives the payload bytes of the stream. Until then: the bytes that userspace
        /// moved before the hand-over.
        pub relayed: [u64; 2],
        /// 1: a hash chose the endpoint, and `key_hash` has that hash. 0: the request had no hash.
        /// Written by userspace before the record is active.
        pub has_key: u32,
        /// 4 or 6: the IP version of the downstream connection. The upstream connection has the
        /// same one, unless [`DirFixed::output`] says otherwise (in both directions).
        pub family: u32,
        /// By [`Direction`].
        pub flows: [Flow; 2],
    }
}

impl Record {
    /// 4 or 6: the IP version of the packets of a direction when they arrive.
    pub const fn family_of(&self, direction: Direction) -> u32 {
        family_of(self.family, self.flows[0].fixed.output, direction)
    }
}

/// [`Record::family_of`], from the fields of a record.
#[inline(always)]
const fn family_of(downstream: u32, output: u8, direction: Direction) -> u32 {
    match direction {
        Direction::ToDownstream if output::is_other_family(output) => {
            if downstream == 4 {
                6
            } else {
                4
            }
        }
        _ => downstream,
    }
}

impl SharedRecord {
    /// [`Record::family_of`].
    #[inline(always)]
    pub fn family_of(&self, direction: Direction) -> u32 {
        family_of(self.family.get(), self.flows[0].fixed.output.get(), direction)
    }

    /// The key in `FLOWS4` of one of the record's flows, if the flow is IPv4.
    #[inline(always)]
    pub fn key4(&self, direction: Direction) -> FlowKey4 {
        let back = &self.flows[direction.opposite() as usize].fixed;
        FlowKey4 {
            source: back.to_destination[0].get(),
            destination: back.to_source[0].get(),
            ports: swapped(back.to_ports.get()),
        }
    }

    /// The key in `FLOWS6`, if the flow is IPv6.
    #[inline(always)]
    pub fn key6(&self, direction: Direction) -> FlowKey6 {
        let back = &self.flows[direction.opposite() as usize].fixed;
        FlowKey6 {
            source: words(&back.to_destination),
            destination: words(&back.to_source),
            ports: swapped(back.to_ports.get()),
        }
    }
}

/// An address of a [`SharedFixed`]. Wire; IPv4 in the first word.
pub type SharedAddress = [Word<u32>; 4];

/// The words of an address.
#[inline(always)]
pub(crate) fn words(address: &SharedAddress) -> [u32; 4] {
    let [a, b, c, d] = address;
    [a.get(), b.get(), c.get(), d.get()]
}

/// Two ports in the other order.
const fn swapped(ports: u32) -> u32 {
    ports.rotate_left(16)
}

shared! {
    /// One flow of a [`Record`]: how its packets are rewritten, and what was seen of them.
    pub struct Flow, shared as SharedFlow align(64) {
        /// How the packets are rewritten. Nearly constant once the record is active.
        pub fixed: DirFixed,
        /// What was seen of the packets. Changes with each packet.
        pub live: DirLive,
    }
}

shared! {
    /// How this direction's packets are rewritten. Written by userspace before the record is
    /// active; except `ts_shift` and, in HAND_OVER, `received`, nothing changes afterwards. So a
    /// copy of these fields on another machine, with its own `ifindex`, can carry the stream on.
    pub struct DirFixed, shared as SharedFixed {
        /// Only in the other layout, for tests: a field that the usual layout does not have.
        #[cfg(feature = "other-layout")]
        pub other: [u64; 8],
        /// Wire; IPv4 in the first word, the rest zero. The proxy's address towards the next peer.
        pub to_source: [u32; 4],
        /// Wire. The next peer.
        pub to_destination: [u32; 4],
        /// Wire, source port first.
        pub to_ports: u32,
        /// Added to `seq`.
        pub seq_delta: u32,
        /// Added to `ack` and to both edges of SACK blocks; the negative of the other direction's
        /// `seq_delta`.
        pub ack_delta: u32,
        /// Added to TSval, and subtracted from the TSecr of the other direction. 0: not known yet.
        /// Written once, by the program that sees the first believed packet with a timestamp after
        /// the hand-over.
        pub ts_shift: u32,
        /// No packet leaves in this direction with a TSval below this one, and the local socket of
        /// the outgoing connection has sent none above this one. 0 until the record is about to
        /// become active. Written by userspace, and raised by the egress program until the record
        /// is active. See [`rewrite::Timestamps`].
        ///
        /// [`rewrite::Timestamps`]: crate::packet::rewrite::Timestamps
        pub ts_floor: u32,
        /// Where packets leave.
        pub ifindex: u32,
        /// One of [`output`].
        pub output: u8,
        /// `window << left >> right`, at most 65,535: from the peer's scale to the one that the
        /// proxy announced on the outgoing connection. Each 0 to 14.
        pub window_left: u8,
        /// The scale that the proxy announced on the outgoing connection (RFC 7323), 0 to 14: see
        /// `window_left`.
        pub window_right: u8,
        /// Padding, which nobody reads.
        pub _pad: u8,
        /// Arrival space: one past what the local socket of the arrival connection has received,
        /// and therefore acknowledged. In HAND_OVER nothing acknowledges less to this direction's
        /// peer.
        pub received: u32,
    }
}

shared! {
    /// What the program counts and remembers of this direction. Userspace initialises `seq_end`,
    /// `ack_end` and (for FINs which the socket had seen) `fin_end` and `bits`; after that only the
    /// program writes, except `own_end` and, in HAND_OVER, `fin_end` and `bits` for FINs that the
    /// socket sees.
    pub struct DirLive, shared as SharedLive {
        /// Packets that arrived while the record was active, whatever their numbers; later
        /// fragments count, too. A FIN or RST with a wrong checksum does not count. A packet that
        /// the kernel has made of several (GRO) counts once. The program adds without an atomic
        /// operation: if two CPUs count at the same time, one packet may be missing.
        pub packets: u64,
        /// Only in the other layout, for tests: a field that the usual layout does not have.
        #[cfg(feature = "other-layout")]
        pub other: [u64; 8],
        /// Payload bytes by advance of `seq_end`: retransmissions and forgeries do not count.
        pub bytes: u64,
        /// CLOCK_MONOTONIC_COARSE ns of the last packet with payload that advanced `seq_end`.
        /// Userspace initialises this with the time of the splice.
        pub last_payload_ns: u64,
        /// The same of the last plausible packet of any kind.
        pub last_packet_ns: u64,
        /// Arrival space: one past the last byte (or FIN) seen.
        pub seq_end: u32,
        /// Arrival space of this flow's `ack` field: the highest acknowledgement seen.
        pub ack_end: u32,
        /// The window field of the newest acknowledgement, as it arrived: host order, not scaled.
        pub window: u16,
        /// The largest window field seen. Userspace starts it with what the local socket was last
        /// offered (tcpi_snd_wnd, scaled back). 0: not known, while a stream moves from one map to
        /// another. Then packets are believed whatever their numbers are, since the numbers here
        /// may lag.
        pub window_max: u16,
        /// The latest TSval of a believed packet, as it arrived. 0: none yet.
        pub ts_value: u32,
        /// Arrival space: one past the FIN, valid with [`bits::FIN_SEEN`].
        pub fin_end: u32,
        /// [`bits`].
        pub bits: u16,
        /// Padding, which nobody reads.
        pub _pad: u16,
        /// The lower half of the kernel's jiffies when `last_packet_ns` was set, so that the clock
        /// is read only once in a jiffy.
        pub tick: u32,
        /// In `ack` space of this flow: end of what the local socket of the *arrival* connection
        /// has been given to send. Userspace writes it before each write to that socket; the
        /// program reads it in HAND_OVER.
        pub own_end: u32,
    }
}

/// Bits of [`DirLive::bits`].
pub mod bits {
    /// A plausible FIN of this direction was seen.
    pub const FIN_SEEN: u16 = 1 << 0;
    /// ... and acknowledged by the other side.
    pub const FIN_ACKED: u16 = 1 << 1;
}

/// A record of the ring `FLOW_EVENTS`, from the program to userspace. May be lost when the ring is
/// full: userspace sweeps the records too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct FlowEvent {
    /// The flow whose packet caused the event. If the local stack sent that packet: the flow that
    /// the packet answers.
    pub flow: FlowRef,
    /// [`Record::generation`] at the time of the event. Userspace ignores an event of an older
    /// generation.
    pub generation: u32,
    /// One of [`event`].
    pub kind: u32,
    /// Padding, which nobody reads.
    pub _pad: u32,
}

/// Values of [`FlowEvent::kind`].
pub mod event {
    /// The first FIN of a direction.
    pub const FIN: u32 = 1;
    /// The state became RESET.
    pub const RESET: u32 = 2;
    /// The state became FINISHED.
    pub const FINISHED: u32 = 3;
    /// The state became DEAD: a SYN took the tuple. The program has deleted this flow's key.
    pub const REUSED: u32 = 4;
}

#[cfg(feature = "user")]
mod user {
    // SAFETY: `repr(transparent)` over u32.
    unsafe impl aya::Pod for super::FlowRef {}
    // SAFETY: `repr(C)`, integers only, no padding (checked below and by bytemuck's derive).
    unsafe impl aya::Pod for super::FlowKey4 {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::FlowKey6 {}
}

#[cfg(not(feature = "other-layout"))]
const _: () = {
    use core::mem::{align_of, offset_of, size_of};
    assert!(size_of::<Record>() == 320 && align_of::<Record>() == 64);
    assert!(offset_of!(Record, flows) == 64 && size_of::<Flow>() == 128);
    assert!(offset_of!(Flow, live) == 64);
    assert!(size_of::<DirFixed>() == 64 && offset_of!(DirFixed, to_ports) == 32);
    assert!(offset_of!(DirFixed, output) == 56 && offset_of!(DirFixed, received) == 60);
    assert!(size_of::<DirLive>() == 64 && offset_of!(DirLive, seq_end) == 32);
    assert!(size_of::<FlowEvent>() == 16);
};
