//! What all formats demand of virtual hosts, routes and the file as a whole.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use super::reader::{Field, nearest};
use super::{HashSource, HeaderSource, HttpOptions, PathMatch, Route};

/// The time limit of a route of Envoy's formats that has none of its own.
pub(super) const ENVOY_ROUTE_TIMEOUT: Duration = Duration::from_secs(15);

/// Names of the clusters in file order, by which routes find them.
pub(super) fn cluster_names<'t>(clusters: &[Field<'t>]) -> Vec<&'t str> {
    clusters
        .iter()
        .map(|cluster| cluster.peek("name").and_then(|name| name.scalar()).map_or("", |(text, _)| text))
        .collect()
}

/// The cluster that `field` names, if there is one.
pub(super) fn known_cluster(field: &Field<'_>, names: &[&str]) -> Option<String> {
    let name = field.string()?;
    let is_known = names.contains(&name);
    if !is_known {
        let hint = match nearest(name, names.iter().copied()) {
            Some(near) => format!("did you mean `{near}`?"),
            None if names.is_empty() => format!("define it: clusters: [{{ name: {name}, ... }}]"),
            None => format!("define it, or use one of: {}", names.join(", ")),
        };
        field.error(format_args!("there is no cluster `{name}`"), hint);
    }
    is_known.then(|| name.to_owned())
}

/// A name that no other of its kind has.
pub(super) fn unique<'t>(fields: impl Iterator<Item = Field<'t>>, kind: &str) {
    let mut seen = HashMap::new();
    for field in fields {
        let Some((text, _)) = field.scalar() else { continue };
        let first = *seen.entry(text).or_insert(field.at());
        if first != field.at() {
            field.error(
                format_args!("another {kind} on line {} is called `{text}`", first.line),
                "give each its own name",
            );
        }
    }
}

/// The name of a listener that may not have one; `index` is its position in the file.
pub(super) fn listener_name(name: Option<&str>, index: usize) -> String {
    name.map_or_else(|| format!("listener_{index}"), str::to_owned)
}

/// Listeners are found by name, so no two have the same, given or not.
pub(super) fn unique_listener_names(listeners: &[Field<'_>]) {
    let mut seen = HashMap::new();
    for (index, listener) in listeners.iter().enumerate() {
        let field = listener.peek("name");
        let name =
            field.as_ref().and_then(Field::scalar).map(|(name, _)| name).filter(|name| !name.is_empty());
        let name = listener_name(name, index);
        let first = *seen.entry(name.clone()).or_insert(listener.at());
        if first != listener.at() {
            field.as_ref().unwrap_or(listener).error(
                format_args!("another listener on line {} is called `{name}`", first.line),
                "give each its own name",
            );
        }
    }
}

/// The items of a listener's `virtual_hosts`.
pub(super) fn virtual_hosts<'t>(list: &Field<'t>) -> Vec<Field<'t>> {
    let items = list.items();
    if items.is_empty() {
        list.warn("no virtual hosts: every request is answered with 404");
    }
    items
}

/// Reads a virtual host's `domains`; `seen` is shared by all virtual hosts of a listener.
pub(super) fn domains<'t>(list: &Field<'t>, seen: &mut HashMap<String, usize>) -> Vec<String> {
    let items = list.items();
    if items.is_empty() {
        list.error("must name at least one domain", "write `domains: [\"*\"]` to serve every host");
    }
    items.iter().filter_map(|item| domain(item, seen)).collect()
}

fn domain(field: &Field<'_>, seen: &mut HashMap<String, usize>) -> Option<String> {
    let text = field.string()?;
    let domain = text.to_lowercase();
    let inner = domain.strip_prefix('*').or(domain.strip_suffix('*')).unwrap_or(&domain);
    if domain.is_empty() || inner.contains('*') || domain.contains(|c: char| c.is_whitespace() || c == '/') {
        field.error(
            format_args!("`{text}` is not a domain"),
            "write a host, optionally with a port, or one `*` at its start or end: *.example.com",
        );
        return None;
    }
    if let Some(line) = seen.get(&domain) {
        field.error(
            format_args!("the domain `{text}` stands twice in this listener, first on line {line}"),
            "keep one of the two",
        );
        return None;
    }
    seen.insert(domain.clone(), field.at().line);
    Some(domain)
}

/// Reads a path that routes compare with: it begins with `/` and has no query.
pub(super) fn path<'t>(field: &Field<'t>) -> Option<&'t str> {
    let text = field.string()?;
    let good = text.is_empty() || text.starts_with(['/', '*']);
    if !good || text.contains(['?', '#', ' ']) || text.contains(char::is_control) {
        field.error(
            format_args!("`{text}` can never match a path"),
            "begin with `/`, and leave out query and fragment",
        );
        return None;
    }
    Some(text)
}

/// What `prefix` and `path` of a route mean, of which there must be one; `hint` says how to write
/// it.
pub(super) fn path_match(
    field: &Field<'_>,
    found: (Option<Field<'_>>, Option<Field<'_>>),
    hint: &str,
) -> Option<PathMatch> {
    match found {
        (Some(prefix), None) => Some(PathMatch::Prefix(path(&prefix)?.to_owned())),
        (None, Some(exact)) => exact_path(&exact),
        _ => {
            field.error("must have either `prefix` or `path`", hint);
            None
        }
    }
}

/// An exact path; `None` and reported if empty.
fn exact_path(field: &Field<'_>) -> Option<PathMatch> {
    let text = path(field)?;
    if text.is_empty() {
        field.error("must not be empty", "write a path such as /socket.io/");
        return None;
    }
    Some(PathMatch::Exact(text.to_owned()))
}

/// Warns of a route that spreads one client's requests.
pub(super) fn warn_if_not_sticky(field: &Field<'_>, route: &Route, options: &HttpOptions) {
    if route.hash_policy.is_empty() {
        field.warn("no hash_policy: the requests of one client will be spread over all endpoints at random");
    }
    let new_id_each_time =
        options.use_remote_address && options.generate_request_id && !options.preserve_external_request_id;
    for policy in &route.hash_policy {
        if let HashSource::Header { name: HeaderSource::Name(name), .. } = &policy.source
            && name == "x-request-id"
            && new_id_each_time
        {
            field.warn("hashes x-request-id, which is new for each request: nothing stays on its endpoint");
        }
    }
}

/// Warns of a route that has Envoy's default time limit although long polls probably use it.
/// `remedy` says what removes the limit.
pub(super) fn warn_if_polls_end(field: &Field<'_>, route: &Route, options: &HttpOptions, remedy: &str) {
    if route.upgrade_websocket.unwrap_or(options.upgrade_websocket) {
        let limit = ENVOY_ROUTE_TIMEOUT.as_secs();
        field.warn(format_args!(
            "no timeout, so Envoy's default applies: a response that takes longer than {limit} s is a 504, \
             but polls of socket.io wait for up to 25 s; set `{remedy}` on this route"
        ));
    }
}

/// Warns of an admin server that others can reach.
pub(super) fn warn_if_open(field: &Field<'_>, admin: SocketAddr) {
    if !admin.ip().to_canonical().is_loopback() {
        field.warn(format_args!("the admin server on {admin} has no password; bind it to loopback"));
    }
}

/// No two servers may listen on one address.
pub(super) fn unique_addresses<'t>(servers: &[(Field<'t>, SocketAddr)]) {
    for (index, (field, address)) in servers.iter().enumerate() {
        let first = servers[..index].iter().find(|(_, other)| other == address);
        if let (Some((first, _)), 1..) = (first, address.port()) {
            field.error(
                format_args!("{address} is also used on line {}", first.at().line),
                "give each its own address",
            );
        }
    }
}
