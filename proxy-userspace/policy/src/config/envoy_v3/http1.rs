//! A v3 `Http1ProtocolOptions`, which connection managers and clusters have.

use super::super::re2;
use super::super::reader::{Field, Map};
use super::typed;

/// What a connection manager's options say; the defaults are Envoy's and Steer's.
#[derive(Debug, Default)]
pub(super) struct Downstream {
    pub(super) accept_http_10: bool,
    pub(super) preserve_case: bool,
}

pub(super) fn downstream(field: &Field<'_>) -> Downstream {
    let Some(map) = field.map() else { return Downstream::default() };
    // Steer forwards trailers in any case.
    map.harmless(&["enable_trailers"]);
    if let Some(allow) = map.get("allow_absolute_url")
        && allow.boolean() == Some(false)
    {
        allow.warn("not honoured: Steer accepts absolute URLs, as HTTP/1.1 demands");
    }
    let accept_http_10 = map.boolean("accept_http_10").unwrap_or_default();
    let preserve_case = map.get("header_key_format").is_some_and(|format| header_key_format(&format));
    for matcher in map.get("ignore_http_11_upgrade").map(|list| list.items()).unwrap_or_default() {
        ignored_upgrade(&matcher);
    }
    map.finish();
    Downstream { accept_http_10, preserve_case }
}

/// A cluster's options, of which none changes what Steer does.
pub(super) fn upstream(map: Map<'_>) {
    // The first two concern requests of clients. Steer forwards trailers in any case.
    map.harmless(&["accept_http_10", "allow_absolute_url", "enable_trailers"]);
    if let Some(format) = map.get("header_key_format") {
        header_key_format(&format);
    }
    map.finish();
}

/// Whether header names keep their letter case.
fn header_key_format(field: &Field<'_>) -> bool {
    let Some(map) = field.map() else { return false };
    map.refuse(
        &["proper_case_words"],
        "Steer writes header names in lower case, or as their sender wrote them",
        "use stateful_formatter with PreserveCaseFormatterConfig, or remove header_key_format",
    );
    let formatter = map.get("stateful_formatter");
    map.finish();
    formatter.is_some_and(|formatter| preserves_case(&formatter).is_some())
}

/// Reads the typed extension; `None` and reported if it is not `preserve_case`.
fn preserves_case(field: &Field<'_>) -> Option<()> {
    let map = field.map()?;
    map.harmless(&["name"]);
    let config = map.require(
        "typed_config",
        "{ \"@type\": type.googleapis.com/\
         envoy.extensions.http.header_formatters.preserve_case.v3.PreserveCaseFormatterConfig }",
    );
    map.finish();
    let hint = "use PreserveCaseFormatterConfig, or remove header_key_format";
    let (_, map) = typed(&config?, &["PreserveCaseFormatterConfig"], hint)?;
    // No client may depend on a reason phrase (RFC 9112, 4).
    map.harmless(&["forward_reason_phrase"]);
    if let Some(format) = map.get("formatter_type_on_envoy_headers") {
        format.one_of(&[("DEFAULT", ())]);
    }
    map.finish();
    Some(())
}

/// Checks a matcher of upgrades that are to be ignored. Steer ignores every upgrade but websocket
/// anyway, so the matcher has no effect, unless the matcher covers websocket: Envoy then forwards
/// the request without its `Upgrade`, which Steer does not do.
fn ignored_upgrade(field: &Field<'_>) {
    let Some(map) = field.map() else { return };
    // Clients write websocket in any case, so a matcher of any spelling counts.
    map.harmless(&["ignore_case"]);
    map.refuse(&["custom"], "Steer has no such matchers", "use exact, prefix, suffix or contains");
    let kinds = ["exact", "prefix", "suffix", "contains", "safe_regex"];
    let found: Vec<_> = kinds.into_iter().filter_map(|kind| Some((kind, map.get(kind)?))).collect();
    let refused = field.peek("custom").is_some();
    map.finish();
    let [(kind, value)] = &found[..] else {
        if !refused {
            let kinds = kinds.join(", ");
            field.error(
                format_args!("must have exactly one of {kinds}, has {}", found.len()),
                "write one matcher for each list item",
            );
        }
        return;
    };
    if matches_websocket(kind, value) == Some(true) {
        value.error(
            "covers websocket, and Steer cannot forward such a request without its `Upgrade`",
            "leave websocket out; routes without websocket in upgrade_configs refuse it with 403",
        );
    }
}

fn matches_websocket(kind: &str, value: &Field<'_>) -> Option<bool> {
    const WEBSOCKET: &str = "websocket";
    if kind == "safe_regex" {
        return safe_regex_matches(value, WEBSOCKET);
    }
    let text = value.not_empty()?.to_lowercase();
    Some(match kind {
        "exact" => WEBSOCKET == text,
        "prefix" => WEBSOCKET.starts_with(&text),
        "suffix" => WEBSOCKET.ends_with(&text),
        _ => WEBSOCKET.contains(&text),
    })
}

/// Whether the regex matches the whole text in any letter case.
fn safe_regex_matches(field: &Field<'_>, text: &str) -> Option<bool> {
    let map = field.map()?;
    map.harmless(&["google_re2"]);
    let regex = map.require("regex", "TLS/.*");
    map.finish();
    let regex = regex?;
    match re2::compile(&format!("(?i)^(?:{})$", regex.not_empty()?)) {
        Ok(compiled) => Some(compiled.is_match(text.as_bytes())),
        Err(error) => {
            regex.error(format_args!("bad regex: {error}"), "write it in RE2's syntax");
            None
        }
    }
}
