//! `hash_policy`, which the native format and Envoy v3 write alike; the native one also has short
//! forms for the common cases.

use std::str::FromStr;

use http::HeaderName;

use super::reader::{Field, Map};
use super::{CookiePolicy, HashPolicy, HashSource, HeaderSource, RegexRewrite, re2};

/// Request headers that are always gone by the time a hash is taken, as in Envoy.
const REMOVED: [&str; 12] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "transfer-encoding",
    "upgrade",
    "x-envoy-force-trace",
    "x-envoy-internal",
    "x-envoy-ip-tags",
    "x-envoy-max-retries",
    "x-envoy-retry-on",
    "x-envoy-upstream-rq-timeout-ms",
    "x-forwarded-client-cert",
];

const KINDS: [&str; 4] = ["header", "cookie", "query_parameter", "connection_properties"];

/// Reads a list of policies. `short_forms`: `{ header: NAME }`, `{ cookie: NAME }`,
/// `{ query_parameter: NAME }` and `{ source_ip: true }` are understood too.
pub(super) fn read(list: &Field<'_>, short_forms: bool) -> Vec<HashPolicy> {
    list.items().iter().filter_map(|item| policy(item, short_forms)).collect()
}

/// `None` also for `source_ip: false`, which to Envoy is no policy at all: its `terminal` has no
/// effect either.
fn policy(field: &Field<'_>, short_forms: bool) -> Option<HashPolicy> {
    let map = field.map()?;
    let terminal = map.boolean("terminal").unwrap_or(false);
    map.refuse(
        &["filter_state"],
        "Steer has no filters, so there is no filter state to hash",
        "use header, cookie, query_parameter or connection_properties",
    );
    let mut found: Vec<Field<'_>> = KINDS.iter().filter_map(|kind| map.get(kind)).collect();
    let short_source_ip = if short_forms { map.get("source_ip") } else { None };
    let refused = field.peek("filter_state").is_some();
    let count = found.len() + usize::from(short_source_ip.is_some());
    if count != 1 && !refused {
        let kinds = KINDS.join(", ");
        field.error(
            format_args!("must have exactly one of {kinds}, has {count}"),
            "write one policy for each list item",
        );
    }
    map.finish();
    let source = match (found.pop(), short_source_ip) {
        (_, Some(value)) => value.boolean()?.then_some(HashSource::SourceIp),
        (Some(value), None) => source(field, &value, short_forms),
        (None, None) => None,
    }?;
    Some(HashPolicy { source, terminal })
}

fn source(policy: &Field<'_>, value: &Field<'_>, short_forms: bool) -> Option<HashSource> {
    let is = |kind: &'static str| policy.peek(kind).is_some();
    let short = short_forms && value.scalar().is_some();
    if is("header") {
        if short { plain_header(value) } else { header(value.map()?) }
    } else if is("cookie") {
        if short { plain_cookie(cookie_text(value, true)?) } else { cookie(value.map()?) }
    } else if is("query_parameter") {
        if short {
            return Some(HashSource::QueryParameter { name: value.not_empty()?.to_owned() });
        }
        let map = value.map()?;
        let name = map.require("name", "room").and_then(|name| name.not_empty());
        map.finish();
        Some(HashSource::QueryParameter { name: name?.to_owned() })
    } else {
        let map = value.map()?;
        let source_ip = map.boolean("source_ip").unwrap_or(false);
        map.finish();
        source_ip.then_some(HashSource::SourceIp)
    }
}

/// A header without `regex_rewrite`.
pub(super) fn plain_header(name: &Field<'_>) -> Option<HashSource> {
    Some(HashSource::Header { name: header_source(name)?, rewrite: None })
}

/// A cookie that clients bring along.
fn plain_cookie(name: String) -> Option<HashSource> {
    Some(HashSource::Cookie(CookiePolicy { name, ttl: None, path: None, attributes: Vec::new() }))
}

fn header(map: Map<'_>) -> Option<HashSource> {
    let name = map.require("header_name", "x-forwarded-for").and_then(|name| header_source(&name));
    let rewrite = map.get("regex_rewrite").and_then(|field| regex_rewrite(field.map()?));
    map.finish();
    Some(HashSource::Header { name: name?, rewrite })
}

fn header_source(field: &Field<'_>) -> Option<HeaderSource> {
    let text = field.string()?;
    let Some(source) = header_name(text) else {
        field.error(format_args!("`{text}` is not a header name"), HEADER_NAME_HINT);
        return None;
    };
    if let HeaderSource::Name(name) = &source
        && REMOVED.contains(&name.as_str())
    {
        field
            .warn(format_args!("`{name}` is removed before the hash is taken: this policy never yields one"));
    }
    Some(source)
}

const HEADER_NAME_HINT: &str =
    "write a name such as x-forwarded-for, or one of :path, :authority, :method, :scheme";

/// A header by its name in any case, or a pseudo header; `host` is `:authority`.
pub(super) fn header_name(text: &str) -> Option<HeaderSource> {
    match text.to_ascii_lowercase().as_str() {
        ":path" => Some(HeaderSource::Path),
        ":authority" | "host" => Some(HeaderSource::Authority),
        ":method" => Some(HeaderSource::Method),
        ":scheme" => Some(HeaderSource::Scheme),
        name => HeaderName::try_from(name).ok().map(HeaderSource::Name),
    }
}

fn regex_rewrite(map: Map<'_>) -> Option<RegexRewrite> {
    let pattern = map.require("pattern", "{ regex: '^([^,]+)' }");
    let substitution = map.get("substitution");
    map.finish();
    let pattern = pattern?.map()?;
    // RE2 is the only engine there is; its options change nothing since Envoy 1.14.
    pattern.harmless(&["google_re2"]);
    let regex = pattern.require("regex", "'^([^,]+)'");
    pattern.finish();
    let regex = regex?;
    let compiled = match re2::compile(regex.string()?) {
        Ok(compiled) => compiled,
        Err(why) => {
            regex.error(format_args!("bad regex: {why}"), "write it in RE2's syntax");
            return None;
        }
    };
    let text = match &substitution {
        Some(field) => field.string()?,
        None => "",
    };
    if let (Err(why), Some(field)) = (re2::check_substitution(&compiled, text), &substitution) {
        field.error(
            format_args!("bad substitution: {why}"),
            r"use \0 to \9 for groups and \\ for a backslash",
        );
        return None;
    }
    Some(RegexRewrite { pattern: compiled, substitution: text.to_owned() })
}

fn cookie(map: Map<'_>) -> Option<HashSource> {
    let name = map.require("name", "sid").and_then(|name| cookie_text(&name, true));
    let ttl = map.get("ttl").and_then(|ttl| ttl.duration());
    let path = map.get("path").and_then(|path| cookie_text(&path, false)).filter(|path| !path.is_empty());
    let attributes = map.get("attributes").map(|list| list.items()).unwrap_or_default();
    let attributes = attributes.iter().filter_map(cookie_attribute).collect();
    map.finish();
    Some(HashSource::Cookie(CookiePolicy { name: name?, ttl, path, attributes }))
}

fn cookie_attribute(field: &Field<'_>) -> Option<(String, String)> {
    let map = field.map()?;
    let name = map.require("name", "SameSite").and_then(|name| cookie_text(&name, true));
    let value = map.get("value").and_then(|value| cookie_text(&value, false)).unwrap_or_default();
    map.finish();
    Some((name?, value))
}

/// What may be printed into a Set-Cookie line without changing its parts.
fn cookie_text(field: &Field<'_>, is_name: bool) -> Option<String> {
    let text = field.string()?;
    if !is_cookie_text(text, is_name) {
        let forbidden = if is_name { "`;`, `=`, quotes or spaces, and not empty" } else { "`;`" };
        field.error(
            format_args!("must be printable ASCII without {forbidden}"),
            if is_name { "write a name such as sid" } else { "leave that character out" },
        );
        return None;
    }
    Some(text.to_owned())
}

fn is_cookie_text(text: &str, is_name: bool) -> bool {
    let bad = |c: char| !(' '..='~').contains(&c) || c == ';' || is_name && matches!(c, '=' | ' ' | '"');
    !(text.contains(bad) || is_name && text.is_empty())
}

/// `header:NAME`, `cookie:NAME`, `query:NAME` or `source-ip`, as `steer run --hash` takes it.
impl FromStr for HashSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let source = match text.split_once(':') {
            None if text == "source-ip" => Some(Self::SourceIp),
            Some(("header", name)) => header_name(name).map(|name| Self::Header { name, rewrite: None }),
            Some(("cookie", name)) if is_cookie_text(name, true) => plain_cookie(name.to_owned()),
            Some(("query", name)) if !name.is_empty() => Some(Self::QueryParameter { name: name.to_owned() }),
            _ => None,
        };
        source.ok_or_else(|| {
            "write header:NAME, cookie:NAME, query:NAME or source-ip, such as header:x-forwarded-for"
                .to_owned()
        })
    }
}
