//! What the packet splice's programs count, in the per-CPU map `STEER_STATS`: what became of a
//! packet, and why.

use crate::labels::labelled;

labelled! {
    /// Numbers and labels are stable: the map and `steer_packet_total{what="..."}` carry them.
    /// docs/splice.md has them too.
    pub enum Stat {
        /// Rewritten and sent on to the other peer.
        Spliced = 0, "spliced";
        /// A packet of a known flow whose record is not active, or was given up: passed to the
        /// local stack.
        PassOff = 1, "pass_off";
        /// A packet of a flow whose tuple a new connection has taken: passed to the local stack.
        PassDead = 2, "pass_dead";
        /// A known flow, but a shape that is not rewritten (cut header, VLAN tag, for another
        /// host): passed.
        PassShape = 3, "pass_shape";
        /// A SYN took the tuple of a flow that was over.
        Reused = 4, "reused";
        /// Rewritten, but not believed: its sequence or acknowledgement number cannot be the
        /// peer's.
        Implausible = 5, "implausible";
        /// A RST that was passed on without changing the flow's state, since its number is not
        /// exact.
        RstUnproven = 6, "rst_unproven";
        /// An unusual layout of TCP options was translated on the slow path.
        OptionsSlow = 7, "options_slow";
        /// TCP options that could not be translated were replaced by NOPs.
        OptionsBlanked = 8, "options_blanked";
        /// ECN marks were cleared.
        EcnStripped = 9, "ecn_stripped";
        /// Dropped: the packet could not be rewritten (no memory, helper refused).
        DropRewrite = 10, "drop_rewrite";
        /// An acknowledgement was copied for the local stack (hand-over).
        Copied = 11, "copied";
        /// Copying an acknowledgement failed; the stack waits for the next one.
        CopyFailed = 12, "copy_failed";
        /// A copy was trimmed and given to the local stack.
        CopyPassed = 13, "copy_passed";
        /// Dropped: a copy that came after its socket was gone.
        DropLateCopy = 14, "drop_late_copy";
        /// A packet of the proxy's own sockets was brought up to date (hand-over).
        Freshened = 15, "freshened";
        /// Dropped: a RST of the local stack for a living flow.
        DropStackRst = 16, "drop_stack_rst";
        /// An ICMP error for a flow was translated to the peer that caused it.
        IcmpTranslated = 17, "icmp_translated";
        /// An ICMP error for a flow that could not be translated: passed to the local stack.
        IcmpPassed = 18, "icmp_passed";
        /// The event ring was full.
        EventLost = 19, "event_lost";
        /// A RST of the proxy's own sockets, closed in a hand-over because the process ended: the
        /// stream ends with it.
        OwnerDied = 20, "owner_died";
        /// Not a packet but a stream that the kernel gave up, since no process looked after it: its
        /// peers were silent for `orphan_timeout`, or it was in a hand-over.
        Aged = 21, "aged";
        /// An odd packet (IP options, extension headers, a priority tag) was made plain, and then
        /// spliced.
        MadePlain = 22, "made_plain";
        /// A fragment, first or later, was sent on to the other peer.
        Fragment = 23, "fragment";
        /// A later fragment that came before the first of its packet: passed, since its flow is not
        /// known.
        FragmentEarly = 24, "fragment_early";
        /// A RST or FIN with a wrong checksum: sent on as it is, but it changes nothing.
        BadChecksum = 25, "bad_checksum";
        /// Not a packet but a stream that was given up: a packet of it came to the local stack,
        /// which cannot carry it.
        GivenUp = 26, "given_up";
        /// A SYN of the proxy left without timestamps, since the client has none.
        SynPlain = 27, "syn_plain";
        /// A SYN of a client lost its timestamps, since the endpoints have none.
        SynPlainIn = 28, "syn_plain_in";
    }
}

#[cfg(test)]
mod tests {
    use super::Stat;
    use crate::labels;

    #[test]
    fn numbers_and_labels_are_frozen_and_explained() {
        let all: Vec<_> = Stat::ALL.iter().map(|stat| (stat.number(), stat.as_str())).collect();
        labels::check(&all, 0, "What became of the packets");
    }
}
