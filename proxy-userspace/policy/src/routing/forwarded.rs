//! What the endpoint is told about the client: x-forwarded-for, x-forwarded-proto, via,
//! x-envoy-external-address, x-request-id; and which address is trusted to be the client's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Connection;
use crate::affinity::address::{AddressText, HostAddress};
use crate::config::HttpOptions;
use crate::http1::fields::Fields;
use crate::http1::name::Known;
use crate::http1::trim_blanks;

/// Edits the headers as the listener's options say. Returns the trusted client address.
pub(super) fn apply<'c: 'b, 'b>(
    options: &'c HttpOptions,
    connection: &Connection,
    fields: &mut Fields<'b>,
) -> HostAddress {
    fields.join_lines(Known::XForwardedFor);
    let peer = HostAddress::from(connection.remote);
    let client = trusted_client(options, connection, fields.get(Known::XForwardedFor));
    let edge = options.use_remote_address;

    if edge && !options.skip_xff_append {
        append_peer(fields, peer, connection.node);
    }
    if (edge && options.xff_num_trusted_hops == 0) || !fields.contains(Known::XForwardedProto) {
        fields.set(Known::XForwardedProto, &b"http"[..]);
    }
    if let Some(via) = &options.via {
        append_via(fields, via);
    }
    if edge {
        fields.set(Known::XEnvoyExternalAddress, address_text(client));
    }
    let replace = edge && !options.preserve_external_request_id;
    if options.generate_request_id && (replace || !fields.contains(Known::XRequestId)) {
        fields.set(Known::XRequestId, request_id().to_vec());
    }
    client
}

/// `:scheme`: what x-forwarded-proto says if that is a scheme of HTTP, else that of the listener.
pub(super) fn scheme<'f>(fields: &'f Fields<'_>) -> &'f str {
    fields
        .get(Known::XForwardedProto)
        .and_then(|value| std::str::from_utf8(value).ok())
        .filter(|proto| proto.eq_ignore_ascii_case("http") || proto.eq_ignore_ascii_case("https"))
        .unwrap_or("http")
}

/// The client's address according to the x-forwarded-for entries that trusted proxies have added;
/// the peer's address if there is none.
fn trusted_client(
    options: &HttpOptions,
    connection: &Connection,
    forwarded_for: Option<&[u8]>,
) -> HostAddress {
    let peer = HostAddress::from(connection.remote);
    // The peer has added the right-most element, about its own peer. At the edge, the address of
    // the peer itself counts as the first trusted element.
    let hops = options.xff_num_trusted_hops as usize;
    let skip = if options.use_remote_address {
        match hops.checked_sub(1) {
            Some(skip) => skip,
            None => return peer,
        }
    } else {
        hops
    };
    forwarded_for
        .and_then(|value| value.rsplit(|&byte| byte == b',').nth(skip))
        .and_then(|element| parse_address(trim_blanks(element), connection.interface_index))
        .unwrap_or(peer)
}

/// A bare address; an IPv6 one may have a scope, by number or (for link-local ones) by interface.
fn parse_address(text: &[u8], interface_index: fn(&str) -> Option<u32>) -> Option<HostAddress> {
    let text = std::str::from_utf8(text).ok()?;
    if let Some((address, scope)) = text.split_once('%') {
        let ip: Ipv6Addr = address.parse().ok()?;
        return Some(HostAddress { ip: ip.into(), scope: parse_scope(ip, scope, interface_index)? });
    }
    text.parse::<IpAddr>().ok().map(HostAddress::from)
}

/// glibc's rule, which is Envoy's.
fn parse_scope(ip: Ipv6Addr, scope: &str, interface_index: fn(&str) -> Option<u32>) -> Option<u32> {
    let multicast_scope = (ip.segments()[0] & 0xff0f, ip.is_multicast());
    let local = ip.is_unicast_link_local() || matches!(multicast_scope, (0xff01 | 0xff02, true));
    if local && let Some(index) = interface_index(scope) {
        return Some(index);
    }
    if scope.bytes().all(|byte| byte.is_ascii_digit()) { scope.parse().ok() } else { None }
}

fn append_peer(fields: &mut Fields<'_>, peer: HostAddress, node: IpAddr) {
    // Exactly these two addresses. Other addresses of 127.0.0.0/8 are used as they are.
    let on_loopback = peer.ip == Ipv4Addr::LOCALHOST || peer.ip == Ipv6Addr::LOCALHOST;
    let address = address_text(if on_loopback { node.into() } else { peer });
    fields.append_to(Known::XForwardedFor, b",", address);
}

pub(super) fn append_via<'b>(fields: &mut Fields<'b>, via: &'b str) {
    fields.join_lines(Known::Via);
    fields.append_to(Known::Via, b", ", via.as_bytes());
}

fn address_text(address: HostAddress) -> Vec<u8> {
    AddressText::of_host(address).as_bytes().to_vec()
}

/// A random UUID (RFC 9562, version 4).
fn request_id() -> [u8; 36] {
    let random: u128 = rand::random();
    let bits = (random & !(0xf << 76) & !(0x3 << 62)) | (0x4 << 76) | (0x2 << 62);
    let mut text = [b'-'; 36];
    let digits = text.iter_mut().enumerate().filter(|(position, _)| !matches!(position, 8 | 13 | 18 | 23));
    for (index, (_, digit)) in digits.enumerate() {
        let nibble = (bits >> (124 - 4 * index)) & 0xf;
        *digit = b"0123456789abcdef"[nibble as usize];
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The index of the interface `lo`.
    const LO: u32 = 3;

    fn parse(text: &str) -> Option<String> {
        parse_address(trim_blanks(text.as_bytes()), |name| (name == "lo").then_some(LO))
            .map(|address| address.to_string())
    }

    #[test]
    fn only_bare_addresses_are_trusted() {
        for (text, expected) in [
            ("1.2.3.4", Some("1.2.3.4")),
            ("\t1.2.3.4 ", Some("1.2.3.4")),
            ("2001:DB8:0:0:1:0:0:1", Some("2001:db8::1:0:0:1")),
            ("::ffff:1.2.3.4", Some("::ffff:1.2.3.4")),
            ("1.2.3.4:80", None),
            ("[::1]", None),
            ("[::1]:80", None),
            ("1.2.3.04", None),
            ("1.2.3", None),
            ("unknown", None),
            ("", None),
            ("fe80::1%", None),
            ("%1", None),
        ] {
            assert_eq!(parse(text).as_deref(), expected, "{text:?}");
        }
    }

    #[test]
    fn scopes_print_as_numbers() {
        assert_eq!(parse("fe80::1%lo"), Some(format!("fe80::1%{LO}")));
        assert_eq!(parse("ff02::1%lo"), Some(format!("ff02::1%{LO}")));
        assert_eq!(parse("fe80::1%7"), Some("fe80::1%7".to_owned()));
        assert_eq!(parse("2001:db8::1%7"), Some("2001:db8::1%7".to_owned()));
        assert_eq!(parse("fe80::1%0"), Some("fe80::1".to_owned()));
        assert_eq!(parse("2001:db8::1%lo"), None, "a name needs a link-local address");
        assert_eq!(parse("fe80::1%no-such-if"), None);
        assert_eq!(parse("fe80::1%+7"), None);
        assert_eq!(parse("fe80::1%4294967296"), None);
        assert_eq!(parse("1.2.3.4%1"), None);
    }

    #[test]
    fn request_ids_are_uuids() {
        let id = request_id();
        let text = std::str::from_utf8(&id).unwrap();
        assert_eq!(text.len(), 36);
        for (position, byte) in text.bytes().enumerate() {
            match position {
                8 | 13 | 18 | 23 => assert_eq!(byte, b'-'),
                14 => assert_eq!(byte, b'4'),
                19 => assert!(b"89ab".contains(&byte)),
                _ => assert!(byte.is_ascii_hexdigit()),
            }
        }
        assert_ne!(id, request_id());
    }
}
