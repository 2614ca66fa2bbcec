//! What the two connections of a stream have to have in common, and can get only in their
//! handshakes: whether there are TCP timestamps.
//!
//! A peer without timestamps (Windows by default; Linux with `net.ipv4.tcp_timestamps=0`) sends
//! none in any packet, and the other peer expects some in every packet if they were agreed on. The
//! programs do not make packets longer, so the other peer must not agree. A socket of Linux cannot
//! be told to do without: the setting is that of the whole network namespace. So the programs take
//! the offer out of a SYN:
//!
//! - **The client has none.** The egress program changes the SYN to the endpoint, which it knows by
//!   its mark (`proxy_common::packet::syn`). To the socket, the endpoint is one without timestamps.
//! - **The endpoint has none.** When that is found, the client's connection exists already, so its
//!   stream is relayed. But the program on ingress changes the SYNs of all clients that connect to
//!   the same local address and port from then on (`proxy_common::packet::offer`). To the client,
//!   Steer is a server without timestamps. If Steer has endpoints with timestamps as well, their
//!   connections are made without, as above.
//!
//! The second change ends by itself an hour ([`TAKEN`]) after the last stream that needed it. Steer
//! can tell such a stream, since it offers timestamps to endpoints that are known to have none. An
//! endpoint that accepts the offer has timestamps again: its one stream is relayed, and it is not
//! known any more. The next process finds what it needs in the same way. The map that the programs
//! read is pinned, so until then the SYNs are changed on, for an hour at most.
//!
//! - A repeated SYN has the same mark, or the same destination, so it is changed as well.
//! - A SYN cookie keeps window scale and SACK in a timestamp. Without one, the endpoint (or Steer's
//!   listener, for a client) offers neither. The stream can be spliced, with windows of at most
//!   64 KiB.
//! - Without timestamps there is no PAWS (RFC 7323): a segment that is delayed in the network while
//!   its stream moves 4 GiB counts as new. A client of this host cannot use a port again while its
//!   old connection is in TIME_WAIT (`tcp_tw_reuse`).
//! - Steer does not use TCP Fast Open towards endpoints. The SYN of a client may have a cookie of
//!   it, and data, both of which stay.
//! - The programs see the SYN wherever they are attached: as tcx links, as filters of clsact
//!   (before Linux 6.6), and on loopback. They need no bpf_loop for it.
//! - An odd SYN (IP options, extension headers, fragments) stays as it is, and so does a SYN that
//!   takes the tuple of a stream that is over.
//! - If a peer sends timestamps all the same, or the program is not there, the connection has
//!   timestamps, and `decide` refuses the stream as it does without all this.

use std::net::IpAddr;
use std::time::Duration;

use super::PacketSplice;
use super::decide::{Host, Leg, would_without_timestamps};

/// For how long clients get no timestamps after a stream has shown that its endpoint has none.
const TAKEN: Duration = Duration::from_secs(60 * 60);

impl PacketSplice {
    /// The `SO_MARK` with which a socket connects from `source` to `endpoint` without TCP
    /// timestamps. Attaches the programs to the interface by which the SYN leaves. `None`: that is
    /// not possible, not wanted, or not needed, since the endpoint has none.
    pub fn mark_without_timestamps(&self, source: IpAddr, endpoint: IpAddr) -> Option<u32> {
        if !self.agrees_at_handshake || self.plain_endpoints.has(endpoint) {
            return None;
        }
        let _kept = self.records.gate.keep().ok()?;
        let ifindex = self.survey.interface_towards(source, endpoint)?;
        self.attach_before_handshake(ifindex)?;
        Some(self.records.kernel.syn_mark())
    }

    /// Learns from a stream whether its endpoint has TCP timestamps, for the clients to come. To be
    /// called while the gate is [kept](super::gate::Gate::keep).
    pub(super) fn learn(&self, host: &Host, downstream: &Leg, upstream: &Leg) {
        if !self.agrees_at_handshake {
            return;
        }
        let endpoint = upstream.peer.ip();
        let needs_none = match (downstream.options.timestamps, upstream.options.timestamps) {
            (_, true) => {
                self.plain_endpoints.forget(endpoint);
                false
            }
            (true, false) => {
                would_without_timestamps(host, downstream, upstream) && self.plain_endpoints.note(endpoint)
            }
            (false, false) => self.plain_endpoints.has(endpoint),
        };
        if needs_none {
            self.take_timestamps(downstream);
        }
    }

    /// Lets the clients that connect where this one did have no timestamps.
    fn take_timestamps(&self, downstream: &Leg) -> Option<()> {
        self.attach_before_handshake(downstream.next_hop.ok()?.ifindex)?;
        let taken = self.records.kernel.take_timestamps(downstream.local, TAKEN);
        taken.inspect_err(|error| tracing::debug!(%error, "clients keep their timestamps")).ok()
    }

    fn attach_before_handshake(&self, ifindex: u32) -> Option<()> {
        let attached = self.records.kernel.attach(ifindex);
        attached
            .inspect_err(|error| {
                let error: &dyn std::error::Error = error;
                tracing::debug!(ifindex, error, "cannot attach the programs before a handshake");
            })
            .ok()
    }
}
