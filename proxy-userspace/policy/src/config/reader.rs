//! Typed access to a [`tree`](super::tree) for the readers of the formats. A getter that does not
//! find the wanted value reports the problem with place and path, and returns `None`. The reader
//! goes on with a default, so that one run finds many problems. Whoever reads a map ends with
//! [`Map::finish`], which reports the keys that nobody asked for: nothing is dropped in silence.

use std::cell::{Cell, RefCell};
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::rc::Rc;
use std::time::Duration;

use super::Warning;
use super::error::Problem;
use super::tree::{Entry, Node, Position, Value};
use super::{protobuf_json, scalar};

/// The problems and warnings that reading one file finds.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) problems: RefCell<Vec<Problem>>,
    pub(super) warnings: RefCell<Vec<Warning>>,
    /// The file is Envoy's: [`protobuf_json`] says how values are written, a field may be null, a
    /// list may be one value, and `hashPolicy` stands for `hash_policy`.
    pub(super) protobuf_json: bool,
}

/// A value with its path, such as `listeners[0].routes[1].cluster`.
#[derive(Debug, Clone)]
pub(super) struct Field<'t> {
    node: &'t Node,
    path: String,
    /// The key's name in snake_case, which tells the field's type; empty in a list.
    name: &'static str,
    report: &'t Report,
}

impl<'t> Field<'t> {
    pub(super) fn root(node: &'t Node, report: &'t Report) -> Self {
        Self { node, path: String::new(), name: "", report }
    }

    /// The same value as a field of another name, and so of another type.
    pub(super) fn named(self, name: &'static str) -> Self {
        Self { name, ..self }
    }

    pub(super) fn at(&self) -> Position {
        self.node.at
    }

    pub(super) fn error(&self, message: impl Display, hint: impl Into<String>) {
        self.report.problem(self.node.at, &self.path, message, hint);
    }

    pub(super) fn warn(&self, text: impl Display) {
        self.report.warning(self.node.at, &self.path, text);
    }

    fn wrong_type(&self, wanted: &str, hint: impl Into<String>) {
        let found = match &self.node.value {
            Value::List(_) => "a list".to_owned(),
            Value::Map(_) => "a map".to_owned(),
            Value::Scalar { text, plain: true, .. } if scalar::is_null(text) => "empty".to_owned(),
            Value::Scalar { text, .. } => format!("`{}`", shorten(text)),
        };
        self.error(format_args!("must be {wanted}, is {found}"), hint);
    }

    /// The text of a scalar, and whether it is plain.
    pub(super) fn scalar(&self) -> Option<(&'t str, bool)> {
        match &self.node.value {
            Value::Scalar { text, plain, .. } => Some((text, *plain)),
            Value::List(_) | Value::Map(_) => None,
        }
    }

    /// A string, unless YAML reads it as something else.
    pub(super) fn is_string(&self) -> bool {
        if self.report.protobuf_json {
            return protobuf_json::is_string(self.node);
        }
        self.scalar().is_some_and(|(text, plain)| !plain || scalar::reads_as_string(text))
    }

    pub(super) fn is_map(&self) -> bool {
        matches!(self.node.value, Value::Map(_))
    }

    pub(super) fn string(&self) -> Option<&'t str> {
        match self.scalar() {
            Some((text, _)) if self.is_string() => Some(text),
            Some((text, _)) if !scalar::is_null(text) => {
                self.wrong_type("a string", format!("quote it: \"{text}\""));
                None
            }
            _ => {
                self.wrong_type("a string", "give it one value");
                None
            }
        }
    }

    /// A string of at least one character.
    pub(super) fn not_empty(&self) -> Option<&'t str> {
        let text = self.string()?;
        if text.is_empty() {
            self.error("must not be empty", "give it a value, or remove the key");
            return None;
        }
        Some(text)
    }

    /// A string that may stand in a header line.
    pub(super) fn header_text(&self) -> Option<&'t str> {
        let text = self.not_empty()?;
        if text.contains(|c| !(' '..='~').contains(&c)) {
            self.error("must be printable ASCII, to stand in a header", "leave other characters out");
            return None;
        }
        Some(text)
    }

    pub(super) fn boolean(&self) -> Option<bool> {
        let value = if self.report.protobuf_json {
            protobuf_json::unwrap(self.node, self.name, protobuf_json::boolean)
        } else {
            self.scalar().and_then(|(text, plain)| scalar::boolean(text).filter(|_| plain))
        };
        if value.is_none() {
            self.wrong_type("true or false", "write true or false, without quotes");
        }
        value
    }

    /// A whole number; it may be quoted, as protobuf's JSON form allows.
    pub(super) fn unsigned(&self, range: RangeInclusive<u64>) -> Option<u64> {
        let (low, high) = (*range.start(), *range.end());
        let number = if self.report.protobuf_json {
            protobuf_json::unwrap(self.node, self.name, protobuf_json::unsigned)
        } else {
            self.scalar().and_then(|(text, _)| text.parse().ok())
        };
        let number = number.filter(|number| range.contains(number));
        if number.is_none() {
            self.wrong_type(&format!("a whole number from {low} to {high}"), "write a number in that range");
        }
        number
    }

    pub(super) fn percent(&self) -> Option<f64> {
        let number = if self.report.protobuf_json {
            protobuf_json::unwrap(self.node, self.name, protobuf_json::number)
        } else {
            self.scalar().and_then(|(text, _)| text.parse().ok())
        };
        let number = number.filter(|n| (0.0..=100.0).contains(n));
        if number.is_none() {
            self.wrong_type("a number from 0 to 100", "write a percentage without the sign, such as 50");
        }
        number
    }

    /// `250ms`, `15s`, `0.25s`, `5m`, `1h`; for Envoy, seconds only.
    pub(super) fn duration(&self) -> Option<Duration> {
        let text = self.scalar().map_or("", |(text, _)| text);
        let (duration, hint) = if self.report.protobuf_json {
            (protobuf_json::duration(self.node), protobuf_json::duration_hint(text))
        } else {
            let hint = "write a number and its unit: 250ms, 15s, 0.25s, 5m or 1h";
            (scalar::duration(text), hint.to_owned())
        };
        if duration.is_none() {
            self.wrong_type("a duration", hint);
        }
        duration
    }

    /// A duration of which 0 means "no limit".
    pub(super) fn limit(&self) -> Option<Option<Duration>> {
        self.duration().map(|limit| Some(limit).filter(|limit| !limit.is_zero()))
    }

    /// One of some words, in the case given; for Envoy, in any case or by its number.
    pub(super) fn one_of<T: Copy>(&self, words: &[(&str, T)]) -> Option<T> {
        self.word(words, |a, b| a == b)
    }

    /// One of some words, in any case.
    pub(super) fn one_of_any_case<T: Copy>(&self, words: &[(&str, T)]) -> Option<T> {
        self.word(words, str::eq_ignore_ascii_case)
    }

    /// The word of an enum of protobuf in upper case, whether Steer supports it or not; reports
    /// nothing.
    pub(super) fn enum_word(&self) -> Option<&'static str> {
        protobuf_json::enum_word(self.name, self.node)
    }

    fn word<T: Copy>(&self, words: &[(&str, T)], same: fn(&str, &str) -> bool) -> Option<T> {
        let text = self.scalar().map(|(text, _)| text);
        let (found, same) = if self.report.protobuf_json {
            (self.enum_word(), str::eq_ignore_ascii_case as fn(&str, &str) -> bool)
        } else {
            (text, same)
        };
        let hit = found.and_then(|found| words.iter().find(|(word, _)| same(word, found)));
        if hit.is_none() {
            let names: Vec<_> = words.iter().map(|(word, _)| *word).collect();
            let hint = match text.and_then(|text| nearest(text, names.iter().copied())) {
                Some(name) => format!("did you mean `{name}`?"),
                None => format!("write one of {}", names.join(", ")),
            };
            self.wrong_type(&format!("one of {}", names.join(", ")), hint);
        }
        hit.map(|(_, value)| *value)
    }

    /// The items of a list; empty, and reported, if it is none. For Envoy, one value is a list, too,
    /// and a list in a list stands for its items.
    pub(super) fn items(&self) -> Vec<Self> {
        let Value::List(items) = &self.node.value else {
            if self.report.protobuf_json {
                return vec![self.clone().named("")];
            }
            self.wrong_type("a list", "write each item on its own line after `- `");
            return Vec::new();
        };
        let item = |(index, node): (usize, &'t Rc<Node>)| Self {
            node,
            path: format!("{}[{index}]", self.path),
            name: "",
            report: self.report,
        };
        let items = items.iter().enumerate().map(item);
        if self.report.protobuf_json {
            return items.flat_map(|item| if item.is_list() { item.items() } else { vec![item] }).collect();
        }
        items.collect()
    }

    fn is_list(&self) -> bool {
        matches!(self.node.value, Value::List(_))
    }

    pub(super) fn map(&self) -> Option<Map<'t>> {
        let Value::Map(entries) = &self.node.value else {
            self.wrong_type("a map", "write `key: value` lines, indented below it");
            return None;
        };
        let used = entries.iter().map(|entry| Cell::new(self.report.is_ignored(entry))).collect();
        Some(Map { field: self.clone(), entries, used, asked: RefCell::default() })
    }

    /// Looks at a key without reading the map; reports nothing.
    pub(super) fn peek(&self, name: &'static str) -> Option<Self> {
        let Value::Map(entries) = &self.node.value else { return None };
        let entry = entries.iter().find(|entry| self.report.is(entry, name))?;
        self.report.has_value(entry).then(|| self.child(entry, name))
    }

    /// The first item, if this is a list; reports nothing.
    pub(super) fn first(&self) -> Option<Self> {
        match &self.node.value {
            Value::List(_) => self.items().into_iter().next(),
            _ => None,
        }
    }

    fn child(&self, entry: &'t Entry, name: &'static str) -> Self {
        Self { node: &entry.value, path: self.join(&entry.key), name, report: self.report }
    }

    fn join(&self, key: &str) -> String {
        let key = shorten(key);
        if self.path.is_empty() { key } else { format!("{}.{key}", self.path) }
    }
}

impl Report {
    fn problem(&self, at: Position, path: &str, message: impl Display, hint: impl Into<String>) {
        let message = if path.is_empty() { message.to_string() } else { format!("{path}: {message}") };
        self.problems.borrow_mut().push(Problem::at(at, message).hint(hint));
    }

    fn warning(&self, at: Position, path: &str, text: impl Display) {
        let text = format!("{path}: {text}");
        self.warnings.borrow_mut().push(Warning { line: at.line, column: at.column, text });
    }

    fn is(&self, entry: &Entry, name: &str) -> bool {
        let same = entry.key == name || self.protobuf_json && is_camel_case_of(&entry.key, name);
        same && !self.is_ignored(entry)
    }

    fn is_ignored(&self, entry: &Entry) -> bool {
        self.protobuf_json && entry.ignored
    }

    fn has_value(&self, entry: &Entry) -> bool {
        !(self.protobuf_json && protobuf_json::is_null(&entry.value))
    }
}

/// A map of which each key must be asked for.
#[derive(Debug)]
#[must_use = "a map that is not finished hides unknown keys"]
pub(super) struct Map<'t> {
    pub(super) field: Field<'t>,
    entries: &'t [Entry],
    used: Vec<Cell<bool>>,
    asked: RefCell<Vec<&'static str>>,
}

impl<'t> Map<'t> {
    fn entry(&self, name: &'static str) -> Option<&'t Entry> {
        self.asked.borrow_mut().push(name);
        let index = self.entries.iter().position(|entry| self.field.report.is(entry, name))?;
        self.used[index].set(true);
        Some(&self.entries[index]).filter(|entry| self.field.report.has_value(entry))
    }

    pub(super) fn get(&self, name: &'static str) -> Option<Field<'t>> {
        self.entry(name).map(|entry| self.field.child(entry, name))
    }

    /// `get`, for a key that must be there.
    pub(super) fn require(&self, name: &'static str, example: &str) -> Option<Field<'t>> {
        let field = self.get(name);
        if field.is_none() {
            self.field.error(format_args!("`{name}` is missing"), format!("add `{name}: {example}`"));
        }
        field
    }

    pub(super) fn boolean(&self, name: &'static str) -> Option<bool> {
        self.get(name)?.boolean()
    }

    /// Keys that cannot change what a client or an endpoint sees.
    pub(super) fn harmless(&self, names: &[&'static str]) {
        for name in names {
            self.entry(name);
        }
    }

    /// Warns of fields that Steer does not honour, where ignoring them does no harm to correctness.
    pub(super) fn warn(&self, names: &[&'static str], text: &str) {
        for name in names {
            if let Some(entry) = self.entry(name) {
                self.field.report.warning(entry.at, &self.field.join(&entry.key), text);
            }
        }
    }

    /// Like [`Map::warn`], but says nothing of `false`, the default.
    pub(super) fn warn_if_true(&self, names: &[&'static str], text: &str) {
        for name in names {
            if let Some(field) = self.get(name)
                && field.boolean() == Some(true)
            {
                field.warn(text);
            }
        }
    }

    /// Refuses fields that Steer must not ignore: without them, requests would go elsewhere or look
    /// different.
    pub(super) fn refuse(&self, names: &[&'static str], why: &str, hint: &str) {
        for name in names {
            if let Some(entry) = self.entry(name) {
                self.field.report.problem(entry.at, &self.field.join(&entry.key), why, hint);
            }
        }
    }

    /// Like [`Map::refuse`], but accepts `false`, the default.
    pub(super) fn refuse_true(&self, names: &[&'static str], why: &str, hint: &str) {
        for name in names {
            if let Some(field) = self.get(name)
                && field.boolean() == Some(true)
            {
                field.error(why, hint);
            }
        }
    }

    /// Reports every key that nobody asked for.
    pub(super) fn finish(self) {
        let asked = self.asked.borrow();
        for (entry, _) in self.entries.iter().zip(&self.used).filter(|(_, used)| !used.get()) {
            let is = |name: &&&'static str| self.field.report.is(entry, name);
            let (message, hint) = if let Some(name) = asked.iter().find(is) {
                (format!("stands twice in this map, also as `{name}`"), "keep one of the two".to_owned())
            } else if entry.key == "<<" {
                let hint = "write the keys out, or use an alias for the whole value";
                ("merge keys are not read, by Envoy neither".to_owned(), hint.to_owned())
            } else {
                let hint = match nearest(&entry.key, asked.iter().copied()) {
                    Some(name) => format!("did you mean `{name}`?"),
                    None => "remove it; docs/configuration.md lists what is read here".to_owned(),
                };
                ("unknown key, Steer does not read it".to_owned(), hint)
            };
            self.field.report.problem(entry.at, &self.field.join(&entry.key), message, hint);
        }
    }
}

/// The name that someone who wrote `word` most likely meant.
pub(super) fn nearest<'n>(word: &str, names: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    let word = word.to_lowercase();
    names
        .map(|name| (strsim::damerau_levenshtein(&word, &name.to_lowercase()), name))
        .filter(|(distance, name)| *distance <= 1 + name.len() / 5)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

fn is_camel_case_of(key: &str, name: &str) -> bool {
    let mut key = key.chars();
    let mut upper = false;
    for c in name.chars() {
        if c == '_' {
            upper = true;
            continue;
        }
        let want = if upper { c.to_ascii_uppercase() } else { c };
        upper = false;
        if key.next() != Some(want) {
            return false;
        }
    }
    key.next().is_none()
}

/// Long enough to recognise, short enough for one line.
fn shorten(text: &str) -> String {
    const SHOWN: usize = 60;
    let line: String = text.chars().take(SHOWN).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(SHOWN).is_some() { line + "…" } else { line }
}
