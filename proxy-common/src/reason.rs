//! Why a stream, or one direction of it, is not on a better path than the relay.

use crate::labels::labelled;

labelled! {
    /// Numbers and labels are stable: maps, metrics (`reason="..."`) and logs carry them.
    /// docs/splice.md says what to do about each.
    pub enum Reason {
        /// The configuration asks for the relay.
        SpliceOff = 1, "splice_off";
        /// Built without the BPF object.
        NoObject = 2, "no_object";
        /// A capability is missing: CAP_BPF or CAP_NET_ADMIN; for the packet splice also
        /// CAP_PERFMON or CAP_NET_RAW.
        NoCapability = 3, "no_capability";
        /// The kernel refused the maps or the program.
        KernelRefused = 4, "kernel_refused";
        /// The kernel took the program but the start-up check of its behaviour failed.
        SelfTestFailed = 5, "self_test_failed";
        /// A socket was no longer established (its peer had already closed) at the hand-over.
        NotEstablished = 6, "not_established";
        /// The maps of the wanted path are full.
        MapFull = 7, "map_full";
        /// The kernel refused the entry of a map for another reason: kTLS, a socket in a map of
        /// another program, a tuple that another stream has.
        InsertFailed = 8, "insert_failed";
        /// More bytes kept coming than the hand-over is willing to move before it switches.
        Busy = 9, "busy";
        /// The reader fell behind, and the credit gate took the stream back to userspace.
        Gated = 10, "gated";
        /// The socket's TCP state could not be read.
        StateUnreadable = 11, "state_unreadable";
        /// One connection has TCP timestamps and the other does not.
        TimestampsDiffer = 12, "timestamps_differ";
        /// A connection's timestamps are in microseconds.
        MicrosecondTimestamps = 13, "microsecond_timestamps";
        /// A peer may send larger segments than the other one accepts.
        Mss = 14, "mss";
        /// One connection is IPv4 and the other IPv6, and both peers are on loopback.
        FamiliesDiffer = 15, "families_differ";
        /// A rule of this host may drop what the hand-over sends, by its state in connection
        /// tracking; or a rule rewrites the connection.
        Conntrack = 16, "conntrack";
        /// There is no route to a peer, or the route does not lead over an interface.
        NoRoute = 17, "no_route";
        /// The program cannot be attached to an interface (not Ethernet or loopback, or refused).
        Interface = 18, "interface";
        /// A peer on this host in a combination that is not spliced.
        LocalHop = 19, "local_hop";
        /// All source ports towards the endpoint are taken by living streams.
        NoSourcePort = 20, "no_source_port";
        /// The kernel refused TCP_REPAIR or SO_MARK.
        RepairRefused = 21, "repair_refused";
        /// The connection uses a feature that cannot be translated: TCP-MD5/AO, MPTCP, kTLS. Steer
        /// asks for none of them.
        TcpFeature = 22, "tcp_feature";
        /// Another process has taken over and has the maps; this one ends when its own streams have
        /// ended.
        TakenOver = 23, "taken_over";
        /// A peer's window is so small that rounding it down to the window units of the other
        /// connection leaves little or nothing.
        Window = 24, "window";
        /// In the last hour, a packet of a peer could not be carried, and a stream of that peer was
        /// given up.
        NotCarried = 25, "not_carried";
    }
}

#[cfg(test)]
mod tests {
    use super::Reason;
    use crate::labels;

    #[test]
    fn numbers_and_labels_are_frozen_and_explained() {
        let all: Vec<_> = Reason::ALL.iter().map(|reason| (reason.number(), reason.as_str())).collect();
        labels::check(&all, 1, "Why not?");
    }
}
