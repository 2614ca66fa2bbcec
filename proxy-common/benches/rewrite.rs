//! `cargo bench -p proxy-common`: what the rewriting of one packet takes, compiled for the host. In the kernel the BPF
//! programs also look the flow up and write the packet; `packet_cost` measures them there.

use bytemuck::Zeroable as _;
use divan::{Bencher, black_box};
use proxy_common::flow::{Record, flags, state};
use proxy_common::packet::checksum::Difference;
use proxy_common::packet::headers::{Ip, Ipv4, Ipv6, Tcp, tcp_flags};
use proxy_common::packet::rewrite;
use proxy_common::shared::Share as _;

fn main() {
    divan::main();
}

/// A spliced stream, with a window scale to change.
fn record() -> Record {
    let mut record = Record::zeroed();
    (record.state, record.flags) = (state::SPLICED, flags::SACK);
    let fixed = &mut record.flows[0].fixed;
    (fixed.to_source, fixed.to_destination) = ([1, 2, 3, 4], [5, 6, 7, 8]);
    (fixed.to_ports, fixed.seq_delta, fixed.ack_delta) = (0x0bb8_9c40, 0x1234_5678, 0x8765_4321);
    (fixed.window_left, fixed.window_right) = (7, 9);
    record
}

fn segment() -> Tcp {
    let flags = tcp_flags::ACK;
    Tcp { ports: 0x1f90_c350, seq: 1, ack: 2, offset: 5 << 4, flags, window: 0xf501, ..Tcp::zeroed() }
}

/// The TCP header alone.
#[divan::bench]
fn tcp(bencher: Bencher<'_, '_>) {
    let record = record();
    let flows = record.flows.to_shared();
    let fixed = &flows[0].fixed;
    bencher
        .with_inputs(segment)
        .bench_local_refs(|tcp| rewrite::tcp(tcp, black_box(fixed), false, state::SPLICED, 0));
}

/// Both headers of a data segment without options, and the checksum.
#[divan::bench(types = [Ipv4, Ipv6])]
fn headers<I: Ip>(bencher: Bencher<'_, '_>) {
    let record = record();
    let flows = record.flows.to_shared();
    let fixed = &flows[0].fixed;
    bencher.with_inputs(|| (I::zeroed(), segment())).bench_local_refs(|(ip, tcp)| {
        let fixed = black_box(fixed);
        let mut change = Difference::default();
        change.add(ip.readdress(&fixed.to_source, &fixed.to_destination, false).pseudo);
        change.add(rewrite::tcp(tcp, fixed, false, state::SPLICED, 0).fields);
        tcp.check = change.apply(tcp.check);
    });
}
