//! Records that another build left. For any description of their layout, the records are refused,
//! or every field arrives at its place.
#![no_main]

use bytemuck::bytes_of;
use libfuzzer_sys::fuzz_target;
use proxy_common::flow::Record;
use proxy_common::layout::{BASIS, ENTRIES, Entry, FIELDS, Kind, RECORD};
use steer_fuzz::take;

use self::convert::{Conversion, Unreadable};

// Includes only this file, because its crate (with an allocator and the loader of BPF programs)
// takes minutes to build.
#[path = "../../proxy-userspace/kernel/src/bpf/packet/convert.rs"]
#[expect(unreachable_pub, reason = "public in the crate that the file is of")]
mod convert;

/// The longest record that is converted here. A description may claim a longer one.
const MAX_RECORD: u32 = 4096;

/// A change of the description: the index of the entry, the kind of change, and a number for the
/// change.
type Change = (u8, u8, u32);

/// The description of this build with changes. The input begins with the number of changes.
fn description(input: &mut &[u8]) -> Option<Vec<Entry>> {
    let count: u8 = take(input)?;
    let mut entries = ENTRIES.to_vec();
    for _ in 0..count & 0x3f {
        let (index, what, number): Change = (take(input)?, take(input)?, take(input)?);
        if entries.is_empty() {
            break;
        }
        let index = usize::from(index) % entries.len();
        match what % 8 {
            0 => entries[index].offset = number,
            1 => entries[index].size = number,
            // Small numbers reach the most code.
            2 => entries[index].offset = number % 512,
            3 => entries[index].size = number % 17,
            4 => entries[0].size = number % (MAX_RECORD + 1),
            5 => {
                entries.remove(index);
            }
            6 => {
                let other = number as usize % entries.len();
                entries.swap(index, other);
            }
            _ => entries.push(Entry { offset: number, ..entries[index] }),
        }
    }
    Some(entries)
}

/// For each byte of a converted record, the byte of the old record that it comes from. `None` for
/// zero.
fn model(entries: &[Entry]) -> Result<(u32, Vec<Option<usize>>), Unreadable> {
    let find = |name: u64| entries.iter().find(|entry| entry.name == name);
    let record = find(RECORD).filter(|record| record.offset == BASIS).ok_or(Unreadable::Kind)?;
    let mut sources = vec![None; size_of::<Record>()];
    for field in FIELDS {
        let name = format!("{}{}", field.path, field.name);
        let found = match (find(field.id()), field.kind) {
            (_, Kind::Padding) | (None, Kind::OrZero) => continue,
            (None, _) => return Err(Unreadable::Lacks(name)),
            (Some(found), _) => found,
        };
        if found.size > field.size || found.size < field.size && field.size > 8 {
            return Err(Unreadable::Size(name));
        }
        if u64::from(found.offset) + u64::from(found.size) > u64::from(record.size) {
            return Err(Unreadable::Beyond);
        }
        for byte in 0..found.size {
            sources[(field.offset + byte) as usize] = Some((found.offset + byte) as usize);
        }
    }
    Ok((record.size, sources))
}

fuzz_target!(|input: &[u8]| {
    let mut input = input;
    let Some(entries) = description(&mut input) else { return };
    let conversion = Conversion::new(&entries);
    let (conversion, (len, sources)) = match (conversion, model(&entries)) {
        (Ok(conversion), Ok(model)) => (conversion, model),
        (conversion, model) => {
            assert_eq!(conversion.err(), model.err(), "(conversion, model) of {entries:?}");
            return;
        }
    };
    assert_eq!(conversion.record_len(), len);
    if len > MAX_RECORD {
        return;
    }
    // Bytes that the input does not have are made up. They differ from byte to byte.
    let record: Vec<u8> =
        (0..len as usize).map(|at| input.get(at).copied().unwrap_or((at * 7 + at / 256) as u8 | 1)).collect();
    let expected: Vec<u8> = sources.iter().map(|source| source.map_or(0, |at| record[at])).collect();
    assert_eq!(bytes_of(&conversion.convert(&record)), expected, "(conversion, model) of {entries:?}");
});
