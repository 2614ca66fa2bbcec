//! What the connection to an endpoint has to have in common with the client's connection, and can
//! get only in its handshake: whether there are TCP timestamps.
//!
//! A client without timestamps (the default of Windows) sends none in any packet, and its endpoint
//! expects some in every packet if they were agreed on. The programs do not make packets longer, so
//! the endpoint must not agree. A socket of Linux cannot be told to offer none: the setting is that
//! of the whole network namespace. So the egress program takes the offer out of the SYN
//! (`proxy_common::packet::syn`). It knows the SYN by its mark. To the socket, the endpoint is one
//! without timestamps.
//!
//! - The kernel writes a repeated SYN anew, with the same mark, so it is changed as well.
//! - An endpoint that answers with a SYN cookie keeps window scale and SACK in a timestamp. Without
//!   timestamps its SYN-ACK offers neither, and the socket agrees. The stream can be spliced.
//! - Steer does not use TCP Fast Open: a SYN has no data.
//! - The program sees the SYN wherever it is attached: as a tcx link, as a filter of clsact (before
//!   Linux 6.6), and on loopback.
//! - If an endpoint sends timestamps all the same, or the program is not there, the connection has
//!   timestamps, and `decide` refuses the stream as it does without all this.

use std::net::IpAddr;

use super::PacketSplice;

impl PacketSplice {
    /// The `SO_MARK` with which a socket connects from `source` to `endpoint` without TCP
    /// timestamps. Attaches the programs to the interface by which the SYN leaves. `None`: that is
    /// not possible, or not wanted.
    pub fn mark_without_timestamps(&self, source: IpAddr, endpoint: IpAddr) -> Option<u32> {
        if !self.agrees_at_handshake {
            return None;
        }
        let _kept = self.records.gate.keep().ok()?;
        let ifindex = self.survey.interface_towards(source, endpoint)?;
        let kernel = &self.records.kernel;
        kernel
            .attach(ifindex)
            .inspect_err(|error| {
                let error: &dyn std::error::Error = error;
                tracing::debug!(ifindex, error, "cannot attach the programs before a handshake");
            })
            .ok()?;
        Some(kernel.syn_mark())
    }
}
