//! Addresses as text, the way Envoy prints and hashes them: glibc's `inet_ntop`, an IPv6 scope as a
//! number.

use std::fmt::{self, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// An address without port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostAddress {
    pub ip: IpAddr,
    /// Interface index of an IPv6 link-local address, else 0.
    pub scope: u32,
}

impl From<IpAddr> for HostAddress {
    fn from(ip: IpAddr) -> Self {
        Self { ip, scope: 0 }
    }
}

impl From<SocketAddr> for HostAddress {
    fn from(address: SocketAddr) -> Self {
        let scope = match address {
            SocketAddr::V4(_) => 0,
            SocketAddr::V6(v6) => v6.scope_id(),
        };
        Self { ip: address.ip(), scope }
    }
}

impl fmt::Display for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ip {
            IpAddr::V4(ip) => write!(f, "{ip}"),
            IpAddr::V6(ip) => write_v6(f, ip, self.scope),
        }
    }
}

fn write_v6(f: &mut fmt::Formatter<'_>, ip: Ipv6Addr, scope: u32) -> fmt::Result {
    match ip.segments() {
        // IPv4-compatible: `inet_ntop` prints the last four bytes in decimal, Rust does not.
        [0, 0, 0, 0, 0, 0, high, _] if high != 0 => {
            let [.., a, b, c, d] = ip.octets();
            write!(f, "::{a}.{b}.{c}.{d}")?;
        }
        _ => write!(f, "{ip}")?,
    }
    if scope != 0 {
        write!(f, "%{scope}")?;
    }
    Ok(())
}

/// `ip:port` or `[ip6]:port`.
#[derive(Debug, Clone, Copy)]
struct WithPort(SocketAddr);

impl fmt::Display for WithPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = HostAddress::from(self.0);
        match self.0 {
            SocketAddr::V4(_) => write!(f, "{host}:{}", self.0.port()),
            SocketAddr::V6(_) => write!(f, "[{host}]:{}", self.0.port()),
        }
    }
}

/// The text of an address, without an allocation.
#[derive(Clone, Copy)]
pub struct AddressText {
    bytes: [u8; Self::CAPACITY],
    len: usize,
}

impl AddressText {
    /// Brackets, 45 characters of address, `%` and 10 digits of scope, `:` and 5 digits of port.
    const CAPACITY: usize = 64;

    /// Without port or brackets.
    pub fn of_host(host: HostAddress) -> Self {
        Self::of(&host)
    }

    /// With port, IPv6 in brackets.
    pub fn of_socket(address: SocketAddr) -> Self {
        Self::of(&WithPort(address))
    }

    fn of(value: &dyn fmt::Display) -> Self {
        let mut text = Self { bytes: [0; Self::CAPACITY], len: 0 };
        let fits = write!(text, "{value}");
        debug_assert!(fits.is_ok(), "CAPACITY covers the longest address");
        text
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl fmt::Write for AddressText {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        let end = self.len + s.len();
        self.bytes.get_mut(self.len..end).ok_or(fmt::Error)?.copy_from_slice(s.as_bytes());
        self.len = end;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(text: &str) -> String {
        let ip: IpAddr = text.parse().unwrap();
        String::from_utf8(AddressText::of_host(ip.into()).as_bytes().to_vec()).unwrap()
    }

    #[test]
    fn hosts_print_as_inet_ntop_does() {
        for (address, text) in [
            ("10.0.0.1", "10.0.0.1"),
            ("0:0:0:0:0:0:0:1", "::1"),
            ("::", "::"),
            ("2001:DB8:0:0:1:0:0:1", "2001:db8::1:0:0:1"),
            ("2001:db8:0:1:1:1:1:1", "2001:db8:0:1:1:1:1:1"),
            ("::ffff:198.51.100.1", "::ffff:198.51.100.1"),
            ("::102:304", "::1.2.3.4"),
            ("::304", "::304"),
        ] {
            assert_eq!(host(address), text);
        }
    }

    #[test]
    fn sockets_print_with_brackets_port_and_scope() {
        let text = |address: SocketAddr| {
            String::from_utf8(AddressText::of_socket(address).as_bytes().to_vec()).unwrap()
        };
        assert_eq!(text("127.0.0.1:21900".parse().unwrap()), "127.0.0.1:21900");
        assert_eq!(text("[::1]:80".parse().unwrap()), "[::1]:80");
        assert_eq!(text("[fe80::1%7]:80".parse().unwrap()), "[fe80::1%7]:80");
        let longest = "[ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255%4294967295]:65535";
        assert!(text(longest.parse().unwrap()).len() <= AddressText::CAPACITY);
        assert!(longest.len() <= AddressText::CAPACITY);
    }
}
