//! The TCP sockets of a namespace, as its kernel lists them.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result};

/// One socket. An IPv4-mapped address is given as IPv4.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tuple {
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub state: State,
}

/// The states that matter here: whether a process owns the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Listening,
    /// The kernel has the socket, but no process owns it (yet, or any more): SYN_RECV, TIME_WAIT.
    Unowned,
    Connection,
}

/// All TCP sockets of both families in the calling thread's namespace.
///
/// # Errors
/// When the kernel's lists cannot be read.
pub fn tcp() -> Result<Vec<Tuple>> {
    let mut all = Vec::new();
    for list in ["tcp", "tcp6"] {
        // /proc/net would show the namespace of the process' first thread.
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
    let mut words = line.split_whitespace().skip(1);
    let (local, remote) = (address(words.next()?)?, address(words.next()?)?);
    // See the kernel's include/net/tcp_states.h.
    let state = match u8::from_str_radix(words.next()?, 16).ok()? {
        10 => State::Listening,
        3 | 6 | 12 => State::Unowned,
        _ => State::Connection,
    };
    Some(Tuple { local, remote, state })
}

fn address(word: &str) -> Option<SocketAddr> {
    let (ip, port) = word.split_once(':')?;
    // The kernel prints each group of four bytes as a number in this machine's byte order.
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
            assert!(
                all.iter().any(|tuple| tuple.local == address && tuple.state == State::Listening),
                "{all:?}"
            );
            let near = stream.local_addr().unwrap();
            let connected = Tuple { local: near, remote: address, state: State::Connection };
            assert!(all.contains(&connected), "{all:?}");
        }
    }
}
