//! What becomes of a packet: every end that it can come to in these programs, on one screen.

use aya_ebpf::bindings::{TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC};
use proxy_common::stat::Stat;

use crate::packet::stats::count;

/// An end of a packet, at either hook. Without data: a function of the program returns one
/// register.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Verdict {
    /// Left to the other programs of the hook and the local stack, as if there were no splice. Not
    /// counted.
    Pass,
    /// Its stream is not active, or was given up.
    Off,
    /// Its stream's tuple was taken by a new connection.
    Dead,
    /// Of a stream, but not of a shape that is forwarded.
    OddShape,
    /// A SYN that takes the tuple of a stream that is over, or the answer of the local stack to one
    /// before the splice.
    Reused,
    /// An ICMP error for a stream, but not about a packet that is under way.
    IcmpPassed,
    /// A copy of an acknowledgement, for a socket in its hand-over.
    Copy,
    /// A packet of a socket in its hand-over, brought up to date.
    Freshened,
    /// A SYN of the proxy, from which the timestamps were taken.
    SynPlain,
    /// A SYN of a client, from which the timestamps were taken.
    SynPlainIn,
    /// A RST of the local stack that ends its stream, since a packet of the peer was not carried.
    GivenUp,
    /// Forwarded to the other peer, by its interface.
    Spliced,
    /// The same, by the local stack: both peers are on loopback.
    SplicedInPlace,
    /// A piece of a packet, forwarded.
    Piece,
    /// An ICMP error, forwarded to the peer that has caused it.
    Icmp,
    /// The same, by the local stack.
    IcmpInPlace,
    /// Rewritten, but not yet in the IP version of the other peer. Not an end: the packet goes on to
    /// [`family`](crate::packet::family).
    OtherFamily,
    /// The kernel refused to change the packet.
    NotRewritten,
    /// A copy, but there is no hand-over any more, or no socket.
    LateCopy,
    /// A copy that the kernel refused to cut to size.
    BadCopy,
    /// A RST of the local stack for a living stream.
    StackReset,
}

impl Verdict {
    /// Counts the packet; returns what the kernel is to do with it.
    #[inline(always)]
    pub(super) fn conclude(self) -> i32 {
        /// Another program of the hook decides, and if there is none the packet goes on.
        const PASS: i32 = TC_ACT_UNSPEC;
        const DROP: i32 = TC_ACT_SHOT;
        /// As a helper has noted.
        const REDIRECT: i32 = TC_ACT_REDIRECT;
        let (action, stat) = match self {
            Self::Pass => return PASS,
            Self::Off => (PASS, Stat::PassOff),
            Self::Dead => (PASS, Stat::PassDead),
            Self::OddShape => (PASS, Stat::PassShape),
            Self::Reused => (PASS, Stat::Reused),
            Self::IcmpPassed => (PASS, Stat::IcmpPassed),
            Self::Copy => (PASS, Stat::CopyPassed),
            Self::Freshened => (PASS, Stat::Freshened),
            Self::SynPlain => (PASS, Stat::SynPlain),
            Self::SynPlainIn => (PASS, Stat::SynPlainIn),
            Self::GivenUp => (PASS, Stat::GivenUp),
            Self::Spliced => (REDIRECT, Stat::Spliced),
            Self::SplicedInPlace => (PASS, Stat::Spliced),
            Self::Piece => (REDIRECT, Stat::Fragment),
            Self::Icmp => (REDIRECT, Stat::IcmpTranslated),
            Self::IcmpInPlace => (PASS, Stat::IcmpTranslated),
            Self::OtherFamily | Self::NotRewritten => (DROP, Stat::DropRewrite),
            Self::LateCopy => (DROP, Stat::DropLateCopy),
            Self::BadCopy => (DROP, Stat::CopyFailed),
            Self::StackReset => (DROP, Stat::DropStackRst),
        };
        count(stat);
        action
    }
}
