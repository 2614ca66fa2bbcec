//! The model itself; see the head of the module above.

use std::collections::VecDeque;

use bytemuck::Zeroable as _;

use super::Cast;
use super::old;
use crate::flow::{Flow, state};
use crate::packet::copy;
use crate::packet::headers::{Tcp, tcp_flags};
use crate::packet::rewrite::Timestamps;
use crate::packet::seq::{after, before, later};
use crate::shared::Share as _;

/// Which code translates timestamps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rule {
    New,
    Old,
    /// The new one, but `value + shift` may lie below the floor.
    WithoutFloor,
    /// The new one, but the own socket's packets keep their own timestamps.
    OwnByTheClock,
    /// The new one, but each CPU that finds no shift stores its own.
    EachCpuByItself,
    /// The new one, but the first packet chooses the shift.
    ShiftEarly,
    /// The new one, but a packet that finds the shift unknown is noted only when it leaves.
    NotNoted,
    /// The new one, but time may pass between the look at the clock and the floor's being set.
    FloorLate,
}

/// A segment that A must take, and does not.
#[derive(Debug, Clone, Copy)]
pub(super) enum Refused {
    Forwarded(#[expect(dead_code, reason = "shown when a test fails")] Segment),
    OwnBytes(#[expect(dead_code, reason = "shown when a test fails")] Segment),
    OwnAck(#[expect(dead_code, reason = "shown when a test fails")] Segment),
}

/// As A counts.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Segment {
    seq: u32,
    len: u32,
    /// TSval: B's, until it is translated.
    value: u32,
    believed: bool,
}

impl Segment {
    fn end(&self) -> u32 {
        self.seq.wrapping_add(self.len)
    }
}

/// A packet of B on a CPU.
#[derive(Debug, Clone, Copy, Default)]
struct Job {
    segment: Segment,
    step: u8,
    record_state: u32,
    to: Option<Timestamps>,
    is_due: bool,
    stamp: old::Stamp,
    leaves: u32,
}

/// A packet of the own socket. First with the socket's timestamp, then (`sent_at`) as it will
/// leave.
#[derive(Debug, Clone, Copy)]
struct Own {
    segment: Segment,
    /// How many packets had been forwarded when it was translated.
    forwarded: Option<u32>,
    /// B's latest timestamp then, if it is an acknowledgement in its name.
    native: Option<u32>,
    /// The hand-over was over then.
    late: bool,
}

/// Bytes of the own socket: three segments.
const OWN: u32 = 30;
const PIECE: u32 = 10;
const STEPS: usize = 160;

pub(super) struct World {
    rule: Rule,
    cast: Cast,
    scheduler: Scheduler,
    /// What the own socket's timestamps count, and how far B's clock is away.
    now: u32,
    away: u32,
    first_seq: u32,
    record_state: u32,
    flow: Flow,
    back: Flow,
    old: old::Record,
    sent: u32,
    sent_packets: usize,
    cpus: [VecDeque<Job>; 2],
    own: Option<Own>,
    own_packets: usize,
    /// The clock that userspace has looked at, and whether it has set the floor to that.
    looked: Option<(u32, bool)>,
    made_up: Option<(Segment, u32)>,
    forwarded: u32,
    /// Something was forwarded that is not believed; nobody here knows its timestamp.
    stranger: bool,
    a: Receiver,
}

/// A, and what it would be without a proxy.
#[derive(Debug, Default)]
struct Receiver {
    received: Vec<(u32, u32)>,
    rcv_nxt: u32,
    rcv_wup: u32,
    recent: Option<u32>,
    /// `recent` in B's timestamps: without what the own socket says, and with that.
    native: [Option<u32>; 2],
}

/// More than one tick older.
fn too_old(value: u32, recent: Option<u32>) -> bool {
    recent.is_some_and(|recent| after(recent, value.wrapping_add(1)))
}

impl Receiver {
    /// Whether it takes the segment. `native` is B's timestamp, where it is to count as one of B's.
    fn take(&mut self, segment: &Segment, native: [Option<u32>; 2]) -> bool {
        if too_old(segment.value, self.recent) {
            return false;
        }
        if before(segment.end(), self.rcv_wup) {
            return true;
        }
        if !after(segment.seq, self.rcv_wup) {
            self.recent = Some(segment.value);
            self.native = [0, 1].map(|with| native[with].or(self.native[with]));
        }
        self.received.push((segment.seq, segment.end()));
        while let Some((_, end)) =
            self.received.iter().find(|(seq, end)| !after(*seq, self.rcv_nxt) && after(*end, self.rcv_nxt))
        {
            self.rcv_nxt = *end;
        }
        true
    }

    fn is_acceptable(&self, segment: &Segment) -> bool {
        !before(segment.end(), self.rcv_wup)
    }
}

impl World {
    pub(super) fn new(rule: Rule, cast: Cast, mut scheduler: Scheduler) -> Self {
        // All numbers wrap now and then.
        let mut base = || [0, 1000, 1 << 31, u32::MAX - 20][scheduler.below(4)];
        let (now, away, first_seq) = (base(), base(), base());
        let mut world = Self {
            rule,
            cast,
            scheduler,
            now,
            away,
            first_seq,
            record_state: state::OFF,
            flow: Flow::zeroed(),
            back: Flow::zeroed(),
            old: old::Record::default(),
            sent: first_seq.wrapping_add(OWN),
            sent_packets: 0,
            cpus: [VecDeque::new(), VecDeque::new()],
            own: None,
            own_packets: 0,
            looked: None,
            made_up: None,
            forwarded: 0,
            stranger: false,
            a: Receiver { rcv_nxt: first_seq, rcv_wup: first_seq, ..Receiver::default() },
        };
        if !cast.own {
            // It has sent everything long ago.
            (world.a.rcv_nxt, world.a.rcv_wup) = (world.sent, world.sent);
        }
        world.flow.live.seq_end = world.sent;
        world.flow.fixed.received = world.sent;
        world.back.live.ack_end = world.a.rcv_nxt;
        world.back.live.own_end = world.sent;
        world.back.live.window = u16::MAX;
        world
    }

    /// Returns the first segment that is refused and must not be.
    pub(super) fn run(mut self) -> Option<Refused> {
        for _ in 0..STEPS {
            let refused = match self.scheduler.below(9) {
                0 => self.time_passes(),
                1 => self.b_sends(),
                2 | 3 => self.cpu(0),
                4 => self.cpu(1),
                5 => self.own_socket(),
                6 => self.userspace(),
                7 => self.make_up(),
                _ => self.a_acknowledges(),
            };
            if refused.is_some() {
                return refused;
            }
        }
        None
    }

    fn time_passes(&mut self) -> Option<Refused> {
        self.now = self.now.wrapping_add(self.scheduler.below(12) as u32);
        None
    }

    fn b_sends(&mut self) -> Option<Refused> {
        if self.sent_packets == 12 {
            return None;
        }
        self.sent_packets += 1;
        let len = [0, PIECE][self.scheduler.below(2)];
        let believed = !self.cast.unbelieved || self.scheduler.below(3) != 0;
        let segment = Segment { seq: self.sent, len, value: self.now.wrapping_add(self.away), believed };
        self.sent = segment.end();
        let cpu = self.scheduler.below(self.cast.cpus);
        self.cpus[cpu].push_back(Job { segment, ..Job::default() });
        None
    }

    /// A step of the first packet that waits on the CPU.
    fn cpu(&mut self, cpu: usize) -> Option<Refused> {
        let mut job = *self.cpus[cpu].front()?;
        let value = job.segment.value;
        match job.step {
            0 if self.record_state == state::OFF => return None,
            0 => {
                job.record_state = self.record_state;
                if job.segment.believed {
                    self.flow.live.seq_end = later(self.flow.live.seq_end, job.segment.end());
                }
            }
            1 => {
                job.to = Some(self.timestamps());
                job.stamp = self.old.stamp(self.now);
            }
            2..=4 => self.settle(&mut job),
            5 => {
                job.leaves = match (self.rule, job.to) {
                    (Rule::Old, _) => job.stamp.value(value),
                    (_, Some(to)) => to.value(value),
                    (_, None) => unreachable!("the second step"),
                };
                if job.segment.believed {
                    self.old.note(job.stamp, job.record_state, value);
                    Timestamps::note(self.flow.shared(), value);
                }
            }
            _ => {
                self.cpus[cpu].pop_front();
                self.forwarded += 1;
                self.stranger |= !job.segment.believed;
                return self.arrives(job);
            }
        }
        job.step += 1;
        self.cpus[cpu][0] = job;
        None
    }

    fn timestamps(&self) -> Timestamps {
        let mut flow = self.flow;
        if self.rule == Rule::WithoutFloor && flow.fixed.ts_shift != 0 {
            // As far away as can be.
            flow.fixed.ts_floor = flow.fixed.ts_floor.wrapping_add(1 << 31);
        }
        Timestamps::of(flow.shared(), &self.back.to_shared())
    }

    /// [`Timestamps::settle`], step by step.
    fn settle(&mut self, job: &mut Job) {
        let Some(to) = job.to.as_mut().filter(|_| job.segment.believed) else { return };
        match job.step {
            2 if self.rule == Rule::NotNoted => {}
            2 if !to.is_known() => Timestamps::note(self.flow.shared(), job.segment.value),
            3 => {
                job.is_due = self.record_state != state::HAND_OVER || self.rule == Rule::ShiftEarly;
            }
            4 if !to.is_known() && job.is_due => {
                if self.rule == Rule::EachCpuByItself {
                    self.flow.fixed.ts_shift = 0;
                }
                to.choose(self.flow.shared());
            }
            _ => {}
        }
    }

    fn arrives(&mut self, job: Job) -> Option<Refused> {
        let native = job.segment.value;
        let segment = Segment { value: job.leaves, ..job.segment };
        // What is not believed before anything is known of the direction is promised nothing: it
        // may be anybody's.
        let is_promised = job.segment.believed || job.to.is_some_and(|to| to.is_known());
        let before = self.a.native[usize::from(segment.len == 0)];
        let must = is_promised && self.a.is_acceptable(&segment) && !too_old(native, before);
        let taken = self.a.take(&segment, [Some(native); 2]);
        (must && !taken).then_some(Refused::Forwarded(segment))
    }

    /// The own socket makes a packet, the egress program translates it, or it leaves.
    fn own_socket(&mut self) -> Option<Refused> {
        let Some(mut own) = self.own.take() else {
            // Rarely once the stream is spliced: what was made, or delayed, a little before.
            if self.cast.own && self.own_packets < 8 {
                self.own_packets += 1;
                let piece = self.scheduler.below(4) as u32;
                let seq = self.first_seq.wrapping_add(piece * PIECE);
                let len = if piece == 3 { 0 } else { PIECE };
                let segment = Segment { seq, len, value: self.now, believed: true };
                self.own = Some(Own { segment, forwarded: None, native: None, late: false });
            }
            return None;
        };
        let Some(forwarded) = own.forwarded else {
            self.egress(&mut own.segment);
            own.forwarded = Some(self.forwarded);
            let says = own.segment.len == 0 && self.flow.fixed.ts_shift != 0;
            own.native = says.then_some(self.flow.live.ts_value);
            own.late = self.record_state == state::SPLICED;
            self.own = Some(own);
            return None;
        };
        let segment = own.segment;
        let lacks = after(segment.end(), self.a.rcv_nxt) && segment.len > 0;
        let is_overtaken = self.forwarded != forwarded;
        let acceptable = self.a.is_acceptable(&segment);
        if self.a.take(&segment, [None, own.native]) || !acceptable {
            return None;
        }
        match segment.len {
            0 => (!is_overtaken && !self.stranger).then_some(Refused::OwnAck(segment)),
            _ => {
                (lacks || !own.late && !is_overtaken && !self.stranger).then_some(Refused::OwnBytes(segment))
            }
        }
    }

    fn egress(&mut self, segment: &mut Segment) {
        let is_active = self.record_state != state::OFF;
        match self.rule {
            Rule::Old if is_active => segment.value = self.now,
            Rule::Old | Rule::OwnByTheClock => {}
            _ if is_active => {
                let header =
                    Tcp { seq: segment.seq.to_be(), flags: tcp_flags::ACK, offset: 0x50, ..Tcp::zeroed() };
                let fresh = copy::freshen(&header, segment.len, self.flow.shared(), self.back.shared());
                (segment.seq, segment.value) = (u32::from_be(fresh.seq), u32::from_be(fresh.ts_value));
            }
            _ if self.flow.fixed.ts_floor != 0 => {
                Timestamps::raise_floor(self.flow.shared(), segment.value);
            }
            _ => {}
        }
    }

    fn userspace(&mut self) -> Option<Refused> {
        match (self.record_state, self.looked) {
            (state::OFF, None) => self.looked = Some((self.now, false)),
            (state::OFF, Some((looked, false))) => {
                self.flow.fixed.ts_floor = looked.max(1);
                self.looked = Some((looked, true));
            }
            // Once more: a packet may have left meanwhile that did not know of the floor.
            (state::OFF, Some((looked, true))) if self.now != looked && self.rule != Rule::FloorLate => {
                self.looked = None;
            }
            (state::OFF, _) => self.record_state = state::HAND_OVER,
            (state::HAND_OVER, _)
                if !before(self.back.live.ack_end, self.back.live.own_end) || !self.cast.own =>
            {
                self.record_state = state::SPLICED;
            }
            _ => {}
        }
        None
    }

    /// Userspace makes up an acknowledgement, or it leaves.
    fn make_up(&mut self) -> Option<Refused> {
        if !self.cast.made_up || self.record_state == state::OFF {
            return None;
        }
        // What the proxy itself sends keeps its order.
        let own_leaves = self.own.is_some_and(|own| own.forwarded.is_some());
        if self.made_up.is_some() && own_leaves {
            return None;
        }
        if let Some((segment, native)) = self.made_up.take() {
            let is_known = self.flow.fixed.ts_shift != 0;
            self.a.take(&segment, [is_known.then_some(native); 2]);
            return None;
        }
        let value = match self.rule {
            Rule::Old => self.old.made_up(self.now),
            _ => Timestamps::newest(self.flow.shared()),
        };
        let segment = Segment { seq: self.back.live.ack_end, len: 0, value, believed: true };
        self.made_up = Some((segment, self.flow.live.ts_value));
        None
    }

    fn a_acknowledges(&mut self) -> Option<Refused> {
        self.a.rcv_wup = self.a.rcv_nxt;
        self.back.live.ack_end = self.a.rcv_nxt;
        None
    }
}

/// Decides what happens: xorshift.
pub(super) struct Scheduler(u64);

impl Scheduler {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) as usize % limit
    }
}
