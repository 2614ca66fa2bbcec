//! The header lines of one head, as parts of the bytes they came in, and the changes to them. An
//! unchanged line is never copied before it is written.

use std::borrow::Cow;

use smallvec::SmallVec;

use super::name::Known;
use super::tokens;

/// One header line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field<'b> {
    known: Option<Known>,
    /// As it was spelt.
    pub name: &'b [u8],
    /// Without the blanks around the value (RFC 9112, 5.1).
    pub value: Cow<'b, [u8]>,
}

/// The header lines of a head in their order. Names are compared in any case (RFC 9110, 5.1).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fields<'b> {
    /// Most heads have fewer lines than this, and need no memory of their own.
    list: SmallVec<[Field<'b>; 24]>,
}

/// How header names are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spelling {
    /// As Envoy and most proxies write names.
    LowerCase,
    /// As the sender spelt them.
    Preserved,
}

impl<'b> Fields<'b> {
    /// Adds a line at the end. `name` and `value` must be valid in a head.
    pub fn push(&mut self, name: &'b [u8], value: impl Into<Cow<'b, [u8]>>) {
        self.list.push(Field { known: Known::of(name), name, value: value.into() });
    }

    /// The same for a name that is known.
    pub fn append(&mut self, known: Known, value: impl Into<Cow<'b, [u8]>>) {
        self.list.push(Field { known: Some(known), name: known.into_str().as_bytes(), value: value.into() });
    }

    pub fn iter(&self) -> impl Iterator<Item = &Field<'b>> {
        self.list.iter()
    }

    pub fn contains(&self, known: Known) -> bool {
        self.get(known).is_some()
    }

    /// The value of the first line with this name.
    pub fn get(&self, known: Known) -> Option<&[u8]> {
        self.all(known).next()
    }

    /// The values of all lines with this name.
    pub fn all(&self, known: Known) -> impl Iterator<Item = &[u8]> {
        self.list.iter().filter(move |field| field.known == Some(known)).map(|field| &*field.value)
    }

    /// The values of all lines with a name that need not be known.
    pub fn named<'s>(&'s self, name: &'s str) -> impl Iterator<Item = &'s [u8]> {
        let wanted = move |field: &&Field<'_>| field.name.eq_ignore_ascii_case(name.as_bytes());
        self.list.iter().filter(wanted).map(|field| &*field.value)
    }

    /// Whether there is a line with one of these names.
    pub fn contains_any(&self, names: &[Known]) -> bool {
        self.list.iter().any(|field| field.known.is_some_and(|known| names.contains(&known)))
    }

    /// The tokens of all lines with this name (RFC 9110, 5.6.1), without the empty ones.
    pub fn tokens(&self, known: Known) -> impl Iterator<Item = &[u8]> {
        self.all(known).flat_map(tokens)
    }

    /// Whether a line with this name has the token, in any case.
    pub fn has_token(&self, known: Known, token: &[u8]) -> bool {
        self.tokens(known).any(|found| found.eq_ignore_ascii_case(token))
    }

    /// Puts the one value in the place of all lines with this name, or at the end.
    pub fn set(&mut self, known: Known, value: impl Into<Cow<'b, [u8]>>) {
        let Some(first) = self.list.iter().position(|field| field.known == Some(known)) else {
            return self.append(known, value);
        };
        self.list[first].value = value.into();
        let mut index = 0;
        self.list.retain(|field| {
            index += 1;
            index - 1 <= first || field.known != Some(known)
        });
    }

    pub fn remove(&mut self, known: Known) {
        self.list.retain(|field| field.known != Some(known));
    }

    pub fn remove_any(&mut self, names: &[Known]) {
        self.list.retain(|field| !field.known.is_some_and(|known| names.contains(&known)));
    }

    /// Keeps only the lines for which `keep` holds of the name.
    pub fn retain_names(&mut self, keep: impl Fn(&[u8]) -> bool) {
        self.list.retain(|field| keep(field.name));
    }

    /// Joins several lines to one, as Envoy does, so that an endpoint that reads only one line sees
    /// all values.
    pub fn join_lines(&mut self, known: Known) {
        if self.all(known).nth(1).is_some() {
            let value = joined(self.all(known));
            self.set(known, value);
        }
    }

    /// Appends to the one line of a header; an empty or absent one becomes just the value.
    pub fn append_to(&mut self, known: Known, separator: &[u8], value: impl Into<Cow<'b, [u8]>>) {
        let value = value.into();
        match self.get(known) {
            Some(old) if !old.is_empty() => {
                let longer = [old, separator, &*value].concat();
                self.set(known, longer);
            }
            _ => self.set(known, value),
        }
    }

    /// Writes the lines, each `name: value`, without the empty line after them.
    pub fn write(&self, spelling: Spelling, out: &mut Vec<u8>) {
        for field in &self.list {
            let start = out.len();
            out.extend_from_slice(field.name);
            if spelling == Spelling::LowerCase {
                out[start..].make_ascii_lowercase();
            }
            out.extend_from_slice(b": ");
            out.extend_from_slice(&field.value);
            out.extend_from_slice(b"\r\n");
        }
    }
}

/// The lines of one header joined to one value as Envoy does it: with commas between them, but none
/// beside an empty line.
pub fn joined<'a>(lines: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    with_commas(lines).flatten().copied().collect()
}

/// The parts of [`joined`].
pub fn with_commas<'a>(lines: impl Iterator<Item = &'a [u8]>) -> impl Iterator<Item = &'a [u8]> {
    lines
        .filter(|line| !line.is_empty())
        .enumerate()
        .flat_map(|(position, line)| [if position == 0 { &b""[..] } else { b"," }, line])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(lines: &[(&'static str, &'static str)]) -> Fields<'static> {
        let mut fields = Fields::default();
        for (name, value) in lines {
            fields.push(name.as_bytes(), value.as_bytes());
        }
        fields
    }

    fn text(fields: &Fields<'_>, spelling: Spelling) -> String {
        let mut out = Vec::new();
        fields.write(spelling, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_set_value_stands_where_the_first_line_stood() {
        let mut some = fields(&[("A", "1"), ("Via", "x"), ("b", "2"), ("VIA", "y")]);
        some.set(Known::Via, &b"z"[..]);
        some.set(Known::Host, &b"h"[..]);
        assert_eq!(text(&some, Spelling::LowerCase), "a: 1\r\nvia: z\r\nb: 2\r\nhost: h\r\n");
        assert_eq!(text(&some, Spelling::Preserved), "A: 1\r\nVia: z\r\nb: 2\r\nhost: h\r\n");
    }

    #[test]
    fn lines_are_joined_and_appended_to() {
        let mut some = fields(&[("via", "a"), ("Via", ""), ("via", "b, c")]);
        some.join_lines(Known::Via);
        assert_eq!(some.get(Known::Via), Some(&b"a,b, c"[..]));
        some.append_to(Known::Via, b"; ", &b"d"[..]);
        assert_eq!(some.all(Known::Via).collect::<Vec<_>>(), [b"a,b, c; d"]);
        some.append_to(Known::Te, b",", &b"trailers"[..]);
        assert_eq!(some.get(Known::Te), Some(&b"trailers"[..]));
    }

    #[test]
    fn tokens_of_all_lines_are_found_in_any_case() {
        let some = fields(&[("Connection", " a , ,B"), ("connection", "Upgrade")]);
        assert_eq!(some.tokens(Known::Connection).collect::<Vec<_>>(), [&b"a"[..], b"B", b"Upgrade"]);
        assert!(some.has_token(Known::Connection, b"upgrade") && some.has_token(Known::Connection, b"b"));
        assert!(!some.has_token(Known::Connection, b"up"));
    }
}
