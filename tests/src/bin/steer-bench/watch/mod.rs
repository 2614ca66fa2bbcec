//! What clients notice when a proxy restarts. `WebSockets` carry traffic all the time, and every
//! byte is compared. New connections are opened all the time.
//!
//! The watch is a separate process, as the load is. It does what standard input says, and ends when
//! standard input ends:
//!
//! | line | what it does | what it prints |
//! |---|---|---|
//! | `open N` | opens N more `WebSockets` | `ready N` (N: all that are open) when each has echoed |
//! | `window` | begins a new window | the [`Window`] that ends, as JSON |

mod probe;
mod stream;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::{self, ErrorKind, Write as _};
use std::net::SocketAddr;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hdrhistogram::Histogram;
use mio::{Events, Poll, Token};
use serde::{Deserialize, Serialize};

use self::probe::Prober;
use self::stream::{Fate, Stream};
use crate::link::READ;
use crate::machine::{monotonic_ns, raise_descriptor_limit};
use crate::spec::Latency;

const MILLISECOND: u64 = 1_000_000;
/// The time from a message of a stream to the next message, unless the echo takes longer.
const PERIOD: u64 = 200 * MILLISECOND;
/// How many `WebSockets` are opened at a time.
const OPENING: usize = 64;
/// An echo that takes longer counts as lost.
const HANG: u64 = 4000 * MILLISECOND;
/// The first token of the prober's connections.
const PROBES: usize = usize::MAX / 2;
/// The longest latency that the histogram can hold, in nanoseconds.
const LONGEST: u64 = 60_000_000_000;

/// What happened in a window of time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Window {
    pub(crate) seconds: f64,
    /// Messages that came back.
    pub(crate) messages: u64,
    /// The time from a message to its echo. `max` includes echoes that have not come by the end of
    /// the window: it is the longest gap of a stream.
    pub(crate) latency: Option<Latency>,
    /// Streams that were closed or reset, or whose echo did not come.
    pub(crate) lost: u64,
    /// Streams on which a wrong byte came back.
    pub(crate) wrong: u64,
    pub(crate) probes: Probes,
}

/// What happened to new connections. Each has one request.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Probes {
    /// Connections that were answered in time.
    pub(crate) served: u64,
    /// How many of `served` took longer than [`probe::SLOW`].
    pub(crate) slow: u64,
    pub(crate) refused: u64,
    /// Connections that were reset or closed before the answer.
    pub(crate) reset: u64,
    /// Connections with another answer, or without an answer in time.
    pub(crate) failed: u64,
    /// The longest time from one answer to the next, over all connections.
    pub(crate) unserved_ms: f64,
}

/// Watches `targets` until standard input ends. Connections go to the targets in turn.
///
/// # Errors
/// When a `WebSocket` cannot be opened, or standard input has an unknown command.
pub(crate) fn run(targets: &[SocketAddr]) -> Result<()> {
    raise_descriptor_limit()?;
    let (sender, commands) = mpsc::channel();
    thread::spawn(move || {
        // Sending fails only when the receiver is gone. Then this process ends, too.
        io::stdin().lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
    });
    let mut watch = Watch::new(targets)?;
    let mut events = Events::with_capacity(1024);
    while watch.obey(&commands)? {
        watch.turn(&mut events)?;
    }
    Ok(())
}

struct Watch<'t> {
    targets: &'t [SocketAddr],
    poll: Poll,
    /// By number. `None` for streams that were lost.
    streams: Vec<Option<Stream>>,
    /// How many streams there should be, and how many of them are open.
    wanted: usize,
    open: usize,
    /// Whether to print when all streams are open.
    say_ready: bool,
    /// When the next message of each stream is due.
    due: BinaryHeap<Reverse<(u64, usize)>>,
    prober: Prober,
    window: Window,
    begin: u64,
    latency: Histogram<u64>,
    buffer: Vec<u8>,
}

impl<'t> Watch<'t> {
    fn new(targets: &'t [SocketAddr]) -> Result<Self> {
        let begin = monotonic_ns();
        Ok(Self {
            targets,
            poll: Poll::new().context("no poll")?,
            streams: Vec::new(),
            wanted: 0,
            open: 0,
            say_ready: false,
            due: BinaryHeap::new(),
            prober: Prober::new(begin),
            window: Window::default(),
            begin,
            latency: Histogram::new_with_bounds(1, LONGEST, 3).context("no histogram")?,
            buffer: vec![0; READ],
        })
    }

    /// Does what the commands say. Returns whether more commands may come.
    fn obey(&mut self, commands: &Receiver<String>) -> Result<bool> {
        loop {
            let line = match commands.try_recv() {
                Ok(line) => line,
                Err(TryRecvError::Empty) => return Ok(true),
                Err(TryRecvError::Disconnected) => return Ok(false),
            };
            match line.split_once(' ') {
                None if line == "window" => say(&serde_json::to_string(&self.next_window())?)?,
                Some(("open", number)) => {
                    self.wanted += number.parse::<usize>().context("`open` needs a number of streams")?;
                    self.say_ready = true;
                }
                _ => bail!("unknown command {line:?}"),
            }
        }
    }

    /// Ends the window, returns it, and begins the next one.
    fn next_window(&mut self) -> Window {
        let now = monotonic_ns();
        let mut longest = self.latency.max();
        for number in 0..self.streams.len() {
            let Some(since) = self.streams[number].as_ref().and_then(Stream::waits_since) else { continue };
            longest = longest.max(now.saturating_sub(since));
            if now.saturating_sub(since) > HANG {
                self.lose(number, &format!("no echo for {} ms", (now - since) / MILLISECOND));
            }
        }
        let us = |ns: u64| ns as f64 / 1000.0;
        let at = |quantile| us(self.latency.value_at_quantile(quantile));
        let latency = Latency { p50: at(0.5), p99: at(0.99), p999: at(0.999), max: us(longest) };
        self.window.latency = (!self.latency.is_empty()).then_some(latency);
        self.window.seconds = (now - self.begin) as f64 / 1e9;
        self.window.probes = self.prober.take(now);
        self.begin = now;
        self.latency.reset();
        std::mem::take(&mut self.window)
    }

    fn turn(&mut self, events: &mut Events) -> Result<()> {
        while self.streams.len() < self.wanted.min(self.open + OPENING) {
            let (number, target) = (self.streams.len(), self.next_target());
            let stream = Stream::open(u32::try_from(number)?, target, self.poll.registry(), Token(number))?;
            self.streams.push(Some(stream));
        }
        if self.say_ready && self.open == self.wanted {
            self.say_ready = false;
            say(&format!("ready {}", self.open))?;
        }
        let now = monotonic_ns();
        self.send_due(now);
        let target = self.targets[self.prober.made() % self.targets.len()];
        self.prober.pace(now, target, self.poll.registry(), PROBES)?;
        match self.poll.poll(events, Some(Duration::from_millis(1))) {
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(()),
            result => result.context("the poll failed")?,
        }
        for event in &*events {
            let Token(token) = event.token();
            match token.checked_sub(PROBES) {
                Some(key) => self.prober.ready(key, event, &mut self.buffer),
                None => self.ready(token, event.is_writable())?,
            }
        }
        Ok(())
    }

    fn next_target(&self) -> SocketAddr {
        self.targets[self.streams.len() % self.targets.len()]
    }

    fn send_due(&mut self, now: u64) {
        while let Some(Reverse((due, number))) = self.due.peek().copied()
            && due <= now
        {
            self.due.pop();
            let Some(stream) = &mut self.streams[number] else { continue };
            if let Err(error) = stream.send(now) {
                self.lose(number, &format!("{error:#}"));
            }
        }
    }

    fn ready(&mut self, number: usize, is_writable: bool) -> Result<()> {
        let Some(stream) = &mut self.streams[number] else { return Ok(()) };
        let was_open = stream.is_open();
        let fate = stream.ready(is_writable, &mut self.buffer, |since, now| {
            self.latency.saturating_record(now.saturating_sub(since));
            self.window.messages += 1;
            self.due.push(Reverse((now.max(since + PERIOD), number)));
        });
        if !was_open && stream.is_open() {
            self.open += 1;
            // The first messages of the streams are spread over the period.
            self.due.push(Reverse((monotonic_ns() + fastrand::u64(..PERIOD), number)));
        }
        match fate {
            Fate::Lives => {}
            Fate::Lost(why) if !was_open => bail!("stream {number} cannot be opened: {why}"),
            Fate::Lost(why) => self.lose(number, &why),
            Fate::Wrong => {
                eprintln!("watch: stream {number}: a wrong byte came back");
                self.window.wrong += 1;
                self.streams[number] = None;
            }
        }
        Ok(())
    }

    fn lose(&mut self, number: usize, why: &str) {
        if self.window.lost == 0 {
            eprintln!("watch: stream {number} is lost: {why}");
        }
        self.window.lost += 1;
        self.streams[number] = None;
    }
}

fn say(line: &str) -> Result<()> {
    let mut output = io::stdout();
    writeln!(output, "{line}").and_then(|()| output.flush()).context("cannot write to standard output")
}
