//! Where a request head ends, and whether it has only one meaning.

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use steer_policy::http1::fields::Spelling;
use steer_policy::http1::request::RequestHead;
use steer_policy::http1::scan::{HeadScan, Limits, Scanned};

use super::POLL;

const LIMITS: Limits = Limits { head_bytes: 60 << 10, headers: 100 };

/// What a connection does with a head that arrives in one segment.
#[divan::bench]
fn scan_and_parse(bencher: Bencher<'_, '_>) {
    bencher.counter(BytesCount::of_slice(POLL)).bench(|| {
        let scanned = HeadScan::new(LIMITS).next(black_box(POLL));
        assert_eq!(scanned, Scanned::Head(POLL.len()));
        RequestHead::parse(black_box(POLL)).map(|head| head.keep_alive)
    });
}

#[divan::bench]
fn parse_alone(bencher: Bencher<'_, '_>) {
    bencher
        .counter(BytesCount::of_slice(POLL))
        .bench(|| RequestHead::parse(black_box(POLL)).map(|head| head.keep_alive));
}

#[divan::bench]
fn write(bencher: Bencher<'_, '_>) {
    let head = RequestHead::parse(POLL).expect("the head is right");
    let mut out = Vec::with_capacity(2 * POLL.len());
    bencher.counter(BytesCount::of_slice(POLL)).bench_local(|| {
        out.clear();
        black_box(&head).write(Spelling::LowerCase, &mut out);
    });
}
