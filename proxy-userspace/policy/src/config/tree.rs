//! A YAML or JSON text as a tree of values that know their place in the text. JSON is read as YAML,
//! of which it is a part. Owns the syntax and its limits; knows no key and no meaning.

use std::borrow::Cow;
use std::collections::HashMap;
use std::rc::Rc;

use regex::Regex;
use saphyr_parser::{Event, Marker, Parser, ScalarStyle, Tag};

use super::error::Problem;

/// Deeper nesting is refused. An Envoy bootstrap needs about 25.
const MAX_DEPTH: usize = 64;
/// A text with more values, aliases counted in full, is refused.
const MAX_VALUES: usize = 4_000_000;
/// A map with more keys is refused. The formats know some tens.
const MAX_KEYS: usize = 1000;

/// 1-based, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    pub(super) line: usize,
    pub(super) column: usize,
}

impl From<Marker> for Position {
    fn from(marker: Marker) -> Self {
        Self { line: marker.line().max(1), column: marker.col() + 1 }
    }
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) at: Position,
    pub(super) value: Value,
    /// How many values this one holds, itself included.
    size: usize,
}

#[derive(Debug)]
pub(super) enum Value {
    Scalar {
        text: String,
        /// Neither quoted nor a block: may mean null, a boolean or a number.
        plain: bool,
        /// Has a tag, other than `!`. Envoy takes such a scalar for a plain one, also in quotes.
        tagged: bool,
    },
    List(Vec<Rc<Node>>),
    Map(Vec<Entry>),
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) at: Position,
    pub(super) value: Rc<Node>,
    /// The key has the tag `!ignore`: Envoy skips the entry, whose anchors are used elsewhere.
    pub(super) ignored: bool,
}

/// Reads the one document of `text`.
pub(super) fn parse(text: &str) -> Result<Rc<Node>, Problem> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let text = if text.trim_start().starts_with(['{', '[']) { join_surrogates(text) } else { text.into() };
    let end = end(&text);
    let mut builder = Builder::default();
    let mut parser = Parser::new_from_str(&text);
    while let Some(event) = parser.next_event() {
        let (event, span) = event.map_err(|error| {
            Problem::at(end.min((*error.marker()).into()), format!("bad YAML: {}", error.info()))
                .hint("indent with spaces, and check quotes and brackets here and on the lines above")
        })?;
        builder.take(event, end.min(span.start.into()))?;
    }
    builder.root.ok_or_else(|| {
        Problem::at(Position { line: 1, column: 1 }, "the file is empty")
            .hint("see examples/ and docs/configuration.md for configurations to begin with")
    })
}

/// The place after the last character. The parser puts the errors at the end of a text without a last
/// line break on the next line, which does not exist.
fn end(text: &str) -> Position {
    let text = text.replace("\r\n", "\n");
    let lines = text.split(['\n', '\r']);
    let last = lines.clone().next_back().unwrap_or_default();
    Position { line: lines.count(), column: last.chars().count() + 1 }
}

/// JSON writes a character beyond U+FFFF as two `\u` escapes, YAML as one `\U`.
fn join_surrogates(text: &str) -> Cow<'_, str> {
    // Each escape is one match, so that `\\ud83d` stays a backslash and five letters.
    let Ok(escape) = Regex::new(r"(?s)\\(?:u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})|.)")
    else {
        return text.into();
    };
    escape.replace_all(text, |found: &regex::Captures<'_>| {
        let half = |group| found.get(group).and_then(|digits| u32::from_str_radix(digits.as_str(), 16).ok());
        match (half(1), half(2)) {
            (Some(high), Some(low)) => {
                format!("\\U{:08x}", 0x10000 + ((high & 0x3ff) << 10) + (low & 0x3ff))
            }
            _ => found[0].to_owned(),
        }
    })
}

#[derive(Default)]
struct Builder {
    open: Vec<Open>,
    anchors: HashMap<usize, Rc<Node>>,
    root: Option<Rc<Node>>,
    values: usize,
}

/// A list or map whose end has not come yet.
struct Open {
    at: Position,
    anchor: usize,
    value: Value,
    /// A map's key that waits for its value.
    key: Option<Key>,
    size: usize,
}

struct Key {
    text: String,
    at: Position,
    ignored: bool,
}

impl Builder {
    fn take(&mut self, event: Event<'_>, at: Position) -> Result<(), Problem> {
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let tag = tag.as_deref();
                let is_bang = |tag: &Tag| tag.handle.is_empty() && tag.suffix == "!";
                let string = |tag: &Tag| is_bang(tag) || tag.is_yaml_core_schema() && tag.suffix == "str";
                let plain = style == ScalarStyle::Plain && !tag.is_some_and(string);
                let tagged = tag.is_some_and(|tag| !is_bang(tag));
                let ignored = tag.is_some_and(|tag| tag.handle == "!" && tag.suffix == "ignore");
                let is_key = self.expects_key();
                self.close(at, anchor, Value::Scalar { text: text.into_owned(), plain, tagged }, 1)?;
                if let Some(key) = self.open.last_mut().and_then(|open| open.key.as_mut()).filter(|_| is_key)
                {
                    key.ignored = ignored;
                }
                Ok(())
            }
            Event::SequenceStart(anchor, _) => self.open(at, anchor, Value::List(Vec::new())),
            Event::MappingStart(anchor, _) => self.open(at, anchor, Value::Map(Vec::new())),
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(open) => self.close(open.at, open.anchor, open.value, open.size),
                None => Ok(()),
            },
            Event::Alias(anchor) => match self.anchors.get(&anchor).map(Rc::clone) {
                Some(node) => self.add(node, at),
                None => Err(Problem::at(at, "this alias stands inside what it names")
                    .hint("write the value out instead")),
            },
            Event::DocumentStart(_) if self.root.is_some() => {
                Err(Problem::at(at, "a second document begins here")
                    .hint("keep one document; remove the `---`"))
            }
            Event::Nothing
            | Event::StreamStart
            | Event::StreamEnd
            | Event::DocumentStart(_)
            | Event::DocumentEnd => Ok(()),
        }
    }

    fn open(&mut self, at: Position, anchor: usize, value: Value) -> Result<(), Problem> {
        if self.open.len() >= MAX_DEPTH {
            return Err(Problem::at(at, format!("nested more than {MAX_DEPTH} deep"))
                .hint("no setting stands that deep; check brackets and indentation"));
        }
        if self.expects_key() {
            return Err(Problem::at(at, "a list or a map cannot be a key").hint("write `key: value`"));
        }
        self.open.push(Open { at, anchor, value, key: None, size: 1 });
        Ok(())
    }

    fn expects_key(&self) -> bool {
        self.open.last().is_some_and(|open| matches!(open.value, Value::Map(_)) && open.key.is_none())
    }

    fn close(&mut self, at: Position, anchor: usize, value: Value, size: usize) -> Result<(), Problem> {
        let node = Rc::new(Node { at, value, size });
        if anchor != 0 {
            self.anchors.insert(anchor, Rc::clone(&node));
        }
        self.add(node, at)
    }

    /// Puts a finished value into the innermost open list or map.
    fn add(&mut self, node: Rc<Node>, at: Position) -> Result<(), Problem> {
        let Some(open) = self.open.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        open.size = open.size.saturating_add(node.size);
        self.values = self.values.max(open.size);
        if self.values > MAX_VALUES {
            let text = format!("more than {MAX_VALUES} values, aliases counted in full");
            return Err(Problem::at(at, text).hint("use fewer aliases"));
        }
        match &mut open.value {
            Value::List(items) => items.push(node),
            Value::Map(entries) => match open.key.take() {
                Some(Key { text: key, at, ignored }) => {
                    if let Some(first) = entries.iter().find(|entry| entry.key == key) {
                        let text =
                            format!("`{key}` stands twice in this map, first on line {}", first.at.line);
                        return Err(Problem::at(at, text).hint("keep one of the two"));
                    }
                    if entries.len() >= MAX_KEYS {
                        let text = format!("more than {MAX_KEYS} keys in one map");
                        return Err(Problem::at(at, text).hint("no map of this file needs so many"));
                    }
                    entries.push(Entry { key, at, value: node, ignored });
                }
                None => match &node.value {
                    Value::Scalar { text, .. } => {
                        open.key = Some(Key { text: text.clone(), at, ignored: false });
                    }
                    Value::List(_) | Value::Map(_) => {
                        return Err(
                            Problem::at(at, "a list or a map cannot be a key").hint("write `key: value`")
                        );
                    }
                },
            },
            Value::Scalar { .. } => {}
        }
        Ok(())
    }
}
