//! The maps from tuples to flows.

use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher, Hash};
use std::io;
use std::os::fd::AsFd as _;
use std::sync::{Mutex, MutexGuard, PoisonError};

use aya::Pod;
use aya::maps::{HashMap, Map, MapData};
use proxy_common::flow::FlowRef;

use super::InsertError;
use super::key::FlowKey;
use crate::bpf::loader::{self, LoadError};
use crate::bpf::sock::maps::{BPF_NOEXIST, into_io};

type Handle<K> = HashMap<MapData, K, FlowRef>;

/// How many locks a map has. Two threads wait for each other only if the keys that they change have
/// the same lock. Each lock has a descriptor of its own, since aya changes a map by `&mut`.
const LOCKS: usize = 8;

/// A map from tuples to flows. Only userspace inserts. So while the lock of a key is held, the key
/// cannot appear, but the program may remove it.
pub(super) struct FlowMap<K>([Mutex<Handle<K>>; LOCKS]);

impl<K: Pod + Hash> FlowMap<K> {
    pub(super) fn new(map: Map, name: &'static str) -> Result<Self, LoadError> {
        let Map::HashMap(data) = &map else { return Err(LoadError::Incomplete { name }) };
        let mut handles = Vec::with_capacity(LOCKS);
        for _ in 1..LOCKS {
            let fd =
                data.fd().as_fd().try_clone_to_owned().map_err(|error| LoadError::refused(name, error))?;
            let again = MapData::from_fd(fd).map_err(|error| LoadError::refused(name, error))?;
            handles.push(Mutex::new(loader::typed(Map::HashMap(again), name)?));
        }
        handles.push(Mutex::new(loader::typed(map, name)?));
        // There are exactly as many handles as locks.
        handles.try_into().map(Self).map_err(|_| LoadError::Incomplete { name })
    }

    fn lock(&self, key: &K) -> MutexGuard<'_, Handle<K>> {
        let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(key);
        locked(&self.0[hash as usize % LOCKS])
    }

    pub(super) fn insert(&self, key: &K, flow: FlowRef) -> Result<(), InsertError> {
        self.lock(key).insert(key, flow, BPF_NOEXIST).map_err(InsertError::from_map)
    }

    pub(super) fn all(&self, key: impl Fn(K) -> FlowKey) -> io::Result<Vec<(FlowKey, FlowRef)>> {
        let entries = locked(&self.0[0]);
        let entries = entries.iter().map(|entry| entry.map(|(raw, flow)| (key(raw), flow)).map_err(into_io));
        entries.collect()
    }

    /// Removes a key, if it still belongs to this flow.
    pub(super) fn remove(&self, key: &K, flow: FlowRef) -> io::Result<()> {
        let mut map = self.lock(key);
        let removed = match map.get(key, 0) {
            Ok(found) if found == flow => map.remove(key),
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
        match removed.map_err(into_io) {
            // The program has removed the key already.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            other => other,
        }
    }
}

fn locked<K>(handle: &Mutex<Handle<K>>) -> MutexGuard<'_, Handle<K>> {
    // The handle holds a descriptor and nothing that a panic could leave half done.
    handle.lock().unwrap_or_else(PoisonError::into_inner)
}
