//! The endpoint: HTTP for polling and four kinds of `WebSockets`. It uses as little CPU time as
//! possible, and one thread.
//!
//! | path | what it does |
//! |---|---|
//! | `GET /bytes/N` | answers with N bytes |
//! | `POST /` | takes the body and answers `ok` |
//! | `/echo` | sends every frame back |
//! | `/bulk/{upload,download,both}` | see [`streams::Bulk`] |
//! | `/push/RUN/CONNECTIONS/ACTIVE/BYTES` | see [`push`] |

mod http;
mod push;
mod streams;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mio::event::Event;
use mio::net::TcpListener;
use mio::{Events, Interest, Poll, Token};
use slab::Slab;
use socket2::{Domain, Protocol, Socket, Type};

use crate::link::{Link, READ, TURN};
use crate::machine::raise_descriptor_limit;
use http::Http;
use push::{Groups, Member};
use streams::{Bulk, Echo};

/// Room before the bytes that were read, because an echo may be longer than the piece of a frame
/// that completed it.
const HEADROOM: usize = crate::ws::MAX_HEAD;

/// Tokens of listeners count down from the greatest value, tokens of connections count up from 0.
const LISTENERS: usize = usize::MAX / 2;

struct Connection {
    link: Link,
    role: Role,
}

enum Role {
    Http(Http),
    Echo(Echo),
    Bulk(Bulk),
    Push(Member),
}

/// Serves on `ports` of all addresses of both families until the process is killed.
///
/// # Errors
/// When it cannot listen on a port, or the poll fails. A failure of a connection ends only that
/// connection.
pub(crate) fn run(ports: &[u16]) -> Result<()> {
    raise_descriptor_limit()?;
    let mut endpoint = Endpoint::new(ports)?;
    let mut events = Events::with_capacity(1024);
    loop {
        endpoint.turn(&mut events)?;
    }
}

struct Endpoint {
    poll: Poll,
    listeners: Vec<TcpListener>,
    connections: Slab<Connection>,
    groups: Groups,
    answers: http::Answers,
    /// The frame that every download sends.
    bulk: Vec<u8>,
    /// Connections whose turn ended before they had done all their work.
    again: Vec<usize>,
    buffer: Vec<u8>,
}

/// What is left to do for a connection.
#[derive(PartialEq, Eq)]
enum Left {
    /// Nothing until the poll reports the connection.
    Nothing,
    /// The connection's turn has ended, and the poll will not report it again.
    Again,
    /// The peer has closed the connection, so it has to be closed.
    Close,
}

impl Endpoint {
    fn new(ports: &[u16]) -> Result<Self> {
        ensure!(!ports.is_empty(), "no port to serve on");
        let poll = Poll::new().context("no poll")?;
        let mut listeners = Vec::new();
        for &port in ports {
            let v4 = listen((Ipv4Addr::UNSPECIFIED, port).into())?;
            // A machine without IPv6 cannot make such a socket.
            let v6 = listen((Ipv6Addr::UNSPECIFIED, port).into()).ok();
            listeners.extend([Some(v4), v6].into_iter().flatten());
        }
        for (index, listener) in listeners.iter_mut().enumerate() {
            poll.registry().register(listener, Token(usize::MAX - 1 - index), Interest::READABLE)?;
        }
        Ok(Self {
            poll,
            listeners,
            connections: Slab::new(),
            groups: Groups::default(),
            answers: http::Answers::default(),
            bulk: crate::link::bulk_frame(None),
            again: Vec::new(),
            buffer: vec![0; HEADROOM + READ],
        })
    }

    fn turn(&mut self, events: &mut Events) -> Result<()> {
        let patience =
            if self.again.is_empty() { self.groups.until_next_choice() } else { Some(Duration::ZERO) };
        match self.poll.poll(events, patience) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            result => result.context("the poll failed")?,
        }
        for key in std::mem::take(&mut self.again) {
            self.serve(key, |endpoint| endpoint.carry_on(key, false));
        }
        for event in &*events {
            let Token(key) = event.token();
            if key > LISTENERS {
                self.accept(usize::MAX - 1 - key)?;
            } else {
                self.serve(key, |endpoint| endpoint.ready(key, event));
            }
        }
        for key in self.groups.choose(&mut self.connections) {
            self.close(key);
        }
        Ok(())
    }

    fn accept(&mut self, listener: usize) -> Result<()> {
        loop {
            let mut socket = match self.listeners[listener].accept() {
                Ok((socket, _)) => socket,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => continue,
                Err(error) => return Err(error).context("cannot accept"),
            };
            let entry = self.connections.vacant_entry();
            let interest = Interest::READABLE | Interest::WRITABLE;
            self.poll.registry().register(&mut socket, Token(entry.key()), interest)?;
            entry.insert(Connection { link: Link::connected(socket), role: Role::Http(Http::default()) });
        }
    }

    /// Calls `work` for a connection that is still there, and closes the connection if `work`
    /// fails.
    fn serve(&mut self, key: usize, work: impl FnOnce(&mut Self) -> Result<Left>) {
        if !self.connections.contains(key) {
            return;
        }
        match work(self) {
            Ok(Left::Nothing) => {}
            Ok(Left::Again) => self.again.push(key),
            Ok(Left::Close) => self.close(key),
            Err(error) => {
                // Runs end when the peer closes its connections, so that is not reported.
                if error.downcast_ref::<io::Error>().is_none() {
                    eprintln!("endpoint: {error:#}");
                }
                self.close(key);
            }
        }
    }

    fn close(&mut self, key: usize) {
        if let Some(Connection { role: Role::Push(member), .. }) = self.connections.try_remove(key) {
            self.groups.leave(&member, key);
        }
    }

    fn ready(&mut self, key: usize, event: &Event) -> Result<Left> {
        if event.is_writable() {
            self.connections[key].link.flush()?;
        }
        self.carry_on(key, event.is_read_closed())
    }

    /// Reads what has arrived (or, with `until_end`, everything up to the end), and writes what is
    /// due.
    fn carry_on(&mut self, key: usize, until_end: bool) -> Result<Left> {
        let mut left = Left::Again;
        for _ in 0..TURN {
            let Some(size) = self.connections[key].link.receive(&mut self.buffer[HEADROOM..])? else {
                left = Left::Nothing;
                break;
            };
            if size == 0 {
                return Ok(Left::Close);
            }
            self.received(key, size)?;
            // A read of fewer bytes than asked for has emptied the socket. The poll reports bytes
            // that arrive later.
            if size < READ && !until_end {
                left = Left::Nothing;
                break;
            }
        }
        let Connection { link, role } = &mut self.connections[key];
        if let Role::Bulk(bulk) = role
            && bulk.pump(link, &self.bulk)?
        {
            left = Left::Again;
        }
        Ok(left)
    }

    /// Handles `size` bytes that are in the buffer after the headroom.
    fn received(&mut self, key: usize, size: usize) -> Result<()> {
        let Connection { link, role } = &mut self.connections[key];
        let mut at = HEADROOM..HEADROOM + size;
        if let Role::Http(http) = role {
            let Some(path) = http.received(link, &self.buffer, &mut at, &mut self.answers)? else {
                return Ok(());
            };
            *role = match path.split('/').collect::<Vec<_>>()[..] {
                ["", "echo"] => Role::Echo(Echo::default()),
                ["", "bulk", direction] => Role::Bulk(Bulk::new(direction)?),
                ["", "push", ..] => Role::Push(self.groups.join(&path, key)?),
                _ => anyhow::bail!("there is no WebSocket at {path}"),
            };
        }
        if at.is_empty() {
            return Ok(());
        }
        match role {
            Role::Http(_) => Ok(()),
            Role::Echo(echo) => echo.received(link, &mut self.buffer, at),
            Role::Bulk(bulk) => bulk.received(link, &mut self.buffer, at),
            Role::Push(member) => {
                if member.received(link, &mut self.buffer, at)? {
                    self.groups.answered(member, link)?;
                }
                Ok(())
            }
        }
    }
}

fn listen(address: SocketAddr) -> Result<TcpListener> {
    let make = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        // Accepted sockets inherit the option.
        socket.set_tcp_nodelay(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        // The kernel lowers the backlog to net.core.somaxconn.
        socket.listen(65535)?;
        io::Result::Ok(TcpListener::from_std(socket.into()))
    };
    make().with_context(|| format!("cannot listen on {address}"))
}
