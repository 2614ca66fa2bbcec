//! What a scalar means in the native format and in Envoy's v1: YAML's core schema, and durations
//! with a unit. `protobuf_json` has the rules of Envoy v3.

use std::time::Duration;

/// Longer durations are refused: about 136 years.
const MAX_SECONDS: u64 = u32::MAX as u64;

/// Whether YAML's core schema takes an unquoted scalar for a string.
pub(super) fn reads_as_string(text: &str) -> bool {
    !(is_null(text) || boolean(text).is_some() || is_number(text))
}

/// Whether an unquoted scalar stands for no value at all.
pub(super) fn is_null(text: &str) -> bool {
    matches!(text, "" | "~" | "null" | "Null" | "NULL")
}

pub(super) fn boolean(text: &str) -> Option<bool> {
    match text {
        "true" | "True" | "TRUE" => Some(true),
        "false" | "False" | "FALSE" => Some(false),
        _ => None,
    }
}

fn is_number(text: &str) -> bool {
    let digits = text.bytes().any(|byte| byte.is_ascii_digit());
    digits && (text.parse::<f64>().is_ok() || text.starts_with("0x") || text.starts_with("0o"))
}

/// `250ms`, `15s`, `0.25s`, `5m`, `1h`.
pub(super) fn duration(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(digits);
    let nanoseconds_per_unit: u128 = match unit {
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if whole.len() > 12 || fraction.is_empty() || fraction.len() > 9 {
        return None;
    }
    let whole: u128 = whole.parse().ok()?;
    let scale = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    let fraction: u128 = fraction.parse().ok()?;
    let nanoseconds = whole * nanoseconds_per_unit + fraction * nanoseconds_per_unit / scale;
    let rest = u32::try_from(nanoseconds % 1_000_000_000).ok()?;
    seconds_and_nanoseconds(u64::try_from(nanoseconds / 1_000_000_000).ok()?, rest)
}

/// `None` for a duration that is too long, or that has a second or more of nanoseconds.
pub(super) fn seconds_and_nanoseconds(seconds: u64, nanoseconds: u32) -> Option<Duration> {
    let fits = seconds <= MAX_SECONDS && nanoseconds < 1_000_000_000;
    fits.then(|| Duration::new(seconds, nanoseconds))
}
