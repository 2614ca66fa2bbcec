//! The request target and `host`.

use std::borrow::Cow;

use super::Refusal;
use crate::http1::name::Known;
use crate::http1::request::RequestHead;

/// Brings the target into origin form. An absolute form's authority takes the place of `host`; the
/// forms of CONNECT and `OPTIONS *` are refused.
pub(super) fn normalise(head: &mut RequestHead<'_>) -> Result<(), Refusal> {
    if head.method == "CONNECT" {
        return Err(Refusal::BadTarget);
    }
    if !head.target.starts_with(b"/") {
        from_absolute_form(head)?;
    }
    let mut hosts = head.fields.all(Known::Host);
    match (hosts.next(), hosts.next()) {
        (Some(host), None) if is_host(host) => Ok(()),
        (Some(_), None) => Err(Refusal::BadHost),
        _ => Err(Refusal::MissingHost),
    }
}

/// Only plain HTTP is spoken here. User information in a target is an attempt to look like another
/// host (RFC 9110, 4.2.4).
fn from_absolute_form(head: &mut RequestHead<'_>) -> Result<(), Refusal> {
    const SCHEME: &[u8] = b"http://";
    let (scheme, rest) = head.target.split_at_checked(SCHEME.len()).ok_or(Refusal::BadTarget)?;
    let end = rest.iter().position(|byte| b"/?".contains(byte)).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    if !scheme.eq_ignore_ascii_case(SCHEME) || authority.is_empty() || !is_host(authority) {
        return Err(Refusal::BadTarget);
    }
    let target = match path {
        [b'/', ..] => path.to_vec(),
        query => [b"/", query].concat(),
    };
    let host = authority.to_vec();
    head.fields.set(Known::Host, host);
    head.target = Cow::Owned(target);
    Ok(())
}

/// RFC 3986, 3.2.2, and an optional port: a name, an IPv4 address, or an address in brackets. An empty
/// host is the one of a target that has none.
fn is_host(text: &[u8]) -> bool {
    let (name, port) = match text {
        [b'[', inner @ ..] => {
            let Some(end) = memchr::memchr(b']', inner) else { return false };
            let address = &inner[..end];
            if address.is_empty()
                || !address.iter().all(|byte| byte.is_ascii_hexdigit() || b":.v".contains(byte))
            {
                return false;
            }
            (&b""[..], &inner[end + 1..])
        }
        name => name.split_at(memchr::memchr(b':', name).unwrap_or(name.len())),
    };
    let port = match port {
        [] => true,
        [b':', digits @ ..] => digits.iter().all(u8::is_ascii_digit),
        _ => false,
    };
    // Unreserved characters, those of percent-encoding, and sub-delims.
    let of_a_name = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=".contains(byte);
    port && name.iter().all(of_a_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_names_or_addresses_with_an_optional_port() {
        for host in
            ["", "a", "A-b_c.example:81", "10.0.0.1", "[::1]", "[2001:db8::1]:80", "a%20b", "a,b", "a:"]
        {
            assert!(is_host(host.as_bytes()), "{host:?}");
        }
        for host in [
            &b"a b"[..],
            b"a, b",
            b"a/b?c",
            b"a@b",
            b"\xff",
            b"a:b",
            b"a:b:c",
            b"a:1:2",
            b"[::1",
            b"[]",
            b"[::1]x",
            b"a\tb",
            b"<script>",
            b"[::1%25lo]",
        ] {
            assert!(!is_host(host), "{:?}", String::from_utf8_lossy(host));
        }
    }

    #[test]
    fn targets_are_brought_into_origin_form() {
        let normal = |target: &str| {
            let head = format!("GET {target} HTTP/1.1\r\nHost: other\r\n\r\n");
            let mut head = RequestHead::parse(head.as_bytes()).unwrap();
            normalise(&mut head).map(|()| {
                let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                (text(&head.target), text(head.fields.get(Known::Host).unwrap()))
            })
        };
        let ok = |target: &str, host: &str| Ok((target.to_owned(), host.to_owned()));
        assert_eq!(normal("/a?b=<\"`>"), ok("/a?b=<\"`>", "other"));
        assert_eq!(normal("http://h:81/a?b"), ok("/a?b", "h:81"));
        assert_eq!(normal("HTTP://h"), ok("/", "h"));
        assert_eq!(normal("http://h?b"), ok("/?b", "h"));
        for target in
            ["*", "a", "h:80", "https://h/", "http:///x", "http://u:p@h/", "http://[::1/", "://", "http:/"]
        {
            assert_eq!(normal(target), Err(Refusal::BadTarget), "{target}");
        }
    }
}
