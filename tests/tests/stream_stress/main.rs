//! Streams through a running Steer, under stress. Every byte of each stream is checked at both
//! ends. In the end Steer must hold nothing of the streams.
//!
//! Everything in a run follows from one seed, which is printed. To repeat a run, set
//! `STEER_STRESS_SEED` to the seed (hexadecimal). `STEER_STRESS_STREAMS` (2400),
//! `STEER_MATRIX_STREAMS` (100 in each cell, ten times that in the long form) and
//! `STEER_STALL_SECONDS` (20) set the sizes. `STEER_MATRIX_CELLS` chooses cells by a part of their
//! names, such as `V6` or `V4 Default`.

mod backend;
mod bed;
mod damage;
mod footprint;
mod load;
mod matrix;
mod pattern;
mod peer;
mod plan;
mod progress;
mod stall;
mod upgrade;

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context as _, Result};
use steer_tests::faults::Rates;
use steer_tests::require;
use steer_tests::topology::Topology;
use tokio::runtime::Runtime;

use crate::backend::Backend;
use crate::bed::{Bed, Family, Round};
use crate::damage::{Damage, bad_proxy};
use crate::load::Load;
use crate::matrix::Matrix;
use crate::plan::Kind;

const MIB: u64 = 1 << 20;
const STEER_PORT: u16 = 8080;
/// How many streams are open at a time.
const PARALLEL: usize = 200;
/// A setting of the network namespace, and a range of ports that is just large enough for the
/// streams.
const LOCAL_PORTS: &str = "/proc/sys/net/ipv4/ip_local_port_range";
const FEW_PORTS: &str = "40000 40399";

#[test]
fn relayed_streams_arrive_whole_and_leave_nothing() -> Result<()> {
    stress("relay")
}

#[test]
fn sockmap_streams_arrive_whole_and_leave_nothing() -> Result<()> {
    stress("sockmap")
}

#[test]
fn packet_streams_arrive_whole_and_leave_nothing() -> Result<()> {
    stress("packet")
}

/// Peers with different TCP options, over IPv4 and IPv6. Every stream is handed over in full flow.
#[test]
fn hand_overs_in_full_flow() -> Result<()> {
    hand_overs(Rates::NONE)
}

/// The same, while one per cent of the packets are lost, doubled, or delayed on their way from peer
/// to peer.
#[test]
fn hand_overs_in_full_flow_with_faults_on_the_way() -> Result<()> {
    hand_overs(Rates::PERCENT)
}

#[test]
fn stalled_reader_holds_memory_flat_on_the_relay() -> Result<()> {
    stall_test("relay")
}

#[test]
fn stalled_reader_holds_memory_flat_on_the_sockmap() -> Result<()> {
    stall_test("sockmap")
}

#[test]
fn stalled_reader_holds_memory_flat_in_the_packet_splice() -> Result<()> {
    stall_test("packet")
}

/// The control: without a proxy the same streams pass. So a failure with a proxy is the proxy's
/// fault.
#[test]
fn direct_streams_arrive_whole() -> Result<()> {
    let _alone = alone();
    let seed = seed();
    runtime()?.block_on(async {
        let (backend, address) = local_backend()?;
        for kind in [Kind::Whole, Kind::Abort] {
            let outcome =
                load::run(address, &backend, Load { kind, seed, streams: 200, parallel: PARALLEL }).await;
            ensure_none(&outcome.failures)?;
            let gap = outcome.longest_gap();
            anyhow::ensure!(gap < damage::STALL, "without a proxy, a stream has a gap of {gap:?}");
        }
        Ok(())
    })
}

/// The other control: the test finds a proxy that damages streams, or ends them in a wrong way.
#[test]
fn damaged_streams_are_noticed() -> Result<()> {
    let _alone = alone();
    let seed = seed();
    runtime()?.block_on(async {
        let (backend, address) = local_backend()?;
        let few = |kind| Load { kind, seed, streams: 40, parallel: PARALLEL };
        for (damage, kind) in [
            (Damage::LosesAByte, Kind::Whole),
            (Damage::DoublesAByte, Kind::Whole),
            (Damage::ClosesOnHalfClose, Kind::Whole),
            (Damage::TurnsResetsIntoFins, Kind::Abort),
        ] {
            let proxy = bad_proxy(address, damage).await?;
            let outcome = load::run(proxy, &backend, few(kind)).await;
            anyhow::ensure!(!outcome.failures.is_empty(), "{damage:?} was not noticed");
        }
        let proxy = bad_proxy(address, Damage::Stalls).await?;
        let outcome = load::run(proxy, &backend, few(Kind::Whole)).await;
        let gap = outcome.longest_gap();
        anyhow::ensure!(gap >= damage::STALL, "a stall was not noticed: {gap:?}");
        Ok(())
    })
}

fn stress(mode: &str) -> Result<()> {
    if !require::root() {
        return Ok(());
    }
    let _alone = alone();
    let seed = seed();
    let streams = number("STEER_STRESS_STREAMS", 2400)?;
    let topology = Topology::new(1)?;
    let bed = Bed::new(&topology, mode, STEER_PORT)?;
    // Allocators and tables grow to their working size once. So the first round is not measured,
    // but has as many streams at a time as the others.
    let load = Load { kind: Kind::Whole, seed, streams, parallel: PARALLEL };
    bed.round(Family::V4, Load { streams: (streams / 2).max(400), ..load })?;
    let before = bed.at_rest()?;
    let Round { paths, .. } = bed.round(Family::V4, Load { seed: seed.wrapping_add(1), ..load })?;
    // Not all streams: the socket splice leaves some to the relay, and the packet splice leaves
    // those that end at once.
    let (on_path, all) = (paths.get(mode).copied().unwrap_or(0), paths.values().sum::<u64>());
    anyhow::ensure!(2 * on_path > all, "few streams are carried by the {mode}: {paths:?}");
    let fewer = Load { streams: streams / 4, ..load };
    bed.round(Family::V6, Load { seed: seed.wrapping_add(2), ..fewer })?;
    // A port is free again as soon as its connection is reset, so clients use the same few ports
    // again and again.
    topology.clients.run(|| fs::write(LOCAL_PORTS, FEW_PORTS))??;
    bed.round(Family::V4, Load { seed: seed.wrapping_add(3), kind: Kind::Abort, ..fewer })?;
    bed.print_metrics()?;
    let after = bed.at_rest()?;
    println!("{mode}: {before:?} before, {after:?} after");
    anyhow::ensure!(after.descriptors == before.descriptors, "descriptors: {before:?}, then {after:?}");
    // Room for the allocator's fragments. If each of the standard 3,000 streams left more than 4
    // KiB, the growth would exceed this.
    let growth = after.resident_bytes.saturating_sub(before.resident_bytes);
    anyhow::ensure!(growth < 12 * MIB, "memory grew by {growth} bytes: {before:?}, then {after:?}");
    Ok(())
}

fn hand_overs(rates: Rates) -> Result<()> {
    if !require::root() {
        return Ok(());
    }
    let _alone = alone();
    let seed = seed();
    let streams = number("STEER_MATRIX_STREAMS", if require::long() { 1000 } else { 100 })?;
    let topology = Topology::new(1)?;
    let hand_overs = Matrix::new(&topology)?.run(rates, seed, streams)?;
    println!("{hand_overs} hand-overs with {rates:?}");
    Ok(())
}

fn stall_test(mode: &str) -> Result<()> {
    if !require::root() {
        return Ok(());
    }
    let _alone = alone();
    let stalled_for = Duration::from_secs(number("STEER_STALL_SECONDS", 20)? as u64);
    let topology = Topology::new(1)?;
    let bed = Bed::new(&topology, mode, STEER_PORT)?;
    let limits = stall::Limits::new(stalled_for, footprint::largest_tcp_buffers()?);
    let report =
        bed.on_clients(Family::V4, |target, backend| stall::test(target, backend, bed.steer.pid(), limits))?;
    println!("{mode}: {report}");
    bed.at_rest()?;
    Ok(())
}

fn local_backend() -> Result<(Arc<Backend>, SocketAddr)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    Ok((Backend::start(listener)?, address))
}

fn ensure_none(failures: &[String]) -> Result<()> {
    let shown = failures.iter().take(5).cloned().collect::<Vec<_>>().join("\n");
    anyhow::ensure!(failures.is_empty(), "{} streams failed; the first:\n{shown}", failures.len());
    Ok(())
}

fn runtime() -> Result<Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().context("starting a runtime")
}

/// A load disturbs measurements of memory, so the tests of this file run one after the other.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn seed() -> u64 {
    let given = env::var("STEER_STRESS_SEED").ok();
    let seed = given.map_or_else(rand::random, |hex| u64::from_str_radix(&hex, 16).expect("hex digits"));
    println!("STEER_STRESS_SEED={seed:x}");
    seed
}

fn number(variable: &str, default: usize) -> Result<usize> {
    match env::var(variable) {
        Ok(text) => text.parse().with_context(|| format!("{variable}={text}")),
        Err(_) => Ok(default),
    }
}
