//! How Envoy v3 reads a file: its YAML has the booleans of YAML 1.1 and the integers of C, and what
//! comes of that is read as the JSON of protobuf, with its older spellings. Envoy 1.39 was asked
//! about each form; `tests/spellings.rs` has the answers.

use std::time::Duration;

use super::scalar;
use super::tree::{Entry, Node, Value};

/// Integers beyond this one do not fit a JSON number, so Envoy makes strings of them.
const MAX_EXACT: u64 = 1 << 53;

/// Fields that are messages with one `value`, such as `google.protobuf.BoolValue`. Envoy takes
/// `{ value: true }` for these beside `true`, but for no other field.
const WRAPPERS: [&str; 19] = [
    "add_user_agent",
    "allow_absolute_url",
    "bind_to_port",
    "case_sensitive",
    "enabled",
    "freebind",
    "generate_request_id",
    "load_balancing_weight",
    "max_headers_count",
    "max_request_headers_kb",
    "maximum_ring_size",
    "minimum_ring_size",
    "normalize_path",
    "stream_error_on_invalid_http_message",
    "table_size",
    "transparent",
    "use_original_dst",
    "use_proxy_proto",
    "use_remote_address",
];

/// The words of each enum by their numbers.
const ENUMS: [(&str, &[&str]); 13] = [
    ("codec_type", &["AUTO", "HTTP1", "HTTP2", "HTTP3"]),
    (
        "forward_client_cert_details",
        &["SANITIZE", "FORWARD_ONLY", "APPEND_FORWARD", "SANITIZE_SET", "ALWAYS_FORWARD_ONLY"],
    ),
    ("formatter_type_on_envoy_headers", &["DEFAULT", "PROPER_CASE"]),
    ("hash_function", &["XX_HASH", "MURMUR_HASH_2"]),
    (EXTENSION_HASH_FUNCTION, &["DEFAULT_HASH", "XX_HASH", "MURMUR_HASH_2"]),
    ("headers_with_underscores_action", &["ALLOW", "REJECT_REQUEST", "DROP_HEADER"]),
    ("health_status", &["UNKNOWN", "HEALTHY", "UNHEALTHY", "DRAINING", "TIMEOUT", "DEGRADED"]),
    (
        "lb_policy",
        &[
            "ROUND_ROBIN",
            "LEAST_REQUEST",
            "RING_HASH",
            "RANDOM",
            "ORIGINAL_DST_LB",
            "MAGLEV",
            "CLUSTER_PROVIDED",
            "LOAD_BALANCING_POLICY_CONFIG",
        ],
    ),
    (
        "path_with_escaped_slashes_action",
        &[
            "IMPLEMENTATION_SPECIFIC_DEFAULT",
            "KEEP_UNCHANGED",
            "REJECT_REQUEST",
            "UNESCAPE_AND_REDIRECT",
            "UNESCAPE_AND_FORWARD",
        ],
    ),
    ("protocol", &["TCP", "UDP"]),
    ("require_tls", &["NONE", "EXTERNAL_ONLY", "ALL"]),
    ("server_header_transformation", &["OVERWRITE", "APPEND_IF_ABSENT", "PASS_THROUGH"]),
    ("type", &["STATIC", "STRICT_DNS", "LOGICAL_DNS", "EDS", "ORIGINAL_DST"]),
];

/// `hash_function` of the extension RingHash has other numbers than that of `ring_hash_lb_config`.
pub(super) const EXTENSION_HASH_FUNCTION: &str = "RingHash.hash_function";

/// A scalar, as Envoy's YAML gives it to the JSON of protobuf.
enum Scalar<'t> {
    Bool(bool),
    Integer(i64),
    /// Also a number with a fraction or an exponent.
    Text(&'t str),
}

impl<'t> Scalar<'t> {
    fn new(text: &'t str, plain: bool) -> Self {
        if !plain {
            return Self::Text(text);
        }
        match (yaml_boolean(text), yaml_integer(text)) {
            (Some(value), _) => Self::Bool(value),
            (None, Some(number)) if !is_long_decimal(text, number) => Self::Integer(number),
            _ => Self::Text(text),
        }
    }
}

/// Whether Envoy's YAML makes the string `text` of this integer. (Of a long octal or hexadecimal
/// one it makes a string with other digits. Steer wants quotes there.)
fn is_long_decimal(text: &str, number: i64) -> bool {
    number.unsigned_abs() > MAX_EXACT && number.to_string() == text
}

/// What `read` makes of a scalar, or of the one in a wrapper; an empty wrapper is the default.
pub(super) fn unwrap<T: Default>(
    node: &Node,
    field: &str,
    read: impl Fn(&str, bool) -> Option<T>,
) -> Option<T> {
    let entries = match &node.value {
        Value::Scalar { text, plain, tagged } => return read(text, *plain || *tagged),
        Value::Map(entries) if WRAPPERS.contains(&field) => entries,
        Value::Map(_) | Value::List(_) => return None,
    };
    let mut entries = entries.iter().filter(|entry| !entry.ignored);
    match (entries.next(), entries.next()) {
        (None, _) => Some(T::default()),
        (Some(Entry { key, value, .. }), None) if key == "value" => match &value.value {
            _ if is_null(value) => Some(T::default()),
            Value::Scalar { text, plain, tagged } => read(text, *plain || *tagged),
            Value::Map(_) | Value::List(_) => None,
        },
        _ => None,
    }
}

/// Whether Envoy takes a value for an absent one.
pub(super) fn is_null(node: &Node) -> bool {
    matches!(&node.value, Value::Scalar { text, plain: true, .. } if scalar::is_null(text))
}

/// Whether Envoy takes a value for a string.
pub(super) fn is_string(node: &Node) -> bool {
    let text = |text: &str, plain| matches!(Scalar::new(text, plain), Scalar::Text(_));
    unwrap(node, "", |scalar, plain| Some(text(scalar, plain))) == Some(true) && !is_null(node)
}

pub(super) fn boolean(text: &str, plain: bool) -> Option<bool> {
    let text = match Scalar::new(text, plain) {
        Scalar::Bool(value) => return Some(value),
        Scalar::Integer(_) => return None,
        Scalar::Text(text) => text.to_ascii_lowercase(),
    };
    match &text[..] {
        "true" | "t" | "yes" | "y" | "1" => Some(true),
        "false" | "f" | "no" | "n" | "0" => Some(false),
        _ => None,
    }
}

pub(super) fn unsigned(text: &str, plain: bool) -> Option<u64> {
    match Scalar::new(text, plain) {
        Scalar::Integer(number) => u64::try_from(number).ok(),
        Scalar::Text(text) if text.trim() == text => text.parse().ok().or_else(|| whole(float(text)?)),
        Scalar::Text(_) | Scalar::Bool(_) => None,
    }
}

pub(super) fn number(text: &str, plain: bool) -> Option<f64> {
    match Scalar::new(text, plain) {
        Scalar::Integer(number) => Some(f64::from(i32::try_from(number).ok()?)),
        Scalar::Text(text) => float(text.trim()),
        Scalar::Bool(_) => None,
    }
}

/// The word of an enum that a value is, in any case or by its number. `None` if the enum of `field`
/// has no such word.
pub(super) fn enum_word(field: &str, node: &Node) -> Option<&'static str> {
    let (_, words) = ENUMS.iter().find(|(name, _)| *name == field)?;
    let same = |text: &str| words.iter().position(|word| word.eq_ignore_ascii_case(text));
    let index = unwrap(node, "", |text, plain| match Scalar::new(text, plain) {
        Scalar::Integer(number) => usize::try_from(number).ok(),
        Scalar::Text(text) => same(text).or_else(|| text.trim().parse().ok()),
        Scalar::Bool(_) => None,
    });
    words.get(index?).copied()
}

/// `15s` or `0.25s`, or a map with `seconds` and `nanos`.
pub(super) fn duration(node: &Node) -> Option<Duration> {
    match &node.value {
        Value::Scalar { text, .. } if text.ends_with(|c: char| c.is_ascii_digit() || c == 's') => {
            scalar::duration(text).filter(|_| !text.ends_with("ms"))
        }
        Value::Map(entries) => {
            let (mut seconds, mut nanoseconds) = (0, 0);
            for entry in entries.iter().filter(|entry| !entry.ignored) {
                let part = unwrap(&entry.value, "", unsigned).or(is_null(&entry.value).then_some(0))?;
                match &entry.key[..] {
                    "seconds" => seconds = part,
                    "nanos" => nanoseconds = u32::try_from(part).ok()?,
                    _ => return None,
                }
            }
            scalar::seconds_and_nanoseconds(seconds, nanoseconds)
        }
        Value::Scalar { .. } | Value::List(_) => None,
    }
}

/// How Envoy wants a duration that is written in the way of Steer's own format.
pub(super) fn duration_hint(text: &str) -> String {
    match scalar::duration(text) {
        Some(duration) => format!("Envoy takes seconds only: {}s", duration.as_secs_f64()),
        None => "write seconds, such as 15s or 0.25s".to_owned(),
    }
}

/// The booleans of YAML 1.1, in lower case, upper case, or with a capital.
fn yaml_boolean(text: &str) -> Option<bool> {
    let lower = text.to_ascii_lowercase();
    let rest = text.get(1..).unwrap_or_default();
    let regular = text == lower || text == text.to_ascii_uppercase() || rest == rest.to_ascii_lowercase();
    match &lower[..] {
        "y" | "yes" | "true" | "on" if regular => Some(true),
        "n" | "no" | "false" | "off" if regular => Some(false),
        _ => None,
    }
}

/// An integer as C writes it: 8080, 017620 or 0x1f90, with or without a sign.
fn yaml_integer(text: &str) -> Option<i64> {
    let (negative, digits) = match text.strip_prefix(['+', '-']) {
        Some(digits) => (text.starts_with('-'), digits),
        None => (false, text),
    };
    let (digits, radix) = match digits.strip_prefix("0x").or(digits.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (digits, 8),
        None => (digits, 10),
    };
    if !digits.starts_with(|c: char| c.is_ascii_hexdigit()) {
        return None;
    }
    let number = i64::from_str_radix(digits, radix).ok()?;
    Some(if negative { -number } else { number })
}

fn float(text: &str) -> Option<f64> {
    match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        Some(digits) => u32::from_str_radix(digits, 16).ok().map(f64::from),
        None => text.parse().ok(),
    }
}

fn whole(number: f64) -> Option<u64> {
    // Up to ten digits, so that no digit is lost; no field takes more.
    let fits = (0.0..=f64::from(u32::MAX)).contains(&number) && number.fract() == 0.0;
    if fits { format!("{:.0}", number.abs()).parse().ok() } else { None }
}
