//! Where each field of a connection record is, so that a process can read the records of another
//! build. The map `STEER_LAYOUT` lists the fields.
//!
//! Everything that a later build needs for this is frozen: [`Entry`], the entries that are not
//! fields, [`About`](crate::about::About), the keys and values of the flow maps, the values of
//! [`state`](crate::flow::state), the names of the maps. A field that changes its meaning gets
//! another name. If anything else has to change, [`BASIS`] is raised. Builds of different `BASIS`
//! do not take over streams from each other.

use core::mem::{offset_of, size_of};

use bytemuck::{Pod, Zeroable};

use crate::abi::ABI_VERSION;
use crate::flow::{DirFixed, DirLive, Flow, FlowEvent, FlowKey4, FlowKey6, FlowRef, Record};
use crate::stat::Stat;

/// The version of the frozen parts.
pub const BASIS: u32 = 1;

/// An element of the map `STEER_LAYOUT`. Frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Entry {
    /// FNV-1a of the name.
    pub name: u64,
    /// Bytes from the start of the record.
    pub offset: u32,
    /// Bytes.
    pub size: u32,
}

/// A field of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// What code writes before `name`; empty, or ends with a dot.
    pub path: &'static str,
    /// The name in the code, after `path`.
    pub name: &'static str,
    /// Bytes from the start of the record.
    pub offset: u32,
    /// Bytes.
    pub size: u32,
    /// What a process does if the records of another build do not have this field.
    pub kind: Kind,
}

/// What to do if the records of another build have no such field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A stream cannot go on without the field.
    Needed,
    /// The field becomes zero.
    OrZero,
    /// The field holds nothing.
    Padding,
    /// The field consists of fields, and is not among [`FIELDS`] itself.
    Nested,
}

/// The fields of a type, by kind. Does not compile if a byte of the type belongs to no field, or to
/// two fields.
macro_rules! fields {
    ($record:ident { $($kind:ident: $($(#[$only:meta])? $name:ident),+;)+ }) => {{
        const FIELDS: &[Field] = &[$($($(#[$only])? Field {
            path: "",
            name: stringify!($name),
            offset: offset_of!($record, $name) as u32,
            size: size_of_field(|record: &$record| &record.$name),
            kind: Kind::$kind,
        }),+),+];
        assert!(are_disjoint(FIELDS) && total(FIELDS) == size_of::<$record>());
        FIELDS
    }};
}

const OF_RECORD: &[Field] = fields!(Record {
    Needed: state, flags, generation, family;
    OrZero: idle_timeout_secs, key_hash, cluster, opened_unix_ms, relayed, has_key,
        #[cfg(feature = "other-layout")] other;
    Nested: flows;
});

const OF_FLOW: &[Field] = fields!(Flow { Nested: fixed, live; });

const OF_FIXED: &[Field] = fields!(DirFixed {
    Needed: to_source, to_destination, to_ports, seq_delta, ack_delta, ts_shift, ts_floor, ifindex, output,
        window_left, window_right, received;
    OrZero: #[cfg(feature = "other-layout")] other;
    Padding: _pad;
});

const OF_LIVE: &[Field] = fields!(DirLive {
    Needed: bytes, last_payload_ns, last_packet_ns, seq_end, ack_end, window, window_max, ts_value, fin_end, bits,
        own_end;
    OrZero: packets, tick, #[cfg(feature = "other-layout")] other;
    Padding: _pad;
});

const COUNT: usize = OF_RECORD.len() - 1 + 2 * (OF_FIXED.len() + OF_LIVE.len());

/// All fields of [`Record`], down to those that have no fields themselves.
pub const FIELDS: [Field; COUNT] = {
    let mut fields = [OF_RECORD[0]; COUNT];
    let mut count = append(&mut fields, 0, OF_RECORD, "", 0);
    let paths = [["flows[0].fixed.", "flows[0].live."], ["flows[1].fixed.", "flows[1].live."]];
    let mut flow = 0;
    while flow < paths.len() {
        let start = offset_of!(Record, flows) + flow * size_of::<Flow>();
        count = append(&mut fields, count, OF_FIXED, paths[flow][0], start + offset_of!(Flow, fixed));
        count = append(&mut fields, count, OF_LIVE, paths[flow][1], start + offset_of!(Flow, live));
        flow += 1;
    }
    assert!(OF_FLOW.len() == 2 && paths.len() * size_of::<Flow>() == size_of::<[Flow; 2]>());
    assert!(count == COUNT && are_disjoint(&fields) && total(&fields) == size_of::<Record>());
    fields
};

/// The first entry: instead of an offset, [`BASIS`]; the size is that of a record.
pub const RECORD: u64 = hash(FNV, b"record");
/// The second: instead of an offset, [`ABI_VERSION`]; the size is that of an event.
const EVENT: u64 = hash(FNV, b"event");
/// The third: instead of an offset, how many counters there are; the size is that of one.
const COUNTER: u64 = hash(FNV, b"counter");

/// How many entries there are.
pub const ENTRY_COUNT: usize = COUNT + 3;

/// What the map `STEER_LAYOUT` says of the maps of this build.
pub const ENTRIES: [Entry; ENTRY_COUNT] = {
    let record = Entry { name: RECORD, offset: BASIS, size: size_of::<Record>() as u32 };
    let mut entries = [record; ENTRY_COUNT];
    entries[1] = Entry { name: EVENT, offset: ABI_VERSION, size: size_of::<FlowEvent>() as u32 };
    entries[2] = Entry { name: COUNTER, offset: Stat::ALL.len() as u32, size: size_of::<u64>() as u32 };
    let mut index = 0;
    while index < COUNT {
        let Field { offset, size, .. } = FIELDS[index];
        entries[3 + index] = Entry { name: FIELDS[index].id(), offset, size };
        index += 1;
    }
    assert!(have_names_of_their_own(&entries));
    entries
};

/// Tells layouts apart: the [`fingerprint`] of this one.
pub const LAYOUT: u64 = fingerprint(&ENTRIES);

impl Field {
    /// What stands for the field's name in an [`Entry`].
    pub const fn id(&self) -> u64 {
        hash(hash(FNV, self.path.as_bytes()), self.name.as_bytes())
    }
}

/// A hash of the whole content of these entries.
pub const fn fingerprint(entries: &[Entry]) -> u64 {
    let (mut result, mut index) = (FNV, 0);
    while index < entries.len() {
        let Entry { name, offset, size } = entries[index];
        result = hash(hash(hash(result, &name.to_le_bytes()), &offset.to_le_bytes()), &size.to_le_bytes());
        index += 1;
    }
    result
}

const FNV: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a, going on from `hash`.
const fn hash(mut hash: u64, bytes: &[u8]) -> u64 {
    let mut index = 0;
    while index < bytes.len() {
        hash = (hash ^ bytes[index] as u64).wrapping_mul(0x0000_0100_0000_01b3);
        index += 1;
    }
    hash
}

const fn size_of_field<T, F>(_field: fn(&T) -> &F) -> u32 {
    size_of::<F>() as u32
}

/// Appends the fields `of` of a type that starts at `start` and is called `path` to the first
/// `count` fields; returns the new count.
const fn append(
    fields: &mut [Field],
    mut count: usize,
    of: &[Field],
    path: &'static str,
    start: usize,
) -> usize {
    let mut index = 0;
    while index < of.len() {
        let field = of[index];
        if !matches!(field.kind, Kind::Nested) {
            fields[count] = Field { path, offset: start as u32 + field.offset, ..field };
            count += 1;
        }
        index += 1;
    }
    count
}

const fn are_disjoint(fields: &[Field]) -> bool {
    let mut one = 0;
    while one < fields.len() {
        let mut other = 0;
        while other < one {
            let (a, b) = (fields[one], fields[other]);
            if a.offset < b.offset + b.size && b.offset < a.offset + a.size {
                return false;
            }
            other += 1;
        }
        one += 1;
    }
    true
}

const fn total(fields: &[Field]) -> usize {
    let (mut bytes, mut index) = (0, 0);
    while index < fields.len() {
        bytes += fields[index].size as usize;
        index += 1;
    }
    bytes
}

const fn have_names_of_their_own(entries: &[Entry]) -> bool {
    let mut one = 0;
    while one < entries.len() {
        let mut other = 0;
        while other < one {
            if entries[one].name == entries[other].name {
                return false;
            }
            other += 1;
        }
        one += 1;
    }
    true
}

#[cfg(feature = "user")]
// SAFETY: `repr(C)`, integers only, no padding (checked by bytemuck's derive).
unsafe impl aya::Pod for Entry {}

// Frozen.
const _: () = {
    assert!(size_of::<Entry>() == 16 && size_of::<FlowRef>() == 4);
    assert!(size_of::<FlowKey4>() == 12 && size_of::<FlowKey6>() == 36);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_told_by_path_and_place() {
        let of = |path: &str, name: &str| {
            *FIELDS.iter().find(|field| (field.path, field.name) == (path, name)).unwrap()
        };
        assert_eq!(of("", "state").offset as usize, offset_of!(Record, state));
        let second = of("flows[1].live.", "window");
        let start = offset_of!(Record, flows) + size_of::<Flow>() + offset_of!(Flow, live);
        assert_eq!((second.offset as usize, second.size), (start + offset_of!(DirLive, window), 2));
        assert_ne!(second.id(), of("flows[0].live.", "window").id());
        assert!(FIELDS.iter().all(|field| field.name != "flows"));
    }

    /// Other builds look for these names; see the head of this file.
    #[test]
    fn what_is_frozen_stays() {
        let first = ENTRIES[0];
        assert_eq!((first.name, first.offset), (0x9c93_27ff_f794_74ac, 1));
        assert_eq!(size_of::<crate::about::About>(), 152);
    }

    #[test]
    fn layouts_differ_in_names_places_and_sizes() {
        let mut other = ENTRIES;
        other[7].offset += 4;
        assert_ne!(fingerprint(&other), LAYOUT);
        other = ENTRIES;
        other[7].size += 4;
        assert_ne!(fingerprint(&other), LAYOUT);
        other = ENTRIES;
        other.swap(7, 8);
        assert_ne!(fingerprint(&other), LAYOUT);
    }

    #[test]
    fn overlaps_are_found() {
        let [first, second] = [FIELDS[0], FIELDS[1]];
        assert!(are_disjoint(&[first, second]));
        assert!(!are_disjoint(&[first, Field { offset: first.offset + 3, ..second }]));
    }
}
