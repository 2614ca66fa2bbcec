//! Takes streams from the maps of another build, or of another size, to those of this process, without a packet waiting.
//!
//! 1. New maps are made, in a directory that does not count yet ([`super::pinned`]).
//! 2. [`Migration::copy`]: all records, converted field by field, to the same places, and then the keys. The old programs go on.
//! 3. The directory gets its name, and the pins of the links move into it.
//! 4. [`Migration::look_again`]: what changed meanwhile.
//! 5. The links get the new programs, one by one, each at once. See [`super::catch_up`] for what packets meet meanwhile.
//! 6. [`Migration::finish`]: after a grace period no old program runs any more. What they have changed since is taken over, and
//!    the old directory is removed.
//!
//! If the process dies before 3, the old maps are all there is. From 3 to 6 there are two directories, either of which may know
//! more of a stream. Then the next process, of whatever build, does the same: if one directory is of its layout, that is the goal,
//! else it makes a third; it takes what the others know, and in all of them the later counts. Between such
//! a death and the next start the packets of a direction whose link has no new program yet are forwarded, but after a window not
//! believed by the old one, which does not see what acknowledges them; the first packet that the new program sees makes up
//! for that. Only of the count of bytes whole multiples of 4 GiB may be missing then.

use std::io;
use std::path::Path;
use std::time::Instant;

use proxy_common::abi;
use proxy_common::flow::{FlowKey4, FlowKey6, FlowRef, Record, state};

use super::catch_up::{catch_up, correct_counts, expect_leaps, expect_no_leaps};
use super::pinned::{PinnedError, PinnedMaps};
use super::records::Records;
use super::{FlowMap, InsertError, expiry, interfaces};
use crate::grace;

/// Streams on their way from old maps.
#[derive(Debug)]
pub(super) struct Migration {
    sources: Vec<Source>,
    begin: Instant,
    /// A process has died while some links had new programs: each source may know less of a stream than has happened.
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
    /// As they were counted when the record was last looked at.
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

    /// Fills new maps. No program may be using them.
    pub(super) fn copy(&mut self, to: &Goal<'_>) -> Result<(), PinnedError> {
        for source in &mut self.sources {
            for stream in &mut source.streams {
                let old = source.maps.record(stream.index);
                stream.packets = packets(&old);
                if to.records.state(stream.index) == state::OFF {
                    to.records.write(stream.index, old);
                } else {
                    // Of another source, or the goal's own: this one is noted in it.
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

    /// The links' pins go from the old directories to `path`.
    pub(super) fn move_links(&self, path: &Path) -> Result<(), PinnedError> {
        for source in &self.sources {
            interfaces::move_pins(source.maps.path(), path)
                .map_err(|error| PinnedError::Io { path: path.to_owned(), source: error })?;
        }
        Ok(())
    }

    /// Takes over what has changed since this was called, or the records copied, last. To be called right before the links change.
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

    /// To be called when no link has an old program. Waits for a grace period.
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

fn insert_all<K: aya::Pod>(
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
