//! Where a request head ends, and whether it has only one meaning.

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use steer_policy::http1::framing::{Event, Framing, Limits};
use steer_policy::http1::head::check;

use super::POLL;

const LIMITS: Limits = Limits { head_bytes: 60 << 10, headers: 100 };

/// What a connection does with a head that arrives in one segment: [`check`] is part of this.
#[divan::bench]
fn framing(bencher: Bencher<'_, '_>) {
    bencher.counter(BytesCount::of_slice(POLL)).bench(|| {
        let event = Framing::new(LIMITS).next(black_box(POLL));
        assert!(matches!(event, Event::Head { .. }), "{event:?}");
        event
    });
}

#[divan::bench]
fn check_alone(bencher: Bencher<'_, '_>) {
    bencher.counter(BytesCount::of_slice(POLL)).bench(|| check(black_box(POLL)));
}
