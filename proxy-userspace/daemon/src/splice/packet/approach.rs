//! A session on its way to the kernel, up to the switch. Until the switch, the session can be given
//! back whole.

use std::cell::Cell;
use std::time::Duration;

use bytemuck::Zeroable as _;
use bytes::Bytes;
use proxy_common::flow::{DirLive, Record, bits, flags};
use proxy_common::reason::Reason;
use socket2::SockRef;
use steer_kernel::bpf::packet::cluster;
use steer_kernel::failpoint;
use steer_kernel::tcp::clock;
use steer_kernel::tcp::repair;
use steer_kernel::tcp::tcp_info::{self, TIMESTAMP_BYTES, TcpInfo};
use tokio::time::{Instant, sleep};

use super::PacketSplice;
use super::decide::{Plan, decide};
use super::hand_over::{HandOver, Switched, Tracked};
use super::lanes::Fin;
use super::owned_record::OwnedRecord;
use super::relayed::Relayed;
use crate::splice::Refused;
use crate::splice::side::Side;

/// The window, in bytes, that both sockets offer before the switch. If a window is larger than the
/// other peer's, segments may be under way at the switch that have to be repeated.
const WINDOW: u32 = 32 * 1024;

/// How long to wait for a quiet moment. Between two messages there is one, in bulk there is none.
const PAUSE_WITHIN: Duration = Duration::from_millis(10);
/// How long a bulk stream may be held back, so that little is under way at the switch.
const REST_WITHIN: Duration = Duration::from_millis(250);
const REST_LOOK: Duration = Duration::from_millis(1);
/// Little is under way when both peers have sent nothing for this long and for a round trip.
const SILENCE: Duration = Duration::from_millis(4);

pub(super) struct Approach<'a> {
    splice: &'a PacketSplice,
    plan: Plan,
    /// The connections that the kernel tracks.
    tracked: Tracked,
    stream: Relayed,
}

impl<'a> Approach<'a> {
    /// Decides whether the stream is spliced, and notes the sequence numbers that both connections
    /// have reached.
    pub(super) fn begin(splice: &'a PacketSplice, mut stream: Relayed) -> Result<Self, Box<Refused>> {
        let prepared = splice.records.gate.keep().and_then(|_kept| {
            let (plan, tracked) = plan(splice, &stream)?;
            Ok((plan, tracked, positions(&stream)?))
        });
        let (plan, tracked, positions) = match prepared {
            Ok(prepared) => prepared,
            Err(reason) => return Err(Box::new(Refused { session: stream.into(), reason })),
        };
        for socket in &stream.lanes.sockets {
            // With a larger window, the peers may have to repeat more after the hand-over.
            repair::clamp_window(socket, WINDOW).ok();
        }
        failpoint::reached("begun");
        stream.lanes.read_end = positions.map(|position| position.read_end);
        stream.lanes.write_end = positions.map(|position| position.write_end);
        Ok(Self { splice, plan, tracked, stream })
    }

    fn refuse(self, reason: Reason) -> Box<Refused> {
        for socket in &self.stream.lanes.sockets {
            let room = SockRef::from(socket).recv_buffer_size().unwrap_or(usize::MAX);
            // If the kernel refuses, the small window stays until the kernel finds that the relay
            // reads fast enough.
            repair::clamp_window(socket, u32::try_from(room).unwrap_or(u32::MAX)).ok();
        }
        Box::new(Refused { session: self.stream.into(), reason })
    }

    /// Relays for `time`, or until a peer finishes. `None`: a connection broke, and the stream is
    /// over.
    pub(super) async fn relay_for(mut self, time: Duration) -> Option<Self> {
        self.stream = self.stream.relay(time, |_| false).await?;
        Some(self)
    }

    /// Waits for a good moment for the switch: between two messages or, in bulk, when the peers
    /// have stopped because the relay does not read. Bytes that are under way at the switch go to
    /// the other peer. If its window does not let them in, they have to be repeated after a
    /// timeout. `None`: a connection broke, and the stream is over.
    pub(super) async fn rest(mut self) -> Option<Self> {
        self.stream = self.stream.relay(PAUSE_WITHIN, is_quiet).await?;
        if is_quiet(&self.stream) {
            return Some(self);
        }
        let begin = Instant::now();
        let silence = self.round_trip().max(SILENCE);
        let (mut received, mut since) = (self.received(), begin);
        while begin.elapsed() < REST_WITHIN {
            if let Err(error) = self.stream.lanes.flush(self.stream.guard.stream(), &()) {
                self.stream.break_off(&error);
                return None;
            }
            let now = self.received();
            if now != received {
                (received, since) = (now, Instant::now());
            }
            if since.elapsed() >= silence && self.owes_nothing() {
                break;
            }
            sleep(REST_LOOK).await;
        }
        Some(self)
    }

    /// One past the last byte that each socket has received.
    fn received(&self) -> [Option<u32>; 2] {
        Side::BOTH.map(|side| repair::rcv_nxt(&self.stream.lanes.sockets[side]).ok())
    }

    /// Whether all bytes that were read are written, sent and acknowledged.
    fn owes_nothing(&self) -> bool {
        let empty = |socket| tcp_info::unacknowledged(socket).is_ok_and(|bytes| bytes == 0);
        let lanes = &self.stream.lanes;
        lanes.held.iter().all(Bytes::is_empty) && lanes.sockets.iter().all(empty)
    }

    /// The longer one of the round-trip times of the two connections.
    fn round_trip(&self) -> Duration {
        let of = |socket| TcpInfo::of(socket).map_or(Duration::ZERO, |info| info.min_rtt());
        self.stream.lanes.sockets.iter().map(of).max().unwrap_or_default()
    }

    /// Makes the kernel forward all packets that arrive from now on.
    pub(super) fn switch(self) -> Result<HandOver<'a>, Box<Refused>> {
        failpoint::reached("rested");
        let quiet = is_quiet(&self.stream);
        let splice = self.splice;
        let _kept = match splice.records.gate.keep() {
            Ok(kept) => kept,
            Err(reason) => return Err(self.refuse(reason)),
        };
        let installed = self.content(quiet).and_then(|content| {
            let record = OwnedRecord::install(&self.splice.records, content)?;
            failpoint::reached("installed");
            self.check_alive()?;
            self.mark(self.splice.records.kernel.mark()).inspect_err(|_| {
                // One socket may have its mark already. With a mark that stays, the stream can
                // still be relayed.
                self.mark(0).ok();
            })?;
            Ok(record)
        });
        let record = match installed {
            Ok(record) => record,
            Err(reason) => return Err(self.refuse(reason)),
        };
        for socket in &self.stream.lanes.sockets {
            // The answers to the socket's keepalive probes would go to the other peer. If the
            // kernel refuses, some probes are needless.
            SockRef::from(socket).set_keepalive(false).ok();
        }
        failpoint::reached("marked");
        if self.plan.flags & flags::TIMESTAMPS != 0 {
            record.set_ts_floors(self.plan.ts_offsets);
        }
        if let Err(reason) = record.activate() {
            drop(record);
            return Err(self.refuse(reason));
        }
        failpoint::reached("activated");
        let watcher = Switched { record, copies_acks: Cell::new(!quiet) };
        let Self { splice, tracked, stream: Relayed { lanes, source, guard, idle_timeout, .. }, .. } = self;
        Ok(HandOver { splice, lanes, watcher, source, guard, idle_timeout, tracked, carried: None })
    }

    /// Checks that both connections still exist. To be called after the keys are in the map.
    /// Before, a client may have reset its connection and opened another one with the same port:
    /// the record must not forward the packets of the new connection. (If the client does so later,
    /// the egress program sees the answer of the local stack.)
    fn check_alive(&self) -> Result<(), Reason> {
        let is_alive = |socket| TcpInfo::of(socket).is_ok_and(|info| !info.is_closed());
        if self.stream.lanes.sockets.iter().all(is_alive) { Ok(()) } else { Err(Reason::NotEstablished) }
    }

    /// The content of the record, taken at one moment: nothing is read or written meanwhile.
    fn content(&self, quiet: bool) -> Result<Record, Reason> {
        let (lanes, flow) = (&self.stream.lanes, self.stream.guard.stream());
        let has_fin = |side: Side| lanes.fin[side] == Fin::Read;
        // Exactly the bytes that are read from one side are written to the other side, now or
        // later.
        let seq_delta = |from: Side, to: Side| {
            let read = lanes.read_end[from].wrapping_sub(has_fin(from).into());
            let written = lanes.write_end[to].wrapping_add(lanes.held[from].len() as u32);
            written.wrapping_sub(read)
        };
        let mut content = Record {
            flags: self.plan.flags | if quiet { 0 } else { flags::COPY_ACKS },
            idle_timeout_secs: self.stream.idle_timeout.map_or(0, whole_seconds),
            key_hash: flow.info.key_hash.unwrap_or(0),
            has_key: flow.info.key_hash.is_some().into(),
            cluster: cluster::name_hash(&flow.info.cluster),
            opened_unix_ms: flow.opened_unix_ms(),
            relayed: flow.bytes(),
            family: self.plan.family,
            ..Record::zeroed()
        };
        let now = clock::monotonic_ns();
        for from in Side::BOTH {
            let to = from.other();
            let (socket, flow) = (&lanes.sockets[from], &mut content.flows[from]);
            flow.fixed = self.plan.flows[from];
            flow.fixed.seq_delta = seq_delta(from, to);
            flow.fixed.ack_delta = seq_delta(to, from).wrapping_neg();
            let unacknowledged = tcp_info::unacknowledged(socket).map_err(|_| Reason::StateUnreadable)?;
            let info = TcpInfo::of(socket).map_err(|_| Reason::StateUnreadable)?;
            // Until now the local socket of the other peer has received that peer's data, so the
            // window of that socket counts, too.
            let offered = SockRef::from(&lanes.sockets[to]).recv_buffer_size().unwrap_or(0);
            let offered = u32::try_from(offered).unwrap_or(u32::MAX);
            let scaled = |window: u32| u16::try_from(window >> info.send_scale()).unwrap_or(u16::MAX);
            let received = repair::rcv_nxt(socket).map_err(|_| Reason::RepairRefused)?;
            flow.fixed.received = received;
            flow.live = DirLive {
                seq_end: received,
                // At most a window, so the number fits 32 bits.
                ack_end: lanes.write_end[from].wrapping_sub(unacknowledged as u32),
                own_end: lanes.write_end[from],
                fin_end: lanes.read_end[from],
                bits: if has_fin(from) { bits::FIN_SEEN } else { 0 },
                window: scaled(info.send_window()),
                // 0 would mean that the window is not known.
                window_max: scaled(info.send_window().max(offered)).max(1),
                last_payload_ns: now,
                last_packet_ns: now,
                ..DirLive::zeroed()
            };
        }
        Ok(content)
    }

    /// Marks both sockets: the egress program handles packets with this mark.
    fn mark(&self, mark: u32) -> Result<(), Reason> {
        let set = |socket| repair::set_mark(socket, mark).map_err(|_| Reason::RepairRefused);
        self.stream.lanes.sockets.iter().try_for_each(set)
    }
}

/// Whether no bytes wait to be read, written or sent. Bytes that were sent may still wait to be
/// acknowledged.
fn is_quiet(stream: &Relayed) -> bool {
    let lanes = &stream.lanes;
    let is_quiet = |side: Side| {
        let socket = &lanes.sockets[side];
        lanes.held[side].is_empty()
            && repair::rcv_nxt(socket).is_ok_and(|rcv_nxt| rcv_nxt == lanes.read_end[side])
            && TcpInfo::of(socket).is_ok_and(|info| info.unsent() == 0)
    };
    Side::BOTH.into_iter().all(is_quiet)
}

/// Decides, once for the stream, whether and how it is spliced. Attaches the programs to the
/// interfaces on which its packets arrive.
fn plan(splice: &PacketSplice, stream: &Relayed) -> Result<(Plan, Tracked), Reason> {
    if stream.has_fin() {
        return Err(Reason::NotEstablished);
    }
    let survey = &splice.survey;
    let source = stream.source.as_ref().ok_or(Reason::NoSourcePort)?;
    let [downstream, mut upstream] = survey.legs(&stream.lanes.sockets)?;
    let options = if upstream.options.timestamps { TIMESTAMP_BYTES } else { 0 };
    let mss = |mss| u16::try_from(mss).unwrap_or(u16::MAX);
    source.note_endpoint_mss(mss(upstream.send_mss + options), mss(upstream.announced_mss));
    // The socket itself reports at most the MSS that it has announced to the endpoint.
    let endpoint_mss = source.endpoint_mss().map_or(0, u32::from);
    upstream.send_mss = upstream.send_mss.max(endpoint_mss.saturating_sub(options));
    if [&downstream, &upstream].into_iter().any(|leg| splice.records.unfit.has(leg.peer.ip())) {
        return Err(Reason::NotCarried);
    }
    let host = survey.host();
    splice.learn(&host, &downstream, &upstream);
    let plan = decide(&host, &downstream, &upstream)?;
    splice.records.kernel.attach_all(&plan.arrive_on).map_err(|error| {
        tracing::debug!(
            interfaces = ?plan.arrive_on,
            error = &error as &dyn std::error::Error,
            "cannot attach the programs"
        );
        error.reason()
    })?;
    let tracked = [&downstream, &upstream].into_iter().filter(|leg| leg.tracked);
    Ok((plan, tracked.map(|leg| (leg.peer, leg.local)).collect()))
}

/// The sequence numbers that a connection has reached, on its own wire.
#[derive(Clone, Copy)]
struct Position {
    read_end: u32,
    write_end: u32,
}

/// The positions of both connections at one moment: nothing is read or written meanwhile.
fn positions(stream: &Relayed) -> Result<[Position; 2], Reason> {
    let of = |socket| {
        let write_end = repair::write_seq(socket).map_err(|_| Reason::RepairRefused)?;
        let read = repair::read_position(socket)?;
        Ok(Position { read_end: read.rcv_nxt.wrapping_sub(read.unread), write_end })
    };
    let [downstream, upstream] = &stream.lanes.sockets;
    Ok([of(downstream)?, of(upstream)?])
}

/// Rounds up to whole seconds.
fn whole_seconds(duration: Duration) -> u32 {
    let seconds = duration.as_secs() + u64::from(duration.subsec_nanos() > 0);
    u32::try_from(seconds).unwrap_or(u32::MAX)
}
