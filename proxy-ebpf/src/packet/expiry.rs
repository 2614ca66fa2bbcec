//! Gives up streams that nobody looks after. A kernel timer (Linux 5.15) drives this, so neither a
//! process nor a packet is needed. The rules are those of [`Expiry`].

use core::ffi::c_void;

use aya_ebpf::helpers::{
    bpf_ktime_get_coarse_ns, bpf_loop, bpf_timer_init, bpf_timer_set_callback, bpf_timer_start,
};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use proxy_common::expiry::{Expiry, GIVEN_UP_A_TICK, RECORDS_A_TICK, TICK_NS};
use proxy_common::flow::{Direction, FlowRef, SharedRecord, state};
use proxy_common::packet::headers::{Ipv4, Ipv6};
use proxy_common::stat::Stat;

use crate::has_loop;
use crate::maps::{STEER_AGEING, STEER_TIMER, Timer};
use crate::packet::flows::{Flows, RecordHandle};
use crate::packet::stats::count;

const CLOCK_MONOTONIC: u64 = 1;

/// Examines some records once and starts the timer, which from then on belongs to this program. The
/// program is not attached to anything: userspace runs it once at its start. Returns 0 or the
/// negative number of an error.
#[classifier]
fn packet_expire(_ctx: TcContext) -> i32 {
    const ENOSYS: i32 = 38;
    if !has_loop() {
        return -ENOSYS;
    }
    let Some(timer) = STEER_TIMER.get_ptr_mut(0) else { return 0 };
    let map = (&raw const STEER_TIMER).cast_mut().cast();
    // SAFETY: `timer` is in a value of `map`. The helper fails if an earlier process has
    // initialised the timer, which is fine.
    let _ = unsafe { bpf_timer_init(timer.cast(), map, CLOCK_MONOTONIC) };
    // SAFETY: `timer` was initialised, or the helper fails; `tick` takes what the kernel gives to
    // callbacks.
    let set = unsafe { bpf_timer_set_callback(timer.cast(), tick as *mut c_void) };
    if set != 0 {
        return set as i32;
    }
    look(timer);
    start(timer) as i32
}

/// What the timer calls; its result must be 0.
unsafe extern "C" fn tick(_map: *mut c_void, _key: *mut u32, timer: *mut Timer) -> u64 {
    look(timer);
    // Starting fails when the map is about to go.
    let _ = start(timer);
    0
}

#[inline(always)]
fn start(timer: *mut Timer) -> i64 {
    // SAFETY: `timer` is a value of the map, and begins with the kernel's timer.
    unsafe { bpf_timer_start(timer.cast(), TICK_NS, 0) }
}

/// One examination of some records.
struct Look {
    /// The next record.
    next: u32,
    now_ns: u64,
    expiry: Expiry,
    /// How many streams were given up.
    given_up: u32,
}

/// Goes on where the last examination ended.
#[inline(always)]
fn look(timer: *mut Timer) {
    let Some(expiry) = STEER_AGEING.get(0).copied() else { return };
    // SAFETY: the helper has no conditions.
    let now_ns = unsafe { bpf_ktime_get_coarse_ns() };
    if !expiry.is_due(now_ns) {
        return;
    }
    // SAFETY: a live value of an array map, in which only one timer writes.
    let next = unsafe { &mut (*timer).next };
    let mut look = Look { next: *next, now_ns, expiry, given_up: 0 };
    // SAFETY: `examine` takes what it is given here, and is not called after this.
    unsafe { bpf_loop(RECORDS_A_TICK, examine as *mut c_void, (&raw mut look).cast(), 0) };
    *next = look.next;
}

/// What bpf_loop calls with the number of the round; returns 1 to end it.
unsafe extern "C" fn examine(_round: u64, look: *mut Look) -> u64 {
    // SAFETY: `look` hands its own variable over, and does not touch it meanwhile.
    let look = unsafe { &mut *look };
    // The direction does not matter.
    let Some(record) = RecordHandle::of(FlowRef::new(look.next, Direction::ToUpstream)) else {
        look.next = 0;
        return 1;
    };
    let record_state = record.state();
    let last_packet_ns = last_packet_ns(record.shared());
    if look.expiry.has_come_for(record_state, last_packet_ns, look.now_ns) {
        if look.given_up == GIVEN_UP_A_TICK {
            return 1;
        }
        look.given_up += u32::from(give_up(&record, record_state));
    }
    look.next += 1;
    0
}

#[inline(always)]
fn last_packet_ns(record: &SharedRecord) -> u64 {
    let [up, down] = [&record.flows[0].live, &record.flows[1].live].map(|live| live.last_packet_ns.get());
    if up > down { up } else { down }
}

/// Removes the keys, so that the local stack answers later packets of the peers with a RST. The
/// record is freed only at the next examination, since a packet that has found a key before may
/// still write to the record. Returns whether there were keys.
#[inline(always)]
fn give_up(record: &RecordHandle, record_state: u32) -> bool {
    if record_state != state::DEAD {
        record.advance(state::DEAD);
    }
    if matches!(record_state, state::HAND_OVER | state::SPLICED) {
        count(Stat::Aged);
    }
    let shared = record.shared();
    let mut had_keys = false;
    for direction in Direction::BOTH {
        let flow = FlowRef::new(record.flow.record(), direction);
        had_keys |= match shared.family_of(direction) {
            4 => forget_own::<Ipv4>(&Ipv4::key_of(shared, direction), flow),
            _ => forget_own::<Ipv6>(&Ipv6::key_of(shared, direction), flow),
        };
    }
    if !had_keys && record_state == state::DEAD {
        record.advance(state::OFF);
    }
    had_keys
}

/// Removes a key if the key belongs to this flow; returns whether it did.
#[inline(always)]
fn forget_own<I: Flows>(key: &I::Key, flow: FlowRef) -> bool {
    let is_own = I::find(key) == Some(flow);
    if is_own {
        I::forget(key);
    }
    is_own
}
