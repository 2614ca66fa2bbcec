//! Moves streams from maps of another build, or of another size, to the maps of this process. No
//! packet has to wait.
//!
//! 1. New maps are made, in a directory that does not count yet ([`super::pinned`]).
//! 2. [`Migration::copy`] copies all records to the same indices, converted field by field, and
//!    then the keys. The old programs go on.
//! 3. The directory gets its name, and the pins of the links move into it.
//! 4. [`Migration::look_again`] notes what has changed meanwhile.
//! 5. The links get the new programs, one link after the other. See [`super::catch_up`] for what
//!    packets meet meanwhile.
//! 6. [`Migration::finish`]: after a grace period no old program runs any more. Then the last
//!    changes by the old programs are noted, and the old directory is removed.
//!
//! If the process dies before step 3, only the old maps exist. From step 3 to step 6 there are two
//! directories, and either of them may know more of a stream. The next process, of whatever build,
//! then does the same again. If one directory has the layout of that process, the directory is the
//! goal; otherwise the process makes a third directory. Where the directories differ, the later
//! state counts. Between such a death and the next start, packets are forwarded also where a link
//! does not have its new program yet. But after a window of data the old program does not believe
//! them any more, since it does not see the acknowledgements. The first packet that the new program
//! sees corrects that. Only the count of bytes may then lack whole multiples of 4 GiB.

use std::hash::Hash;
use std::io;
use std::path::Path;
use std::time::Instant;

use proxy_common::abi;
use proxy_common::flow::{FlowKey4, FlowKey6, FlowRef, Record, state};

use super::catch_up::{catch_up, correct_counts, expect_leaps, expect_no_leaps};
use super::flow_map::FlowMap;
use super::pinned::{PinnedError, PinnedMaps};
use super::records::Records;
use super::{InsertError, expiry, interfaces};
use crate::grace;

/// Streams on their way from old maps.
#[derive(Debug)]
pub(super) struct Migration {
    sources: Vec<Source>,
    begin: Instant,
    /// A process has died while only some links had new programs, so no source may know everything
    /// of a stream.
    is_torn: bool,
}

#[derive(Debug)]
struct Source {
    maps: PinnedMaps,
    streams: Vec<Stream>,
}

/// A record that is in use.
#[derive(Debug)]
struct Stream {
    index: u32,
    /// The packets that were counted when the record was last read.
    packets: [u64; 2],
}

/// Where streams go.
pub(super) struct Goal<'a> {
    pub(super) records: &'a Records,
    pub(super) flows4: &'a FlowMap<FlowKey4>,
    pub(super) flows6: &'a FlowMap<FlowKey6>,
}

impl Migration {
    pub(super) fn new(sources: Vec<PinnedMaps>) -> Self {
        let source = |maps: PinnedMaps| {
            if let Err(error) = expiry::hold_off(maps.path()) {
                tracing::warn!(%error, "an earlier process's timer may give streams up while they are taken over");
            }
            Source { streams: maps.used().map(Stream::new).collect(), maps }
        };
        Self { sources: sources.into_iter().map(source).collect(), begin: Instant::now(), is_torn: false }
    }

    /// Fills new maps, which no program uses yet.
    pub(super) fn copy(&mut self, to: &Goal<'_>) -> Result<(), PinnedError> {
        for source in &mut self.sources {
            for stream in &mut source.streams {
                let old = source.maps.record(stream.index);
                stream.packets = packets(&old);
                if to.records.state(stream.index) == state::OFF {
                    to.records.write(stream.index, old);
                } else {
                    // The record came from another source, or was the goal's own already: note in
                    // it what this source knows.
                    self.is_torn = true;
                }
            }
            let keys4 = source.maps.keys::<FlowKey4>(abi::MAP_FLOWS4)?;
            let keys6 = source.maps.keys::<FlowKey6>(abi::MAP_FLOWS6)?;
            insert_all(&keys4, to.flows4, abi::MAP_FLOWS4)?;
            insert_all(&keys6, to.flows6, abi::MAP_FLOWS6)?;
        }
        to.records.find_used();
        Ok(())
    }

    /// Moves the pins of links from the old directories to `path`.
    pub(super) fn move_links(&self, path: &Path) -> Result<(), PinnedError> {
        for source in &self.sources {
            interfaces::move_pins(source.maps.path(), path)
                .map_err(|error| PinnedError::Io { path: path.to_owned(), source: error })?;
        }
        Ok(())
    }

    /// Notes what has changed since the last call, or since the records were copied. Call this
    /// right before the links change.
    pub(super) fn look_again(&mut self, to: &Records) {
        for source in &mut self.sources {
            for stream in &mut source.streams {
                let old = source.maps.record(stream.index);
                catch_up(to, stream.index, &old, stream.packets);
                expect_leaps(to, stream.index);
                stream.packets = packets(&old);
            }
        }
    }

    /// Call this when no link has an old program any more. Waits for a grace period.
    pub(super) fn finish(&mut self, to: &Records) {
        grace::wait_for_rcu_readers();
        for Source { maps, streams } in &mut self.sources {
            for stream in streams.iter_mut() {
                let old = maps.record(stream.index);
                catch_up(to, stream.index, &old, stream.packets);
                correct_counts(to, stream.index, &old);
                let is_quiet = packets(&old) == stream.packets;
                expect_no_leaps(to, stream.index, &old, is_quiet && !self.is_torn);
            }
            let took_ms = self.begin.elapsed().as_millis();
            tracing::info!(from = %maps.path().display(), streams = streams.len(), took_ms, "took streams to new maps");
            if let Err(error) = maps.remove() {
                tracing::warn!(path = %maps.path().display(), %error, "cannot remove maps that nothing uses any more");
            }
        }
    }
}

impl Stream {
    fn new((index, record): (u32, Record)) -> Self {
        Self { index, packets: packets(&record) }
    }
}

fn packets(record: &Record) -> [u64; 2] {
    record.flows.map(|flow| flow.live.packets)
}

fn insert_all<K: aya::Pod + Hash>(
    keys: &[(K, FlowRef)],
    to: &FlowMap<K>,
    what: &'static str,
) -> Result<(), PinnedError> {
    for (key, flow) in keys {
        match to.insert(key, *flow) {
            // Of another source.
            Ok(()) | Err(InsertError::Taken) => {}
            Err(error) => return Err(PinnedError::Damaged { what, source: io::Error::other(error) }),
        }
    }
    Ok(())
}
