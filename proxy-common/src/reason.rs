//! Why a stream, or one direction of it, is not on a better path than the relay.

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $number:literal, $label:literal;)+) => {
        /// Numbers and labels are stable: maps, metrics (`reason="..."`) and logs carry them.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u32)]
        pub enum Reason {
            $($(#[doc = $doc])+ $name = $number,)+
        }

        impl Reason {
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The metric label and log value.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $label,)+
                }
            }
        }
    };
}

reasons! {
    /// The configuration asks for the relay.
    SpliceOff = 1, "splice_off";
    /// Built without the BPF object.
    NoObject = 2, "no_object";
    /// A capability is missing (CAP_BPF, CAP_NET_ADMIN).
    NoCapability = 3, "no_capability";
    /// The kernel refused the maps or the program.
    KernelRefused = 4, "kernel_refused";
    /// The kernel took the program but the start-up check of its behaviour failed.
    SelfTestFailed = 5, "self_test_failed";
    /// A socket was no longer established (its peer had already closed) at the hand-over.
    NotEstablished = 6, "not_established";
    /// The maps of the wanted path are full.
    MapFull = 7, "map_full";
    /// The kernel refused the socket for another reason (kTLS, owned by other BPF maps).
    InsertFailed = 8, "insert_failed";
    /// More bytes kept coming than the hand-over is willing to move before it switches.
    Busy = 9, "busy";
    /// Its reader fell behind: the credit gate took it back to userspace.
    Gated = 10, "gated";
    /// The socket's TCP state could not be read.
    StateUnreadable = 11, "state_unreadable";
    /// One connection has TCP timestamps and the other has not.
    TimestampsDiffer = 12, "timestamps_differ";
    /// A connection's timestamps are in microseconds.
    MicrosecondTimestamps = 13, "microsecond_timestamps";
    /// A peer may send larger segments than the other one accepts.
    Mss = 14, "mss";
    /// One connection is IPv4 and the other IPv6.
    FamiliesDiffer = 15, "families_differ";
    /// Connection tracking would drop what the hand-over sends: neither notrack nor be_liberal.
    Conntrack = 16, "conntrack";
    /// There is no route, or not one over an interface, to a peer.
    NoRoute = 17, "no_route";
    /// The program cannot be attached to an interface (not Ethernet or loopback, or refused).
    Interface = 18, "interface";
    /// A peer on this host in a combination that is not spliced.
    LocalHop = 19, "local_hop";
    /// All source ports towards the endpoint are taken by living streams.
    NoSourcePort = 20, "no_source_port";
    /// The kernel refused TCP_REPAIR or SO_MARK.
    RepairRefused = 21, "repair_refused";
    /// The connection has what cannot be translated: TCP-MD5/AO, MPTCP, kTLS.
    TcpFeature = 22, "tcp_feature";
}

impl Reason {
    pub const fn number(self) -> u32 {
        self as u32
    }
}

#[cfg(test)]
mod tests {
    use super::Reason;

    #[test]
    fn numbers_and_labels_are_unique_and_frozen() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            // A new reason goes to the end; a number is never given to another one.
            assert_eq!(reason.number() as usize, index + 1, "{reason:?}");
            let same = Reason::ALL.iter().filter(|other| other.as_str() == reason.as_str());
            assert_eq!(same.count(), 1, "{reason:?}");
            assert!(reason.as_str().bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{reason:?}");
        }
    }
}
