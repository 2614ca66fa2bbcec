//! Whether the kernel's socket splice behaves: tried once at start, on loopback, because versions
//! and back-ports tell less than a try.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use proxy_common::sock::SockCredit;
use socket2::SockRef;

use super::maps::{InsertError, SockMaps};
use crate::tcp::hold;
use crate::tcp::tcp_info::{self, TcpInfo};

/// Each step takes microseconds.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    #[error("cannot {step} on loopback")]
    Io {
        step: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the kernel did not take an established socket")]
    Insert(#[from] InsertError),
    #[error("the kernel {what}")]
    Misbehaves { what: &'static str },
}

/// Passes a message through two spliced sockets each way, then closes one side after the other.
pub fn sock_splice(maps: &SockMaps) -> Result<(), ProbeError> {
    let (client, downstream) = connected()?;
    let (server, upstream) = connected()?;
    let cookies = [cookie(&downstream)?, cookie(&upstream)?];
    let result = through(maps, cookies, [&downstream, &upstream], [&client, &server]);
    // Closing takes the sockets out of the maps.
    drop((downstream, upstream));
    cookies.into_iter().for_each(|cookie| maps.forget(cookie));
    result
}

fn through(
    maps: &SockMaps,
    cookies: [u64; 2],
    spliced: [&TcpStream; 2],
    peers: [&TcpStream; 2],
) -> Result<(), ProbeError> {
    maps.insert_target(cookies[0], spliced[1])?;
    maps.insert_target(cookies[1], spliced[0])?;

    let queued = |socket| tcp_info::queued(socket).map_err(io_error("read the send queue"));
    let start = queued(spliced[1])?;
    // Before the switch: only the kick can move this.
    send(peers[0], b"early")?;
    wait_until("receive", || Ok(TcpInfo::of(spliced[0])?.received() == 5))?;
    let credit = SockCredit { limit: 64, warn: u64::MAX };
    maps.insert_source(cookies[0], spliced[0], credit)?;
    maps.insert_source(cookies[1], spliced[1], credit)?;
    hold::kick(spliced[0]).map_err(io_error("kick"))?;
    expect(peers[1], b"early", "did not redirect what had arrived before the switch")?;

    send(peers[0], b"ping")?;
    expect(peers[1], b"ping", "did not redirect towards the server")?;
    send(peers[1], b"pong")?;
    expect(peers[0], b"pong", "did not redirect towards the client")?;

    // Redirected, a FIN would break the target before the last answer.
    peers[0].shutdown(Shutdown::Write).map_err(io_error("close"))?;
    wait_until("see the close", || Ok(!TcpInfo::of(spliced[0])?.is_established()))?;
    send(peers[1], b"last")?;
    expect(peers[0], b"last", "broke a half-closed connection")?;

    let received = TcpInfo::of(spliced[0]).map_err(io_error("read TCP_INFO"))?.received();
    let queued = queued(spliced[1])?;
    let flow = maps.flow(cookies[0]).map_err(io_error("read the flow"))?;
    if [received, queued - start, flow.bytes] != [9; 3] {
        return Err(ProbeError::Misbehaves { what: "does not count redirected bytes" });
    }
    Ok(())
}

fn send(mut to: &TcpStream, bytes: &[u8]) -> Result<(), ProbeError> {
    to.write_all(bytes).map_err(io_error("send"))
}

fn expect(mut from: &TcpStream, bytes: &[u8], otherwise: &'static str) -> Result<(), ProbeError> {
    let mut read = vec![0; bytes.len()];
    match from.read_exact(&mut read) {
        Ok(()) if read == bytes => Ok(()),
        _ => Err(ProbeError::Misbehaves { what: otherwise }),
    }
}

fn wait_until(step: &'static str, done: impl Fn() -> io::Result<bool>) -> Result<(), ProbeError> {
    let deadline = Instant::now() + PATIENCE;
    while !done().map_err(io_error(step))? {
        if Instant::now() > deadline {
            return Err(io_error(step)(io::ErrorKind::TimedOut.into()));
        }
        #[expect(clippy::disallowed_methods, reason = "nothing is served before the probe is over")]
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}

fn connected() -> Result<(TcpStream, TcpStream), ProbeError> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(io_error("listen"))?;
    let address = listener.local_addr().map_err(io_error("listen"))?;
    let near = TcpStream::connect_timeout(&address, PATIENCE).map_err(io_error("connect"))?;
    let (far, _) = listener.accept().map_err(io_error("accept"))?;
    for socket in [&near, &far] {
        socket.set_read_timeout(Some(PATIENCE)).map_err(io_error("set a timeout"))?;
        socket.set_nodelay(true).map_err(io_error("set TCP_NODELAY"))?;
    }
    Ok((near, far))
}

fn cookie(socket: &TcpStream) -> Result<u64, ProbeError> {
    SockRef::from(socket).cookie().map_err(io_error("read the socket cookie"))
}

fn io_error(step: &'static str) -> impl Fn(io::Error) -> ProbeError {
    move |source| ProbeError::Io { step, source }
}
