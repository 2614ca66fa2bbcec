//! Converts the records of another build to records of this build, field by field.

use bytemuck::Zeroable as _;
use proxy_common::flow::Record;
use proxy_common::layout::{BASIS, Entry, FIELDS, Field, Kind, RECORD};

/// Why the records of another build cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    #[error("its maps are of a kind that this build does not know")]
    Kind,
    #[error("its records have no `{0}`, without which a stream cannot go on")]
    Lacks(String),
    #[error("its records have another kind of `{0}`")]
    Size(String),
    #[error("it describes a field beyond the end of a record")]
    Beyond,
}

/// Which bytes of a record of another build go where in a record of this build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Conversion {
    record_len: u32,
    copies: Vec<Piece>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    from: usize,
    to: usize,
    len: usize,
}

impl Conversion {
    /// The conversion of the records that these entries describe.
    pub(super) fn new(entries: &[Entry]) -> Result<Self, Unreadable> {
        let find = |name| entries.iter().find(|entry| entry.name == name);
        let record = find(RECORD).filter(|record| record.offset == BASIS).ok_or(Unreadable::Kind)?;
        let mut pieces = Vec::with_capacity(FIELDS.len());
        for field in FIELDS.iter().filter(|field| field.kind != Kind::Padding) {
            match find(field.id()) {
                Some(found) => pieces.push(piece(field, found, record.size)?),
                None if field.kind == Kind::OrZero => {}
                None => return Err(Unreadable::Lacks(name(field))),
            }
        }
        Ok(Self { record_len: record.size, copies: joined(pieces) })
    }

    /// The size of a record of the other build, in bytes.
    pub(super) fn record_len(&self) -> u32 {
        self.record_len
    }

    /// Converts `record`, which has [`record_len`](Self::record_len) bytes, to a record of this
    /// build. Fields that `record` does not have become zero.
    pub(super) fn convert(&self, record: &[u8]) -> Record {
        let mut converted = Record::zeroed();
        let bytes = bytemuck::bytes_of_mut(&mut converted);
        for Piece { from, to, len } in &self.copies {
            bytes[*to..to + len].copy_from_slice(&record[*from..from + len]);
        }
        converted
    }
}

/// A number may have more bytes in this build. The additional bytes are the upper ones, which come
/// last, and stay zero.
fn piece(field: &Field, found: &Entry, record_len: u32) -> Result<Piece, Unreadable> {
    const _: () = assert!(cfg!(target_endian = "little"));
    let fits = found.size == field.size || found.size < field.size && field.size <= 8;
    if !fits {
        return Err(Unreadable::Size(name(field)));
    }
    if found.offset.checked_add(found.size).is_none_or(|end| end > record_len) {
        return Err(Unreadable::Beyond);
    }
    Ok(Piece { from: found.offset as usize, to: field.offset as usize, len: found.size as usize })
}

/// Fields that are neighbours in both builds are copied together.
fn joined(mut pieces: Vec<Piece>) -> Vec<Piece> {
    pieces.sort_by_key(|piece| piece.to);
    let mut joined: Vec<Piece> = Vec::new();
    for piece in pieces {
        match joined.last_mut() {
            Some(last) if last.to + last.len == piece.to && last.from + last.len == piece.from => {
                last.len += piece.len;
            }
            _ => joined.push(piece),
        }
    }
    joined
}

fn name(field: &Field) -> String {
    format!("{}{}", field.path, field.name)
}

#[cfg(test)]
mod tests {
    use proxy_common::layout::ENTRIES;

    use super::*;

    /// A record in which all bytes differ.
    fn record(len: usize) -> Vec<u8> {
        (0..len).map(|at| (at * 7 + at / 256) as u8).collect()
    }

    fn field(path: &str, name: &str) -> Field {
        *FIELDS.iter().find(|field| (field.path, field.name) == (path, name)).unwrap()
    }

    fn range(field: &Field) -> std::ops::Range<usize> {
        field.offset as usize..(field.offset + field.size) as usize
    }

    #[test]
    fn the_own_layout_is_copied_at_once_but_for_the_padding() {
        let same = Conversion::new(&ENTRIES).unwrap();
        assert_eq!(same.record_len() as usize, size_of::<Record>());
        let from = record(size_of::<Record>());
        let to = same.convert(&from);
        let to = bytemuck::bytes_of(&to);
        for field in FIELDS {
            match field.kind {
                Kind::Padding => assert_eq!(to[range(&field)], vec![0; field.size as usize]),
                _ => assert_eq!(to[range(&field)], from[range(&field)], "{field:?}"),
            }
        }
        let paddings = FIELDS.iter().filter(|field| field.kind == Kind::Padding).count();
        assert_eq!(same.copies.len(), paddings + 1, "{same:?}");
    }

    #[test]
    fn fields_are_found_by_name_wherever_they_are() {
        // In the reverse order, with holes.
        let mut entries = ENTRIES;
        let mut end = 0;
        for entry in entries.iter_mut().rev().take(FIELDS.len()) {
            entry.offset = end + 3;
            end = entry.offset + entry.size;
        }
        entries[0].size = end;
        let from = record(end as usize);
        let to = Conversion::new(&entries).unwrap().convert(&from);
        for field in FIELDS.iter().filter(|field| field.kind != Kind::Padding) {
            let found = entries.iter().find(|entry| entry.name == field.id()).unwrap();
            let found = found.offset as usize..(found.offset + found.size) as usize;
            assert_eq!(bytemuck::bytes_of(&to)[range(field)], from[found], "{field:?}");
        }
    }

    #[test]
    fn what_is_not_there_is_zero_or_refused() {
        let without = |missing: Field| {
            let entries: Vec<_> =
                ENTRIES.iter().copied().filter(|entry| entry.name != missing.id()).collect();
            Conversion::new(&entries).map(|conversion| conversion.convert(&record(size_of::<Record>())))
        };
        let optional = field("flows[1].live.", "packets");
        assert_eq!(bytemuck::bytes_of(&without(optional).unwrap())[range(&optional)], [0; 8]);
        let refused = without(field("flows[0].fixed.", "to_ports")).unwrap_err();
        assert_eq!(refused, Unreadable::Lacks("flows[0].fixed.to_ports".to_owned()));
    }

    #[test]
    fn numbers_may_grow_but_nothing_shrinks() {
        let resized = |path, name, size: u32| {
            let field = field(path, name);
            let mut entries = ENTRIES;
            entries.iter_mut().find(|entry| entry.name == field.id()).unwrap().size = size;
            Conversion::new(&entries).map(|conversion| conversion.convert(&[0xff; size_of::<Record>()]))
        };
        let bytes = resized("flows[0].live.", "bytes", 4).unwrap().flows[0].live.bytes;
        assert_eq!(bytes, u64::from(u32::MAX));
        assert_eq!(resized("", "state", 1).unwrap().state, 0xff);
        for (path, name, size) in [("", "state", 8), ("", "relayed", 8), ("flows[0].live.", "window", 4)] {
            assert_eq!(resized(path, name, size).unwrap_err(), Unreadable::Size(format!("{path}{name}")));
        }
    }

    #[test]
    fn descriptions_that_cannot_be_are_refused() {
        assert_eq!(Conversion::new(&[]).unwrap_err(), Unreadable::Kind);
        let mut entries = ENTRIES;
        entries[0].offset += 1;
        assert_eq!(Conversion::new(&entries).unwrap_err(), Unreadable::Kind);
        for beyond in [size_of::<Record>() as u32, u32::MAX] {
            let mut entries = ENTRIES;
            entries[3].offset = beyond;
            assert_eq!(Conversion::new(&entries).unwrap_err(), Unreadable::Beyond);
        }
    }
}
