//! Reads the flow maps of one `steer` without asking the process.

use std::fs;

use aya::maps::{HashMap, Map, MapData};
use proxy_common::abi::{MAP_FLOWS4, MAP_FLOWS6};

/// The number of keys in both flow maps of the process. 0 if it does not have the maps.
pub(crate) fn flow_keys(pid: u32) -> usize {
    maps_of(pid).into_iter().map(|id| MapData::from_id(id).unwrap()).map(keys).sum()
}

/// The ids of the BPF maps that the process holds open.
fn maps_of(pid: u32) -> Vec<u32> {
    let mut ids: Vec<u32> = fs::read_dir(format!("/proc/{pid}/fdinfo"))
        .unwrap()
        // The process may close a descriptor at the same time.
        .filter_map(|entry| fs::read_to_string(entry.unwrap().path()).ok())
        .filter_map(|text| text.lines().find_map(|line| line.strip_prefix("map_id:")?.trim().parse().ok()))
        .collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn keys(map: MapData) -> usize {
    let name = map.info().unwrap().name_as_str().unwrap().to_owned();
    if name == MAP_FLOWS4 {
        HashMap::<_, [u8; 12], u32>::try_from(Map::HashMap(map)).unwrap().keys().count()
    } else if name == MAP_FLOWS6 {
        HashMap::<_, [u8; 36], u32>::try_from(Map::HashMap(map)).unwrap().keys().count()
    } else {
        0
    }
}
