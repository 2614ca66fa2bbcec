//! How timestamps were translated before: stamped with the proxy's clock, until the first packet
//! after the hand-over fixed the difference, the largest one seen until then.

use crate::flow::state;
use crate::packet::seq::after;

/// Of a direction.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Record {
    delta: u32,
    known: bool,
    fixed: bool,
    value: u32,
}

/// Of a packet.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Stamp {
    fixed: bool,
    number: u32,
}

impl Record {
    pub(super) fn stamp(&self, clock: u32) -> Stamp {
        Stamp { fixed: self.fixed, number: if self.fixed { self.delta } else { clock } }
    }

    pub(super) fn note(&mut self, stamp: Stamp, record_state: u32, value: u32) {
        self.value = value;
        if !stamp.fixed {
            let delta = stamp.number.wrapping_sub(value);
            if !self.known || after(delta, self.delta) {
                self.delta = delta;
            }
            self.known = true;
            self.fixed = record_state != state::HAND_OVER;
        }
    }

    pub(super) fn made_up(&self, clock: u32) -> u32 {
        if self.fixed { self.value.wrapping_add(self.delta) } else { clock }
    }
}

impl Stamp {
    pub(super) fn value(self, value: u32) -> u32 {
        if self.fixed { value.wrapping_add(self.number) } else { self.number }
    }
}
