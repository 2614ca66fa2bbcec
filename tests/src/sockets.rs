//! The TCP sockets of a namespace, as its kernel lists them.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result};

/// One socket; IPv4 addresses are never IPv4-mapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tuple {
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub listens: bool,
    /// In TIME_WAIT: the kernel remembers the connection, but no process has it.
    pub waits: bool,
}

/// All TCP sockets, of both families, of the calling thread's namespace.
///
/// # Errors
/// When the kernel's lists cannot be read.
pub fn tcp() -> Result<Vec<Tuple>> {
    let mut all = Vec::new();
    for list in ["tcp", "tcp6"] {
        // /proc/net would be that of the process' first thread.
        let path = format!("/proc/thread-self/net/{list}");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        for line in text.lines().skip(1) {
            all.push(parse(line).with_context(|| format!("{path} has the line {line}"))?);
        }
    }
    Ok(all)
}

/// `0: 0100007F:1F90 00000000:0000 0A ...`
fn parse(line: &str) -> Option<Tuple> {
    const TIME_WAIT: u8 = 6;
    const LISTEN: u8 = 10;
    let mut words = line.split_whitespace().skip(1);
    let (local, remote) = (address(words.next()?)?, address(words.next()?)?);
    let state = u8::from_str_radix(words.next()?, 16).ok()?;
    Some(Tuple { local, remote, listens: state == LISTEN, waits: state == TIME_WAIT })
}

fn address(word: &str) -> Option<SocketAddr> {
    let (ip, port) = word.split_once(':')?;
    // Each group of four bytes is printed as a number of this machine's byte order.
    let groups = (0..ip.len()).step_by(8).map(|at| u32::from_str_radix(ip.get(at..at + 8)?, 16).ok());
    let bytes: Vec<u8> = groups.collect::<Option<Vec<_>>>()?.into_iter().flat_map(u32::to_ne_bytes).collect();
    let ip = match bytes.len() {
        4 => IpAddr::from(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        _ => IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?)).to_canonical(),
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn sockets_of_both_families_are_listed() {
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(local).unwrap();
            let address = listener.local_addr().unwrap();
            let stream = TcpStream::connect(address).unwrap();
            let all = tcp().unwrap();
            assert!(all.iter().any(|tuple| tuple.local == address && tuple.listens), "{all:?}");
            let near = stream.local_addr().unwrap();
            let connected = Tuple { local: near, remote: address, listens: false, waits: false };
            assert!(all.contains(&connected), "{all:?}");
        }
    }
}
