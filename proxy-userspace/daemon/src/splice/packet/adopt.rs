//! Takes over the records that an earlier process has left in the kernel's maps. The streams went
//! on meanwhile. A stream whose hand-over the earlier process did not finish is reset: the bytes in
//! its sockets are lost.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use proxy_common::flow::{Direction, FlowRef, Record, output, state};
use steer_kernel::bpf::packet::{Ends, FlowKey, cluster};
use steer_kernel::tcp::clock;
use steer_policy::config;

use super::PacketSplice;
use super::owned_record::{Carried, OwnedRecord, RecordPool};
use super::table::SplicedStream;
use crate::streams::ports::SourcePorts;
use crate::streams::{StreamGuard, StreamInfo};

/// The name of a cluster that is not in this configuration.
const UNKNOWN_CLUSTER: &str = "(unknown)";

/// The largest window scale of TCP (RFC 7323).
const MAX_SCALE: u8 = 14;

/// The numbers of records that were found, by [`Fate`].
#[derive(Debug, Default)]
struct Counts {
    streams: u32,
    reset: u32,
    over: u32,
    unusable: u32,
}

/// What is to be done with a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// The stream goes on.
    Living,
    /// Both peers get a RST.
    Reset,
    /// The stream is over, and its tuple lingers.
    Over,
    /// The record is freed.
    Unusable,
}

/// `keys`: how many of its two keys lead to the record. `completes`: the earlier process completes
/// its hand-overs.
fn fate(record: &Record, keys: usize, completes: bool) -> Fate {
    let outputs = record.flows.map(|flow| flow.fixed.output);
    let is_possible = matches!(record.family, 4 | 6)
        && record.flows.iter().all(|flow| {
            let fixed = &flow.fixed;
            fixed.window_left <= MAX_SCALE
                && fixed.window_right <= MAX_SCALE
                && fixed.output <= output::OTHER_FAMILY_LOOPBACK
        })
        && output::is_other_family(outputs[0]) == output::is_other_family(outputs[1]);
    match (record.state, keys) {
        _ if !is_possible => Fate::Unusable,
        // The record waited for a grace period, to be used again.
        (_, 0) => Fate::Unusable,
        (state::SPLICED, 2) => Fate::Living,
        // If the earlier process dies meanwhile, the program sees the RSTs of its sockets.
        (state::HAND_OVER, 2) if completes => Fate::Living,
        (state::SPLICED | state::HAND_OVER, _) => Fate::Reset,
        (state::FINISHED | state::RESET | state::DEAD, _) => Fate::Over,
        _ => Fate::Unusable,
    }
}

/// To be called once, before this process has streams. `completes`: the earlier process still runs,
/// and completes its hand-overs.
pub(super) fn adopt(
    splice: &PacketSplice,
    ports: Option<&SourcePorts>,
    clusters: &[config::Cluster],
    completes: bool,
) {
    let records = &splice.records;
    let used = records.kernel.records().all_used();
    if used.is_empty() {
        return;
    }
    let names: HashMap<u64, Arc<str>> = clusters
        .iter()
        .map(|cluster| (cluster::name_hash(&cluster.name), cluster.name.as_str().into()))
        .collect();
    let keys = valid_keys(records);
    let mut counts = Counts::default();
    for index in used {
        let record = OwnedRecord::adopt(records, index);
        let content = record.snapshot();
        let has_key = |direction: &Direction| keys.contains(&FlowRef::new(index, *direction));
        let keys = Direction::BOTH.iter().filter(|direction| has_key(direction)).count();
        let fate = fate(&content, keys, completes);
        let open = match fate {
            Fate::Living => {
                counts.streams += 1;
                Some(open(splice, &record, &content, &names))
            }
            Fate::Reset => {
                counts.reset += 1;
                record.set_reset();
                None
            }
            Fate::Over => {
                counts.over += 1;
                None
            }
            Fate::Unusable => {
                counts.unusable += 1;
                continue;
            }
        };
        let upstream = Ends::of(&content, Direction::ToDownstream);
        let source = ports.and_then(|ports| ports.lease_this(upstream.local, upstream.peer));
        splice.table.insert(SplicedStream::adopted(record, open, source, clock::monotonic_ns()), None);
    }
    records.show_used();
    let Counts { streams, reset, over, unusable } = counts;
    tracing::info!(streams, reset, over, unusable, "took over the streams of an earlier process");
}

/// Returns the flows whose key is also the key in their record. Removes all other keys.
fn valid_keys(records: &RecordPool) -> HashSet<FlowRef> {
    let contents = records.kernel.records();
    let found = records.kernel.keys().unwrap_or_else(|error| {
        tracing::error!(%error, "cannot read the flow maps; their streams end");
        Vec::new()
    });
    let (mut valid, mut stray) = (HashSet::with_capacity(found.len()), 0_u32);
    for (key, flow) in found {
        let is_valid = flow.record() < contents.capacity() && {
            let content = contents.snapshot(flow.record());
            content.state != state::OFF && FlowKey::of(&content, flow.direction()) == key
        };
        if is_valid {
            valid.insert(flow);
        } else {
            stray += 1;
            records.kernel.remove(&key, flow);
        }
    }
    if stray > 0 {
        tracing::info!(keys = stray, "removed keys that lead to no stream");
    }
    valid
}

fn open(
    splice: &PacketSplice,
    record: &OwnedRecord,
    content: &Record,
    names: &HashMap<u64, Arc<str>>,
) -> (StreamGuard, Arc<Carried>) {
    let info = StreamInfo {
        client: Ends::of(content, Direction::ToUpstream).peer,
        cluster: names.get(&content.cluster).cloned().unwrap_or_else(|| UNKNOWN_CLUSTER.into()),
        endpoint: Ends::of(content, Direction::ToDownstream).peer,
        key_hash: (content.has_key == 1).then_some(content.key_hash),
    };
    let opened_at = UNIX_EPOCH + Duration::from_millis(content.opened_unix_ms);
    let carried = Carried::of_record(record);
    (splice.streams.adopt(info, opened_at, Arc::clone(&carried) as _), carried)
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;

    use super::*;

    #[test]
    fn only_spliced_streams_with_both_keys_go_on() {
        let record = |state| Record { state, family: 4, ..Record::zeroed() };
        let fate = |state, keys| fate(&record(state), keys, false);
        assert_eq!(fate(state::SPLICED, 2), Fate::Living);
        assert_eq!(fate(state::SPLICED, 1), Fate::Reset);
        assert_eq!(fate(state::HAND_OVER, 2), Fate::Reset);
        for over in [state::FINISHED, state::RESET, state::DEAD] {
            assert_eq!((fate(over, 2), fate(over, 1)), (Fate::Over, Fate::Over));
        }
        assert_eq!(fate(state::SPLICED, 0), Fate::Unusable);
    }

    #[test]
    fn a_hand_over_is_left_to_a_process_that_goes_on_with_it() {
        let record = Record { state: state::HAND_OVER, family: 4, ..Record::zeroed() };
        assert_eq!(fate(&record, 2, true), Fate::Living);
        assert_eq!(fate(&record, 1, true), Fate::Reset);
    }

    #[test]
    fn a_record_with_impossible_values_is_unusable() {
        let good = Record { state: state::SPLICED, family: 6, ..Record::zeroed() };
        let mut scaled = good;
        scaled.flows[1].fixed.window_left = 15;
        let mut elsewhere = good;
        elsewhere.flows[0].fixed.output = 3;
        for bad in [scaled, elsewhere, Record { family: 5, ..good }, Record { state: 6, ..good }] {
            assert_eq!(fate(&bad, 2, false), Fate::Unusable);
        }
        assert_eq!(fate(&good, 2, false), Fate::Living);
    }
}
