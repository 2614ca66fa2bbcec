//! Opens the connections, waits for events, and keeps the time.

use std::io::ErrorKind;
use std::time::Duration;

use anyhow::{Context as _, Error, Result, ensure};
use mio::event::Event;
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use slab::Slab;
use socket2::SockRef;

use super::handshake;
use super::tally::{Begin, Tally};
use super::workload::{Connection, Next, Workload};
use crate::head::Partial;
use crate::link::{Link, READ, TURN};
use crate::machine::monotonic_ns;
use crate::spec::{Load, Measured};

/// How many connections are opened at a time: fewer than any listener's backlog.
const OPENING: usize = 256;
/// The longest time in which no connection becomes ready or fails, and the longest time for opening
/// all connections.
const OPENING_STALL: u64 = 5 * SECOND;
const OPENING_LIMIT: u64 = 45 * SECOND;
/// All connections are quiet for this long before the work begins, because a stream that waits is
/// the easiest to hand over to the kernel.
const SETTLING: u64 = 100 * MILLISECOND;
/// A message that is under way for longer at the end is lost, unless the span was longer still.
const LOST: u64 = SECOND;
/// A run is given up after so many errors.
const MAX_ERRORS: u64 = 64;
/// How many of the errors are printed.
const TOLD_ERRORS: u64 = 5;

const SECOND: u64 = 1000 * MILLISECOND;
const MILLISECOND: u64 = 1_000_000;

pub(super) struct Driver<'l, W: Workload> {
    load: &'l Load,
    workload: W,
    tally: Tally,
    poll: Poll,
    connections: Slab<Connection<W::State>>,
    /// How many connections are still to be opened.
    to_open: usize,
    /// How many connections are being opened: they are not ready yet.
    opening: usize,
    /// How many connections have been made so far.
    made: u32,
    errors: u64,
    /// When a connection last became ready or failed.
    progress: u64,
    /// Connections whose turn ended before they had done all their work.
    again: Vec<usize>,
    buffer: Vec<u8>,
    request: Vec<u8>,
}

impl<'l, W: Workload> Driver<'l, W> {
    pub(super) fn new(load: &'l Load, connections: usize, workload: W) -> Result<Self> {
        Ok(Self {
            load,
            workload,
            tally: Tally::new()?,
            poll: Poll::new().context("no poll")?,
            connections: Slab::with_capacity(connections),
            to_open: connections,
            opening: 0,
            made: 0,
            errors: 0,
            progress: 0,
            again: Vec::new(),
            buffer: vec![0; READ],
            request: Vec::new(),
        })
    }

    /// Opens all connections, warms up, and measures one span.
    pub(super) fn measure(mut self) -> Result<Measured> {
        let mut events = Events::with_capacity(1024);
        if !W::CYCLES {
            self.open_all(&mut events)?;
            self.work_until(monotonic_ns() + SETTLING, &mut events)?;
            self.begin_work();
        }
        self.work_until(monotonic_ns() + self.load.warm_up_ms * MILLISECOND, &mut events)?;
        let begin = self.begin()?;
        self.work_until(begin.at + self.load.span_ms * MILLISECOND, &mut events)?;
        let measured = self.end(&begin)?;
        Ok(Measured { errors: self.errors + self.lost(&begin), ..measured })
    }

    /// Opens as many connections as the target takes, and returns how many became ready. The others
    /// are given up.
    pub(super) fn open_what_goes(&mut self) -> Result<usize> {
        if let Err(error) = self.open_all(&mut Events::with_capacity(1024)) {
            eprintln!("load: {error:#}");
        }
        self.connections.retain(|_, connection| connection.ready);
        Ok(self.connections.len())
    }

    pub(super) fn begin(&mut self) -> Result<Begin> {
        self.tally.begin(&self.load.watched)
    }

    pub(super) fn end(&mut self, begin: &Begin) -> Result<Measured> {
        self.tally.end(begin, &self.load.watched, self.errors)
    }

    fn open_all(&mut self, events: &mut Events) -> Result<()> {
        let (begin, wanted) = (monotonic_ns(), self.to_open);
        self.progress = begin;
        while self.to_open + self.opening > 0 {
            self.turn(monotonic_ns() + SECOND, events)?;
            let now = monotonic_ns();
            let left = self.to_open + self.opening;
            ensure!(
                now < self.progress + OPENING_STALL,
                "{left} of {wanted} connections do not open: no progress"
            );
            ensure!(now < begin + OPENING_LIMIT, "{left} of {wanted} connections are not open in time");
        }
        Ok(())
    }

    fn begin_work(&mut self) {
        let keys: Vec<usize> = self.connections.iter().map(|(key, _)| key).collect();
        for key in keys {
            if let Err(error) = self.workload.begin(&mut self.connections[key], monotonic_ns()) {
                self.fail(key, &error);
            }
        }
        // The poll does not report sockets that were writable all the time.
        self.again.extend(self.connections.iter().map(|(key, _)| key));
    }

    fn work_until(&mut self, end: u64, events: &mut Events) -> Result<()> {
        while monotonic_ns() < end {
            self.turn(end, events)?;
        }
        Ok(())
    }

    /// Waits for events until `end` at the longest, then handles them once.
    fn turn(&mut self, end: u64, events: &mut Events) -> Result<()> {
        while self.to_open > 0 && (W::CYCLES || self.opening < OPENING) {
            self.open()?;
        }
        let now = monotonic_ns();
        let paced = self.workload.pace(&mut self.connections, now);
        let patience = match self.again.is_empty() {
            true if paced => MILLISECOND,
            true => end.saturating_sub(now),
            false => 0,
        };
        match self.poll.poll(events, Some(Duration::from_nanos(patience))) {
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(()),
            result => result.context("the poll failed")?,
        }
        for key in std::mem::take(&mut self.again) {
            self.serve(key, |driver| driver.carry_on(key, false));
        }
        for event in &*events {
            let Token(key) = event.token();
            self.serve(key, |driver| driver.ready(key, event));
        }
        ensure!(self.errors < MAX_ERRORS, "{} errors", self.errors);
        Ok(())
    }

    fn open(&mut self) -> Result<()> {
        self.to_open -= 1;
        self.opening += 1;
        let number = self.made;
        self.made += 1;
        let target = self.load.targets[number as usize % self.load.targets.len()];
        let mut socket = TcpStream::connect(target).with_context(|| format!("no connection to {target}"))?;
        socket.set_nodelay(true).context("no TCP_NODELAY")?;
        if !W::CYCLES {
            // Makes the close a reset: thousands of ports in TIME_WAIT would disturb the next run.
            SockRef::from(&socket).set_linger(Some(Duration::ZERO)).context("no SO_LINGER")?;
        }
        let entry = self.connections.vacant_entry();
        let key = entry.key();
        self.poll
            .registry()
            .register(&mut socket, Token(key), Interest::READABLE | Interest::WRITABLE)
            .context("cannot poll a socket")?;
        let connection = entry.insert(Connection {
            key,
            link: Link::connecting(socket),
            number,
            since: monotonic_ns(),
            upgrading: None,
            ready: false,
            state: W::State::default(),
        });
        match self.workload.path() {
            Some(path) => {
                connection.upgrading = Some(Partial::default());
                self.request.clear();
                handshake::ask(path, number, &mut self.request);
                connection.link.send(&self.request)?;
                Ok(())
            }
            None => self.workload.opened(connection),
        }
    }

    /// Calls `work` for a connection that is still there. Closes the connection if `work` fails or
    /// returns that it is done.
    fn serve(&mut self, key: usize, work: impl FnOnce(&mut Self) -> Result<Next>) {
        if !self.connections.contains(key) {
            return;
        }
        match work(self) {
            Ok(Next::Done) => self.remove(key),
            Ok(_) => {}
            Err(error) => self.fail(key, &error),
        }
    }

    fn fail(&mut self, key: usize, error: &Error) {
        self.errors += 1;
        if self.errors <= TOLD_ERRORS {
            let number = self.connections[key].number;
            eprintln!("load: connection {number}: {error:#}");
        }
        self.remove(key);
    }

    fn remove(&mut self, key: usize) {
        let connection = self.connections.remove(key);
        if !connection.ready {
            self.opening -= 1;
            self.progress = monotonic_ns();
        }
        self.to_open += usize::from(W::CYCLES);
    }

    fn ready(&mut self, key: usize, event: &Event) -> Result<Next> {
        if event.is_writable() {
            self.connections[key].link.flush()?;
        }
        self.carry_on(key, event.is_read_closed())
    }

    /// Reads what has arrived (or, with `until_end`, everything up to the end), and writes what is
    /// due.
    fn carry_on(&mut self, key: usize, until_end: bool) -> Result<Next> {
        let mut again = true;
        for _ in 0..TURN {
            let Some(size) = self.connections[key].link.receive(&mut self.buffer)? else {
                again = false;
                break;
            };
            if self.received(key, size)? == Next::Done {
                return Ok(Next::Done);
            }
            // A read of fewer bytes than asked for has emptied the socket. The poll reports bytes
            // that arrive later.
            if size < READ && !until_end {
                again = false;
                break;
            }
        }
        again |= self.workload.pump(&mut self.connections[key])?;
        if again {
            self.again.push(key);
        }
        Ok(Next::Wait)
    }

    /// Handles `size` bytes that are in the buffer. A size of 0 means the end of the stream.
    fn received(&mut self, key: usize, size: usize) -> Result<Next> {
        let now = monotonic_ns();
        let connection = &mut self.connections[key];
        let mut bytes = &self.buffer[..size];
        if bytes.is_empty() {
            return self.workload.ended(connection, now, &mut self.tally);
        }
        if let Some(partial) = &mut connection.upgrading {
            let Some(((), head)) = partial.response(bytes, handshake::check)? else { return Ok(Next::Wait) };
            connection.upgrading = None;
            self.workload.opened(connection)?;
            bytes = &bytes[head..];
            if bytes.is_empty() {
                return Ok(Next::Wait);
            }
        }
        let next = self.workload.received(connection, bytes, now, &mut self.tally)?;
        if next == Next::Ready {
            connection.ready = true;
            connection.since = 0;
            self.opening -= 1;
            self.progress = now;
        }
        Ok(next)
    }

    /// The number of connections on which a message has been under way for so long that it must be
    /// lost.
    fn lost(&self, begin: &Begin) -> u64 {
        let now = monotonic_ns();
        let patience = LOST.max(now - begin.at);
        let lost = |it: &Connection<W::State>| it.since != 0 && now - it.since > patience;
        let lost = self.connections.iter().filter(|(_, connection)| lost(connection)).count();
        if lost > 0 {
            eprintln!("load: {lost} connections got no answer");
        }
        lost as u64
    }
}
