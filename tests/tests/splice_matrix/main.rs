//! Which streams are spliced, and why the others are relayed: a table for the kinds of clients and
//! endpoints, and a table for the kinds of hosts that Steer runs on. Each cell is a WebSocket stream
//! through a real `steer` with default settings. The stream also moves bytes and compares them.
//! `docs/splice.md` has the tables; the tests compare the page with what they find.
//!
//! Needs root, nft and the BPF object (`cargo xtask build-ebpf`).

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bed;
mod host;
mod page;
mod peers;
mod traces;
mod tun;

use steer_tests::peers::nft;
use steer_tests::require;

use crate::bed::{Bed, Cell};
use crate::host::HostKind;
use crate::peers::{ClientKind, EndpointKind, HOST_CASES};

#[test]
fn each_kind_of_client_reaches_each_kind_of_endpoint_as_the_page_says() {
    if !require::root() {
        return;
    }
    let cases = ClientKind::ALL.map(|client| EndpointKind::ALL.map(|endpoint| (client, endpoint)));
    let cells = on(HostKind::Plain, cases.as_flattened());
    let head = EndpointKind::ALL.map(EndpointKind::label);
    let rows = ClientKind::ALL.map(ClientKind::label).into_iter().zip(cells.chunks(head.len()));
    page::compare("peers", "client \\ endpoint", &head, rows).unwrap();
}

#[test]
fn each_kind_of_host_splices_what_the_page_says() {
    if !require::root() || !nft() {
        return;
    }
    let cases = HOST_CASES.map(|(_, case)| case);
    let found = HostKind::ALL.map(|host| (host.label(), on(host, &cases)));
    let head = HOST_CASES.map(|(label, _)| label);
    let rows = found.iter().map(|(label, cells)| (*label, &cells[..]));
    page::compare("hosts", "host", &head, rows).unwrap();
}

#[test]
fn streams_with_a_rewritten_connection_are_relayed() {
    if !require::root() || !nft() {
        return;
    }
    let found = HostKind::REWRITING.map(|host| (host, on(host, &[(ClientKind::Linux, EndpointKind::Linux)])));
    let relayed = [Cell::Relayed("conntrack".to_owned())];
    let others: Vec<_> = found.iter().filter(|(_, cells)| cells[..] != relayed).collect();
    assert!(others.is_empty(), "{others:?}");
}

/// What becomes of a stream in each case, on one host. Checks that Steer leaves the settings and
/// the rules of the host as they were.
fn on(host: HostKind, cases: &[(ClientKind, EndpointKind)]) -> Vec<Cell> {
    let bed = Bed::new(host).unwrap();
    let before = traces::of(&bed.topology.proxy).unwrap();
    let cells = bed.run(cases).unwrap();
    let after = traces::of(&bed.topology.proxy).unwrap();
    assert_eq!(traces::differences(&before, &after), Vec::<String>::new(), "{host:?}");
    cells
}
