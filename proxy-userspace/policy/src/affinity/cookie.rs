//! Reading a cookie the way Envoy's hash policy does (not RFC 6265: nothing is decoded), and the
//! cookie that is made for a client that has none.

use std::fmt::Write as _;
use std::net::SocketAddr;

use http::HeaderValue;
use xxhash_rust::xxh64::Xxh64;

use super::address::AddressText;
use crate::config::CookiePolicy;
use crate::http1::fields::Fields;
use crate::http1::name::Known;

/// The value of the first cookie called `name` over all `cookie` lines; a pair of quotes around it
/// is removed.
pub(super) fn value<'f>(fields: &'f Fields<'_>, name: &str) -> Option<&'f [u8]> {
    fields.all(Known::Cookie).flat_map(|line| line.split(|&byte| byte == b';')).find_map(|part| {
        let start = part.iter().position(|&byte| byte != b' ')?;
        let part = &part[start..];
        let equals = memchr::memchr(b'=', part)?;
        (&part[..equals] == name.as_bytes()).then(|| unquoted(&part[equals + 1..]))
    })
}

fn unquoted(value: &[u8]) -> &[u8] {
    match value {
        [b'"', inner @ .., b'"'] => inner,
        _ => value,
    }
}

/// The value of a made cookie, which names the downstream connection: 16 hex digits of the hash of
/// both of its addresses. The same for all requests of a connection, whatever x-forwarded-for says.
pub(super) fn made_value(remote: SocketAddr, local: SocketAddr) -> String {
    let mut hash = Xxh64::new(0);
    hash.update(AddressText::of_socket(remote).as_bytes());
    hash.update(AddressText::of_socket(local).as_bytes());
    format!("{:016x}", hash.digest())
}

/// The `set-cookie` that hands a made value to the client. `None` if the policy's texts are not
/// valid in a header. (The configuration refuses such texts.)
pub(super) fn set_cookie(policy: &CookiePolicy, value: &str) -> Option<HeaderValue> {
    let mut text = format!("{}=\"{value}\"", policy.name);
    // Fractions of a second are cut off, so a ttl below one second makes a session cookie.
    let max_age = policy.ttl.map_or(0, |ttl| ttl.as_secs());
    if max_age > 0 {
        write!(text, "; Max-Age={max_age}").ok()?;
    }
    if let Some(path) = policy.path.as_deref().filter(|path| !path.is_empty()) {
        text.push_str("; Path=");
        text.push_str(path);
    }
    for (name, value) in &policy.attributes {
        text.push_str("; ");
        text.push_str(name);
        if !value.is_empty() {
            text.push('=');
            text.push_str(value);
        }
    }
    text.push_str("; HttpOnly");
    HeaderValue::try_from(text).ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn find(lines: &[&'static str]) -> Option<String> {
        let mut fields = Fields::default();
        for line in lines {
            fields.append(Known::Cookie, line.as_bytes());
        }
        value(&fields, "sid").map(|value| String::from_utf8(value.to_vec()).unwrap())
    }

    #[test]
    fn the_first_exact_name_wins() {
        for (lines, expected) in [
            (&["sid=a"][..], Some("a")),
            (&["x=1; sid=a; sid=b"], Some("a")),
            (&["x=1", "sid=a"], Some("a")),
            (&["sid=; sid=a"], Some("")),
            (&["sid; sid=a"], Some("a")),
            (&["sid=a=b"], Some("a=b")),
            (&["SID=a"], None),
            (&["sid =a"], None),
            (&["xsid=a; sidx=b; =c; ;;"], None),
            (&["x=1;\tsid=a"], None),
            (&[], None),
        ] {
            assert_eq!(find(lines).as_deref(), expected, "{lines:?}");
        }
    }

    #[test]
    fn only_one_pair_of_quotes_is_removed() {
        for (line, expected) in [
            ("sid=\"a\"", "a"),
            ("sid=\"\"a\"\"", "\"a\""),
            ("sid=\"a", "\"a"),
            ("sid=\"", "\""),
            ("sid=\"\"", ""),
            ("sid= a ", " a "),
            ("sid=a ; x=1", "a "),
            ("sid=%41", "%41"),
        ] {
            assert_eq!(find(&[line]).as_deref(), Some(expected), "{line}");
        }
    }

    #[test]
    fn made_cookies_print_as_envoys() {
        let mut policy =
            CookiePolicy { name: "sid".into(), ttl: Some(Duration::ZERO), path: None, attributes: vec![] };
        let print = |policy: &CookiePolicy| set_cookie(policy, "00ff").unwrap().to_str().unwrap().to_owned();
        assert_eq!(print(&policy), "sid=\"00ff\"; HttpOnly");
        policy.ttl = Some(Duration::from_millis(7900));
        policy.path = Some("/a".into());
        policy.attributes = vec![("SameSite".into(), "Strict".into()), ("Secure".into(), String::new())];
        assert_eq!(print(&policy), "sid=\"00ff\"; Max-Age=7; Path=/a; SameSite=Strict; Secure; HttpOnly");
    }
}
